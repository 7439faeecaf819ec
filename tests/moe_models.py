"""Mixture-of-experts models of two small layers, one per architecture whose routers have an auxiliary loss."""

from __future__ import annotations

from typing import Any

import torch

MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "olmoe")
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.5}
_SETTINGS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.5},
    "qwen2_moe": {**_MOE, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 12, "decoder_sparse_step": 2},
    "qwen3_moe": {**_MOE, "moe_intermediate_size": 12, "head_dim": 8},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.5, "head_dim": 8},
    "olmoe": _MOE,
}


def moe_model(name: str, vocab_size: int = 24, **settings: Any) -> Any:
    """A causal language model with random weights, of the architecture ``name``."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(3)
    common = {
        "vocab_size": vocab_size,
        "hidden_size": 16,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
    }
    config = AutoConfig.for_model(name, **{**common, **_SETTINGS[name], **settings})
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
