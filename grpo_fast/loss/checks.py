"""Checks of single arguments. Every error names the argument, its value, what was expected and the fix, before any tensor is written."""

from __future__ import annotations

import numbers
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd import forward_ad

LARGEST = sys.float_info.max
SMALLEST_FLOAT32, LARGEST_FLOAT32 = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
REAL = (int, float, torch.SymFloat, numbers.Real)  # the usual types first: isinstance with an abstract class (NumPy's numbers) is slow
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_debug = os.environ.get("GRPO_FAST_CHECK", "0") not in ("", "0")


@contextmanager
def debug_checks(enabled: bool = True) -> Iterator[None]:
    """Make every value check synchronous and exact on every device, as the environment variable GRPO_FAST_CHECK=1 does.

    On the CPU value checks always run. On a GPU reading a value synchronises the stream, so there they run only inside this context. A bad
    value then raises a ValueError, as it does on the CPU.

    Args:
        enabled: False turns the checks off again where the environment variable has turned them on.

    Returns:
        A context manager. The setting applies to all threads of the process.

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


def is_debugging() -> bool:
    """Return whether debug_checks or GRPO_FAST_CHECK asks for every check."""
    return _debug


def value_checks_wanted(tensor: Tensor) -> bool:
    """Return whether checks may read this tensor's values: they would synchronise a GPU, and torch.compile cannot trace them."""
    return not torch.compiler.is_compiling() and (_debug or tensor.device.type == "cpu")


def tensor(name: str, x: object, *, like: Tensor | None, like_name: str = "logits", floating: bool = True) -> None:
    """Check that x is a dense tensor on the device of ``like``, with a dtype of FLOATING if ``floating``.

    ``like=None`` skips the device: x is the argument whose device the others must have.

    Raises:
        TypeError: x is not a tensor, or has another dtype or layout.
        ValueError: x is on another device.
    """
    if not isinstance(x, Tensor):
        device = "" if like is None else f", device={like_name}.device"
        fix = f"Wrap it: torch.as_tensor({name}{device})."
        if isinstance(getattr(x, name, None), Tensor):  # the caller passed the named tuple and not its field
            fix = f"Pass its field .{name}."
        raise TypeError(f"{name} is a {type(x).__name__}; expected a torch.Tensor. {fix}")
    if floating and x.dtype not in FLOATING:
        raise TypeError(f"{name} has dtype {x.dtype}; expected float32, bfloat16, float16 or float64. Convert it: {name}.float().")
    if x.layout != torch.strided or x.is_nested:
        layout = "nested" if x.is_nested else str(x.layout)
        raise TypeError(f"{name} has the layout {layout}; expected a dense tensor. Convert it: {name}.to_dense(), or pad.")
    if like is not None and x.device != like.device:
        there = f"{like_name} {'are' if like_name == 'logits' else 'is'} on {like.device}"
        raise ValueError(f"{name} is on {x.device}, {there}; expected one device. Move it: {name}.to({like_name}.device).")


def has_forward_tangent(x: Tensor) -> bool:
    """Return whether x is a dual tensor of forward-mode differentiation, whose tangent this package's operators would drop silently."""
    return forward_ad._current_level >= 0 and not torch.compiler.is_compiling() and forward_ad.unpack_dual(x).tangent is not None


def shape(name: str, x: Tensor, *allowed: tuple[tuple[int, ...], str], source: str) -> None:
    """Check that x has one of the allowed shapes.

    Args:
        allowed: pairs of sizes and their name in letters, such as ``((2, 3), "[B, T]")``.
        source: names of the arguments that the sizes come from, for the message.

    Raises:
        ValueError: x has another shape.
    """
    if all(tuple(x.shape) != sizes for sizes, _ in allowed):
        expected = " or ".join(f"{letters} = {list(sizes)}" for sizes, letters in allowed)
        raise ValueError(f"{name} has shape {list(x.shape)}; expected {expected} (sizes follow from {source}).")


def positive(name: str, x: object, fix: str) -> float:
    """Return x as a finite number > 0, or raise TypeError or ValueError; ``fix`` ends the message."""
    value = number(name, x, "a number > 0", fix)
    if not 0 < value <= LARGEST:  # False for NaN too
        raise ValueError(f"{name} is {x!r}; expected a finite number > 0. {fix}")
    return value


def float32_positive(name: str, x: object, fix: str) -> float:
    """Return x as a number > 0 that float32, in which the kernels compute, can hold; arguments and errors as in ``positive``."""
    value = positive(name, x, fix)
    if not SMALLEST_FLOAT32 <= value <= LARGEST_FLOAT32:
        raise ValueError(f"{name} is {x!r}; expected a number from {SMALLEST_FLOAT32:.3g} to {LARGEST_FLOAT32:.3g} (float32). {fix}")
    return value


def not_negative(name: str, x: object, fix: str, *, expected: str = "a number >= 0") -> float:
    """Return x as a finite number >= 0; arguments and errors as in ``positive``."""
    value = number(name, x, expected, fix)
    if not 0 <= value <= LARGEST:
        raise ValueError(f"{name} is {x!r}; expected a finite number >= 0. {fix}")
    return value


def finite(name: str, x: object, fix: str, *, most: float = LARGEST) -> float:
    """Return x as a finite number of at most ``most`` in magnitude; arguments and errors as in ``positive``."""
    value = number(name, x, "a number", fix)
    if not abs(value) <= most:
        limit = "" if most == LARGEST else f" of at most {most:.3g} (float32)"
        raise ValueError(f"{name} is {x!r}; expected a finite number{limit}. {fix}")
    return value


def number(name: str, x: object, expected: str, fix: str) -> float:
    """Return x as a Python number, or raise TypeError. NumPy's numbers are accepted, bools are not."""
    if isinstance(x, bool) or not isinstance(x, REAL):
        raise TypeError(f"{name} is {x!r} ({type(x).__name__}); expected {expected}. {fix}")
    return x if isinstance(x, (int, float, torch.SymFloat)) else float(x)  # type: ignore[return-value]


def first_index(bad: Tensor) -> list[int]:
    """Return the index of the first True, for error messages."""
    return bad.nonzero()[0].tolist()
