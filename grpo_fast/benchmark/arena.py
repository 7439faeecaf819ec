"""Memory that the processes of a run share: the batch is made once, and one flush buffer does for all."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

__all__ = ["Arena"]

_ALIGNMENT = 4096


class Arena:
    """A mapping of ``size`` bytes behind a file descriptor that children inherit, handed out as tensors from its start."""

    def __init__(self, descriptor: int, size: int):
        self.descriptor, self.size = descriptor, size
        self._memory = mmap.mmap(descriptor, size)
        self._next = 0

    @classmethod
    def create(cls, size: int) -> Arena:
        # Anonymous memory where there is such a thing: /dev/shm is 64 MB in many containers, and a file on disk would be written back.
        if hasattr(os, "memfd_create"):
            descriptor = os.memfd_create("grpo_fast_bench")
        else:
            with tempfile.TemporaryFile() as file:
                descriptor = os.dup(file.fileno())
        os.ftruncate(descriptor, size)
        return cls(descriptor, size)

    def rewind(self, position: int = 0) -> None:
        """Hand out again from ``position``; both sides of a case take the same tensors in the same order."""
        self._next = position

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The next tensor."""
        count = prod(shape)
        offset = self._next
        self._next += arena_bytes(shape, dtype)
        return torch.frombuffer(self._memory, dtype=dtype, count=count, offset=offset).view(*shape)

    @property
    def position(self) -> int:
        return self._next


def arena_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    """What a tensor takes in an arena."""
    return -(-prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
