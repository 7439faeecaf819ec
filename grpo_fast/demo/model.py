"""The demonstration's model: a causal language model of the transformers library that is small enough for one CPU core."""

from __future__ import annotations

from typing import TYPE_CHECKING

from grpo_fast.utils.install_hints import require_packages

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["make_model"]


def make_model(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Return a randomly initialised Qwen2 of about 0.1 million parameters.

    Raises:
        ImportError: transformers is not installed.
    """
    require_packages("transformers", extras=("demo",), needed_by="The demo")
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=192,
        max_position_embeddings=256,
        tie_word_embeddings=False,  # with tied embeddings, or with the usual range of 0.02, the warm start needs twice the steps
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="eager",  # for inputs this small faster on a CPU than fused attention
    )
    return Qwen2ForCausalLM(config)
