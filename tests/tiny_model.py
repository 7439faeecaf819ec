"""A causal language model of 2 layers and its tokenizer, as files."""

from __future__ import annotations

from pathlib import Path

import torch

VOCABULARY = 40  # w0 ... after three special tokens


def save_tiny_model(path: Path, *, mixture: bool = False) -> Path:
    """Random weights, large enough that its distributions have a shape; mixture: of experts."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    words = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(VOCABULARY - 3))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>").save_pretrained(path)
    torch.manual_seed(5)
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 1,
        "initializer_range": 0.4,
    }
    if mixture:
        experts = {"num_local_experts": 3, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.1}
        MixtralForCausalLM(MixtralConfig(**settings, **experts)).save_pretrained(path)
    else:
        Qwen2ForCausalLM(Qwen2Config(**settings)).save_pretrained(path)
    return path
