"""A gradient of 16 bits in the memory of float32 logits: the first half of each row."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["CONVERTED_PARTS", "converted_width", "first_half", "rounded_"]

# Where a matrix is converted, a part of its columns is at a time: 1 / CONVERTED_PARTS of them, but at least MIN_CONVERTED.
CONVERTED_PARTS, MIN_CONVERTED = 32, 256


def first_half(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a view of the first half of each row: as many numbers of a 16-bit dtype as the row has of float32."""
    return logits.view(dtype)[..., : logits.shape[-1]]


def rounded_(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """Round a float32 gradient, [..., V], to a 16-bit dtype within its own memory, and return it: the first half of each row.

    A part of the columns is rounded at a time, which moves it to memory that only columns before it, or itself, occupied.
    """
    out, width = first_half(gradient, dtype), converted_width(gradient)
    for part, into in zip(gradient.split(width, -1), out.split(width, -1), strict=True):
        into.copy_(part.to(dtype))
    return out


def converted_width(logits: Tensor) -> int:
    """Return the number of columns of [..., V] that are converted at a time."""
    return max(logits.shape[-1] // CONVERTED_PARTS, MIN_CONVERTED)
