"""Validation of the arguments that a loss over logits does not have: weight, bias, adapter, memory limits."""

from __future__ import annotations

import numbers
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from grpo_fast.head.precision import LOGITS_DTYPES
from grpo_fast.head.weights import is_quantised
from grpo_fast.loss import checks

__all__ = [
    "check_invariance",
    "check_logits_dtype",
    "check_weight",
    "product_dtype",
    "validated_bytes",
    "validated_module",
    "vocabulary_of",
]


def product_dtype(hidden: Tensor, weight: Tensor | None, autocast: torch.dtype | None) -> torch.dtype:
    """Return the dtype of the products: the one that both operands promote to, or autocast's if it is in force; float64 is kept."""
    together = hidden.dtype if weight is None else torch.promote_types(hidden.dtype, weight.dtype)
    return together if autocast is None or together == torch.float64 else autocast


def check_logits_dtype(logits_dtype: object) -> None:
    """Raise a ValueError unless logits_dtype is one of its names."""
    if not isinstance(logits_dtype, str) or logits_dtype not in LOGITS_DTYPES:
        raise ValueError(
            f"logits_dtype is {logits_dtype!r}; expected 'float32', or 'input': logits in the dtype of hidden states and weight. "
            "Fix: leave it out for 'float32'."
        )


def check_invariance(module: object, *, by_reference: bool) -> None:
    """Raise a RuntimeError if the products of the call cannot be computed in a batch-invariant way."""
    if module is not None:
        raise RuntimeError(
            "batch_invariant() is in force, and weight is a callable; expected a tensor [V, D]: the callable's own products may depend on "
            "the number of tokens. Fix: pass the weight, or turn it off for this call: with gf.batch_invariant(False)."
        )
    if by_reference:
        raise RuntimeError(
            "batch_invariant() is in force, and the reference backend computes this call; expected the 'cpu' or 'triton' backend and "
            "float32, bfloat16 or float16: PyTorch's products depend on the number of tokens. Fix: gf.backends() says why another backend "
            "is not usable; or with gf.batch_invariant(False)."
        )


def check_weight(hidden: Tensor, weight: Tensor, bias: Tensor | None, adapter: tuple[Tensor, Tensor] | None) -> None:
    """Raise a TypeError or ValueError unless weight [V, D], bias [V] and adapter fit the hidden states."""
    checks.tensor("weight", weight, like=hidden, like_name="hidden")
    if not torch.compiler.is_compiling() and is_quantised(weight):
        raise TypeError(
            f"weight is a {type(weight).__name__} (quantised); expected a plain tensor. Pass the frozen head itself, weight=model.lm_head."
        )
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight has shape {list(weight.shape)}; expected [V, D] = [V, {hidden.shape[-1]}], D being the last dimension of hidden "
            f"{list(hidden.shape)}. It is the weight of the head's torch.nn.Linear."
        )
    if weight.shape[0] < 2:
        raise ValueError(f"weight has a vocabulary of {weight.shape[0]}; expected at least 2 rows.")
    if bias is not None:
        checks.tensor("bias", bias, like=hidden, like_name="hidden")
        checks.shape("bias", bias, ((weight.shape[0],), "[V]"), source="weight")
    if adapter is None:
        return
    if not isinstance(adapter, tuple) or len(adapter) != 2:
        raise TypeError(f"adapter is {type(adapter).__name__}; expected a pair of tensors (adapted, adapter_weight).")
    adapted, adapter_weight = adapter
    checks.tensor("adapter[0]", adapted, like=hidden, like_name="hidden")
    checks.tensor("adapter[1]", adapter_weight, like=hidden, like_name="hidden")
    if adapter_weight.dim() != 2:
        raise ValueError(f"adapter[1] has shape {list(adapter_weight.shape)}; expected [V, R] = [{weight.shape[0]}, R]. It is LoRA's B.")
    rank = adapter_weight.shape[1]
    checks.shape("adapter[0]", adapted, ((*hidden.shape[:-1], rank), "the shape of hidden with R in place of D"), source="hidden")
    checks.shape("adapter[1]", adapter_weight, ((weight.shape[0], rank), "[V, R]"), source="weight")


def validated_module(
    module: object, bias: Tensor | None, adapter: tuple[Tensor, Tensor] | None, group: ProcessGroup | None
) -> Callable[[Tensor], Tensor]:
    """Return a frozen callable that was given in place of the weight; raise a TypeError or ValueError for anything else."""
    if not callable(module):
        raise TypeError(f"weight is a {type(module).__name__}; expected a torch.Tensor [V, D], or a callable from hidden states to logits.")
    for name, x in (("bias", bias), ("adapter", adapter), ("process_group", group)):
        if x is not None:
            raise ValueError(
                f"{name} was given with a callable in place of the weight; expected None: the callable computes all of the logits."
            )
    trained = [name for name, p in module.named_parameters() if p.requires_grad] if isinstance(module, torch.nn.Module) else []
    if trained:
        raise ValueError(
            f"weight is a module with trainable parameters ({', '.join(trained[:3])}); expected a frozen one. Pass the weight itself, "
            "weight=module.weight, or freeze the module: module.requires_grad_(False)."
        )
    return module


def vocabulary_of(module: Callable[[Tensor], Tensor], hidden: Tensor) -> int:
    """Return the number of logits that the callable computes: its out_features, or else what it returns for one hidden state."""
    size = getattr(module, "out_features", None)
    if isinstance(size, int):
        return size
    with torch.no_grad():
        logits = module(hidden.detach().reshape(-1, hidden.shape[-1])[:1])
    if not isinstance(logits, Tensor) or logits.dim() == 0:
        made = "a number" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise ValueError(
            f"weight is a callable that returned {made} for hidden states [1, {hidden.shape[-1]}]; expected logits [1, V]. Pass the "
            "forward of the model's head."
        )
    return logits.shape[-1]


def validated_bytes(name: str, value: int | None, *, least: int) -> int | None:
    """Return a number of bytes as an int, or None."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, numbers.Integral)):
        raise TypeError(f"{name} is {value!r} ({type(value).__name__}); expected an int, a number of bytes, or None.")
    if value < least:
        raise ValueError(f"{name} is {value}; expected at least {least}. Leave it out to have it chosen from the free memory.")
    return int(value)
