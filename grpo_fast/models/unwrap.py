"""From what the trainer holds to the transformers model inside, whose `generate` and whose weights a sampler needs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

__all__ = ["end_tokens_of", "eval_mode", "inner_model", "is_peft", "is_sharded", "whole_parameters"]

_FSDP1 = "FullyShardedDataParallel"


def inner_model(model: Any) -> Any:
    """The transformers model under DDP, FSDP, DeepSpeed, torch.compile and PEFT. LoRA layers are part of it and stay in force."""
    model = _without_wrappers(model)
    if is_peft(model):
        if any(getattr(config, "is_prompt_learning", False) for config in model.peft_config.values()):
            raise ValueError(
                "model uses prompt learning (prefix or prompt tuning), whose virtual tokens live outside the model; expected an adapter "
                "inside the layers. Use LoRA."
            )
        return _without_wrappers(model.get_base_model())
    return model


def end_tokens_of(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a completion: the tokenizer's, and those the model's own generation knows."""
    known = getattr(getattr(inner_model(model), "generation_config", None), "eos_token_id", None)
    more = known if isinstance(known, list) else [known]
    return list(dict.fromkeys(token for token in [tokenizer.eos_token_id, *more] if token is not None))


def is_peft(model: Any) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def is_sharded(model: Any) -> bool:
    """Whether each process holds a part of the parameters only: then all must make the same number of forward passes."""
    while True:
        if type(model).__name__ in (_FSDP1, "DeepSpeedEngine") or any(base.__name__ == "FSDPModule" for base in type(model).__mro__):
            return True
        inner = getattr(model, "module", None)
        if not isinstance(inner, torch.nn.Module):
            return False
        model = inner


@contextmanager
def eval_mode(model: Any) -> Iterator[None]:
    """No dropout and no gradient checkpointing inside; after it every module is in the mode it was in before, one by one."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def whole_parameters(model: Any) -> Any:
    """A context in which FSDP's flat parameters outside the layers are whole, as `generate` of the inner module needs them."""
    if type(model).__name__ == _FSDP1:
        return model.summon_full_params(model, recurse=False, writeback=False)
    return nullcontext()


def _without_wrappers(model: Any) -> Any:
    while True:
        inner = getattr(model, "_orig_mod", None)  # torch.compile
        if inner is None and not hasattr(model, "generate"):
            inner = getattr(model, "module", None)  # DDP, FSDP, DeepSpeed
        if not isinstance(inner, torch.nn.Module):
            return model
        model = inner
