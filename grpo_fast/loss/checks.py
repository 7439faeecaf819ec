"""Argument checks: every error names the argument, what it was, what was expected and the fix, before anything is written."""

from __future__ import annotations

import numbers
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

LARGEST = sys.float_info.max
REAL = (int, float, torch.SymFloat, numbers.Real)  # the first are the usual ones, and looked at quickly; the last are NumPy's too
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_debug = os.environ.get("GRPO_FAST_CHECK", "0") not in ("", "0")


@contextmanager
def debug_checks(enabled: bool = True) -> Iterator[None]:
    """Make every value check synchronous and exact on every device, as the environment variable GRPO_FAST_CHECK=1 does.

    On the CPU value checks always run. On a GPU reading a value stalls the stream, so there they run only inside this context.

    Args:
        enabled: False turns them off again, where the environment variable has turned them on.

    Returns:
        A context manager, for the whole process and not for one thread.

    Raises:
        Nothing by itself. What is computed inside raises a ValueError for a bad value, as it does on the CPU.

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


def tensor(name: str, x: object, *, like: Tensor | None, like_name: str = "logits", floating: bool = True) -> None:
    """x is a dense tensor on the device of ``like`` (None: x is what the others follow), of a type of FLOATING unless said otherwise."""
    if not isinstance(x, Tensor):
        device = "" if like is None else f", device={like_name}.device"
        raise TypeError(f"{name} is a {type(x).__name__}; expected a torch.Tensor. Wrap it: torch.as_tensor({name}{device}).")
    if floating and x.dtype not in FLOATING:
        raise TypeError(f"{name} has dtype {x.dtype}; expected float32, bfloat16, float16 or float64. Convert it: {name}.float().")
    if x.layout != torch.strided or x.is_nested:
        layout = "nested" if x.is_nested else str(x.layout)
        raise TypeError(f"{name} has the layout {layout}; expected a dense tensor. Convert it: {name}.to_dense(), or pad.")
    if like is not None and x.device != like.device:
        there = f"{like_name} {'are' if like_name == 'logits' else 'is'} on {like.device}"
        raise ValueError(f"{name} is on {x.device}, {there}; expected one device. Move it: {name}.to({like_name}.device).")


def shape(name: str, x: Tensor, *allowed: tuple[tuple[int, ...], str], source: str) -> None:
    """x has one of the allowed shapes, each given with its name in letters; their sizes follow from ``source``."""
    if all(tuple(x.shape) != sizes for sizes, _ in allowed):
        expected = " or ".join(f"{letters} = {list(sizes)}" for sizes, letters in allowed)
        raise ValueError(f"{name} has shape {list(x.shape)}; expected {expected} (sizes follow from {source}).")


def positive(name: str, x: object, fix: str) -> float:
    """x as a finite number above 0."""
    value = number(name, x, "a number > 0", fix)
    if not 0 < value <= LARGEST:  # False for NaN too
        raise ValueError(f"{name} is {x!r}; expected a finite number > 0. {fix}")
    return value


def not_negative(name: str, x: object, fix: str, *, expected: str = "a number >= 0") -> float:
    """x as a finite number of at least 0."""
    value = number(name, x, expected, fix)
    if not 0 <= value <= LARGEST:
        raise ValueError(f"{name} is {x!r}; expected a finite number >= 0. {fix}")
    return value


def finite(name: str, x: object, fix: str) -> float:
    """x as a finite number."""
    value = number(name, x, "a number", fix)
    if not abs(value) <= LARGEST:
        raise ValueError(f"{name} is {x!r}; expected a finite number. {fix}")
    return value


def number(name: str, x: object, expected: str, fix: str) -> float:
    """x as a Python number; NumPy's are numbers too, a bool is none."""
    if isinstance(x, bool) or not isinstance(x, REAL):
        raise TypeError(f"{name} is {x!r} ({type(x).__name__}); expected {expected}. {fix}")
    return x if isinstance(x, (int, float, torch.SymFloat)) else float(x)  # type: ignore[return-value]


def first_index(bad: Tensor) -> list[int]:
    """Where the first True stands, for error messages."""
    return bad.nonzero()[0].tolist()
