"""Unwrapping: from a wrapped model (PEFT, data parallelism, torch.compile) to the transformers model inside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "end_tokens_of",
    "eval_mode",
    "inner_model",
    "is_fsdp2",
    "is_peft",
    "is_sharded",
    "unwrap",
    "whole_parameters",
    "without_wrappers",
]

_FSDP1 = "FullyShardedDataParallel"


def without_wrappers(model: Any) -> Any:
    """Return the model without DistributedDataParallel, FSDP, DeepSpeed and torch.compile. A PEFT model remains a PEFT model."""
    while True:
        inner = getattr(model, "_orig_mod", None)  # torch.compile
        if inner is None and not hasattr(type(model), "generate"):  # of the class: FSDP and DeepSpeed pass attributes of the inner model on
            inner = getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def unwrap(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model without any wrapper. LoRA layers are part of it and stay active."""
    model = without_wrappers(model)
    return without_wrappers(model.get_base_model()) if is_peft(model) else model  # type: ignore[operator]


def inner_model(model: nn.Module) -> PreTrainedModel:
    """Return `unwrap(model)`, for callers that run the inner model itself.

    Raises:
        ValueError: the adapter uses prompt learning, which is not part of the inner model.
    """
    peft = without_wrappers(model)
    if is_peft(peft) and any(getattr(config, "is_prompt_learning", False) for config in peft.peft_config.values()):
        raise ValueError(
            "model uses prompt learning (prefix or prompt tuning), whose virtual tokens live outside the model; expected an adapter "
            "inside the layers. Fix: use LoRA."
        )
    return unwrap(model)


def end_tokens_of(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end a completion: the tokenizer's, and those of the model's generation_config."""
    known = getattr(getattr(inner_model(model), "generation_config", None), "eos_token_id", None)
    more = known if isinstance(known, list) else [known]
    return list(dict.fromkeys(token for token in [tokenizer.eos_token_id, *more] if token is not None))


def is_peft(model: object) -> bool:
    """Return whether the model is a PEFT model without another wrapper."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def is_fsdp2(module: object) -> bool:
    """Return whether `fully_shard` was applied to the module. An isinstance check would take a second of imports."""
    return hasattr(module, "set_requires_gradient_sync") and hasattr(module, "unshard")


def is_sharded(model: nn.Module) -> bool:
    """Return whether each process holds only a part of the parameters; all must then run the same number of forward passes."""
    while True:
        if type(model).__name__ in (_FSDP1, "DeepSpeedEngine") or any(base.__name__ == "FSDPModule" for base in type(model).__mro__):
            return True
        inner = getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            return False
        model = inner


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout and gradient checkpointing off, and restore the mode of every module afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def whole_parameters(model: Any) -> AbstractContextManager[None]:
    """Return a context in which FSDP1's flat parameters outside of the layers are gathered, which `generate` of the inner model needs."""
    if type(model).__name__ == _FSDP1:
        return model.summon_full_params(model, recurse=False, writeback=False)
    return nullcontext()
