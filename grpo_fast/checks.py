"""Argument checks: every error names the argument, what it was, what was expected and the cure, before anything is written."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

LARGEST = sys.float_info.max
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_debug = os.environ.get("GRPO_FAST_CHECK", "0") not in ("", "0")


@contextmanager
def debug_checks(enabled: bool = True) -> Iterator[None]:
    """Make every value check synchronous and exact on every device, as the environment variable GRPO_FAST_CHECK=1 does.

    On the CPU value checks always run. On a GPU reading a value stalls the stream, so there they run only inside this context.

    Example:
        >>> with debug_checks():
        ...     out = grpo_loss(logits, token_ids, advantages)
    """
    global _debug
    before, _debug = _debug, enabled
    try:
        yield
    finally:
        _debug = before


def value_checks_wanted(tensor: Tensor) -> bool:
    """Whether checks that read this tensor's values may run: they would stall a GPU, and cannot be traced by torch.compile."""
    return not torch.compiler.is_compiling() and (_debug or tensor.device.type == "cpu")


def tensor(name: str, x: object, *, like: Tensor, like_name: str = "logits", floating: bool = True) -> None:
    """x is a dense tensor on the device of ``like``, of one of the types FLOATING unless said otherwise."""
    if not isinstance(x, Tensor):
        raise TypeError(
            f"{name} is a {type(x).__name__}; expected a torch.Tensor. Wrap it: torch.as_tensor({name}, device={like_name}.device)."
        )
    if floating and x.dtype not in FLOATING:
        raise TypeError(f"{name} has dtype {x.dtype}; expected float32, bfloat16, float16 or float64. Convert it: {name}.float().")
    if x.layout != torch.strided or x.is_nested:
        layout = "nested" if x.is_nested else str(x.layout)
        raise TypeError(f"{name} has the layout {layout}; expected a dense tensor. Convert it: {name}.to_dense(), or pad.")
    if x.device != like.device:
        there = f"{like_name} {'are' if like_name == 'logits' else 'is'} on {like.device}"
        raise ValueError(f"{name} is on {x.device}, {there}; expected one device. Move it: {name}.to({like_name}.device).")


def shape(name: str, x: Tensor, *allowed: tuple[tuple[int, ...], str], source: str = "logits") -> None:
    """x has one of the allowed shapes, each given with its name in letters; their sizes follow from ``source`` and token_ids."""
    if all(tuple(x.shape) != sizes for sizes, _ in allowed):
        expected = " or ".join(f"{letters} = {list(sizes)}" for sizes, letters in allowed)
        raise ValueError(f"{name} has shape {list(x.shape)}; expected {expected} (sizes follow from {source} and token_ids).")


def positive(name: str, x: object, cure: str) -> float:
    """x is a finite number above 0."""
    if isinstance(x, bool) or not isinstance(x, (int, float, torch.SymFloat)):
        raise TypeError(f"{name} is {x!r} ({type(x).__name__}); expected a number > 0. {cure}")
    if not 0 < x <= LARGEST:  # False for NaN too
        raise ValueError(f"{name} is {x!r}; expected a finite number > 0. {cure}")
    return x  # type: ignore[return-value]


def first_index(bad: Tensor) -> list[int]:
    """Where the first True stands, for error messages."""
    return bad.nonzero()[0].tolist()
