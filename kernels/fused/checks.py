"""What the launchers check before a kernel reads memory: on a GPU an access out of bounds reads other tensors, or ends the process.

The C++ operators check the same, and raise RuntimeError with the same words.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["check_gradient", "check_matrix", "check_per_token", "check_rows", "check_scaled", "check_statistics"]

_LOGITS = (torch.float32, torch.bfloat16, torch.float16)


def check_rows(logits: Tensor, token_ids: Tensor, mask: Tensor) -> None:
    """Raise RuntimeError unless these are logits [B, T, V] or [B, T + 1, V] contiguous over V, int64 ids [B, T] and a bool mask."""
    if logits.dim() != 3:
        raise RuntimeError(f"grpo_fast: logits have {logits.dim()} dimensions; expected [B, T, V] or [B, T + 1, V]")
    if token_ids.dim() != 2:
        raise RuntimeError(f"grpo_fast: token_ids have {token_ids.dim()} dimensions; expected [B, T]")
    if logits.dtype not in _LOGITS:
        raise RuntimeError(f"grpo_fast: logits are {logits.dtype}; expected float32, bfloat16 or float16")
    sequences, tokens = token_ids.shape
    if logits.shape[0] != sequences or logits.shape[1] not in (tokens, tokens + 1):
        raise RuntimeError(
            f"grpo_fast: logits are {list(logits.shape)} and token_ids {[sequences, tokens]}; expected logits [B, T, V] or [B, T + 1, V] "
            "with token_ids [B, T]"
        )
    _unit_stride("logits", logits)
    check_per_token("token_ids", token_ids, logits, token_ids, torch.int64)
    check_per_token("mask", mask, logits, token_ids, torch.bool)


def check_per_token(name: str, x: Tensor | None, logits: Tensor, token_ids: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """Raise RuntimeError unless x is None, or of this dtype, on the device of the logits, and broadcasts to the shape of the ids."""
    if x is None:
        return
    if x.dtype != dtype:
        raise RuntimeError(f"grpo_fast: {name} has the wrong dtype, {x.dtype}; expected {str(dtype).removeprefix('torch.')}")
    _device(name, x, logits)
    if x.dim() and (x.dim() != 2 or any(size not in (1, of) for size, of in zip(x.shape, token_ids.shape, strict=True))):
        raise RuntimeError(
            f"grpo_fast: {name} has the wrong shape, {list(x.shape)}; expected [B, T] = {list(token_ids.shape)}, or one that "
            "broadcasts to it"
        )


def check_statistics(logits: Tensor, token_ids: Tensor, **statistics: Tensor) -> None:
    """Raise RuntimeError unless each is a contiguous float32 [B, T], as token_logprobs_fwd returns them."""
    for name, x in statistics.items():
        check_per_token(name, x, logits, token_ids)
        if x.shape != token_ids.shape or not x.is_contiguous():
            raise RuntimeError(
                f"grpo_fast: {name} has the wrong layout, {list(x.shape)} with strides {x.stride()}; "
                f"expected {list(token_ids.shape)}, contiguous"
            )


def check_gradient(gradient: Tensor, logits: Tensor) -> None:
    """Raise RuntimeError unless the gradient is like the logits and contiguous over V."""
    if gradient.shape != logits.shape or gradient.dtype != logits.dtype:
        raise RuntimeError(
            f"grpo_fast: gradient is {gradient.dtype} {list(gradient.shape)}; expected it like the logits, {logits.dtype} "
            f"{list(logits.shape)}"
        )
    _device("gradient", gradient, logits)
    _unit_stride("gradient", gradient)


def check_scaled(x: Tensor, factor: Tensor) -> None:
    """Raise RuntimeError unless x is contiguous, or [B, T, V] contiguous over V, and factor one number on its device."""
    if not x.is_contiguous() and not (x.dim() == 3 and x.stride(2) == 1):
        raise RuntimeError(f"grpo_fast: x has strides {x.stride()}; expected it contiguous, or [B, T, V] contiguous over V")
    if x.dtype not in _LOGITS:
        raise RuntimeError(f"grpo_fast: x is {x.dtype}; expected float32, bfloat16 or float16")
    if factor.numel() != 1 or not factor.is_floating_point():
        raise RuntimeError(f"grpo_fast: factor is {factor.dtype} {list(factor.shape)}; expected one floating-point number")
    _device("factor", factor, x)


def check_matrix(
    name: str,
    x: Tensor,
    like: Tensor,
    shape: tuple[int | None, int | None] = (None, None),
    *,
    dtype: torch.dtype | None = None,
    contiguous: bool = False,
) -> None:
    """Raise RuntimeError unless x is a matrix on the device of ``like``, contiguous along a row, or as a whole.

    Args:
        shape: of x; None stands for any size.
        dtype: of x; None: any type that logits have.
    """
    if x.dtype not in (_LOGITS if dtype is None else (dtype,)):
        expected = "float32, bfloat16 or float16" if dtype is None else str(dtype).removeprefix("torch.")
        raise RuntimeError(f"grpo_fast: {name} has the wrong dtype, {x.dtype}; expected {expected}")
    if x.dim() != 2 or any(of not in (None, size) for size, of in zip(x.shape, shape, strict=True)):
        rows, columns = ("any" if size is None else size for size in shape)
        raise RuntimeError(f"grpo_fast: {name} has the wrong shape, {list(x.shape)}; expected [{rows}, {columns}]")
    _device(name, x, like)
    _unit_stride(name, x)
    if contiguous and not x.is_contiguous():
        raise RuntimeError(f"grpo_fast: {name} has strides {x.stride()}; expected it contiguous")


def _device(name: str, x: Tensor, like: Tensor) -> None:
    if x.device != like.device:
        raise RuntimeError(f"grpo_fast: {name} is on {x.device}; expected {like.device}, the device of the other tensors")


def _unit_stride(name: str, x: Tensor) -> None:
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        raise RuntimeError(f"grpo_fast: {name} has strides {x.stride()}; expected it contiguous along the last dimension")
