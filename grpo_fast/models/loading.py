"""Loading of a model and its tokenizer, by name or from given objects, and their preparation for training."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_fast.models.packing import choose_attention
from grpo_fast.models.unwrap import is_peft

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.utils.quantization_config import QuantizationConfigMixin

__all__ = ["load_adapter_weights", "load_policy", "without_dropout"]


def load_policy(
    model: str | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    peft_config: PeftConfig | None = None,
    quantization_config: QuantizationConfigMixin | None = None,
    model_init_kwargs: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
    half_precision: bool = False,
    gradient_checkpointing: bool = False,
    disable_dropout: bool = True,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model and its tokenizer if they are given by name, and prepare both for training.

    Args:
        model: a causal language model of transformers, a PEFT model, or the name or folder of one, of an adapter too.
        tokenizer: None = the tokenizer of the model's name.
        peft_config: if given, the model is wrapped in a PEFT model.
        quantization_config, model_init_kwargs, trust_remote_code: arguments of ``from_pretrained``, for a model given by name.
        half_precision: whether the model is run under autocast in 16 bits, so that flash attention can be chosen.
        gradient_checkpointing: whether it will be on, for which a PEFT model needs gradients of its inputs.
        disable_dropout: set every dropout to 0.

    Returns:
        The model and the tokenizer.

    Raises:
        ValueError: names the argument, what it was, what was expected and the fix.
    """
    if quantization_config is not None and not isinstance(model, str):
        raise ValueError(
            "quantization_config is given with a model; expected None, or the model's name: a model is quantised while it is loaded."
        )
    name = model if isinstance(model, str) else getattr(getattr(model, "config", None), "_name_or_path", "")
    if isinstance(model, str):
        options = _from_pretrained_options(model_init_kwargs or {}, quantization_config, trust_remote_code, half_precision)
        model = _from_pretrained(model, options)
    if tokenizer is None:
        if not name:
            raise ValueError("processing_class is None and the model has no name to find its tokenizer by; expected the tokenizer.")
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise ValueError("processing_class has no eos_token_id; expected one: a completion ends with it.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    _check_token_ids(model, tokenizer)
    if peft_config is not None:
        from peft import get_peft_model

        if is_peft(model):
            raise ValueError(
                "peft_config is given with a model that has an adapter; expected one of the two. Fix: no peft_config, to go on training "
                "that adapter, or model.merge_and_unload(), to train a new one."
            )
        with warnings.catch_warnings():  # PEFT reads is_gradient_checkpointing, which transformers has renamed (5.23)
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
            model = get_peft_model(model, peft_config)
    if is_peft(model) and gradient_checkpointing:
        model.enable_input_require_grads()
    if disable_dropout:
        without_dropout(model)
    return model, tokenizer


def load_adapter_weights(model: PeftModel, name: str, path: Path) -> None:
    """Load the weights of one adapter of a PEFT model, without changing which adapters are active and trained.

    Args:
        model: the PEFT model.
        name: of the adapter.
        path: ``adapter_model.safetensors`` as ``save_pretrained`` writes it.
    """
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    set_peft_model_state_dict(model, load_file(path), adapter_name=name)


def _check_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    size = getattr(model.get_input_embeddings(), "num_embeddings", None)
    for name in ("eos_token_id", "pad_token_id"):
        token = getattr(tokenizer, name)
        if size is not None and not 0 <= token < size:
            raise ValueError(
                f"processing_class has {name} = {token}, and the model's embedding has {size} rows; expected an id below that. Fix: "
                "model.resize_token_embeddings(len(tokenizer)), or another token of the vocabulary, such as tokenizer.pad_token = "
                "tokenizer.eos_token."
            )


def _from_pretrained(name: str, options: dict[str, Any]) -> PreTrainedModel:
    """Load a model by its name or folder, as a PEFT model whose adapter is trained if it is an adapter."""
    is_adapter = (Path(name) / "adapter_config.json").is_file()
    if not is_adapter:
        model = AutoModelForCausalLM.from_pretrained(name, **options)
        is_adapter = getattr(model, "_hf_peft_config_loaded", False)  # transformers adds it to the base model, to be used but not trained
    if is_adapter:
        from peft import AutoPeftModelForCausalLM

        model = AutoPeftModelForCausalLM.from_pretrained(name, is_trainable=True, **options)
    return model


def _from_pretrained_options(
    given: Mapping[str, Any], quantization_config: QuantizationConfigMixin | None, trust_remote_code: bool, half_precision: bool
) -> dict[str, Any]:
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "dtype": "float32", **given}
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
    if options.get("attn_implementation") in (None, "auto"):
        half = half_precision or options["dtype"] in ("bfloat16", "float16", torch.bfloat16, torch.float16)
        options["attn_implementation"] = choose_attention(half=half)
    return options


def without_dropout(model: nn.Module) -> None:
    """Set every dropout to 0: that of modules, and that of attention, which transformers stores as a number."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
