"""Memory shared by the processes of a run: the batch is made once."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

__all__ = ["ALIGNMENT", "SharedMemory", "aligned_bytes"]

ALIGNMENT = 4096


class SharedMemory:
    """A mapping of ``size`` bytes behind a file descriptor that child processes inherit. Tensors are allocated in it one after another."""

    def __init__(self, descriptor: int, size: int):
        self.descriptor, self.size = descriptor, size
        self._memory = mmap.mmap(descriptor, size)
        self.position = 0

    @classmethod
    def create(cls, size: int) -> SharedMemory:
        # Anonymous memory where the system has it: /dev/shm is 64 MB in many containers, and a file on disk would be written back.
        if hasattr(os, "memfd_create"):
            descriptor = os.memfd_create("grpo_fast_bench")
        else:
            with tempfile.TemporaryFile() as file:
                descriptor = os.dup(file.fileno())
        os.ftruncate(descriptor, size)
        return cls(descriptor, size)

    def rewind(self) -> None:
        """Allocate from the start again. Parent and child must allocate the same tensors in the same order."""
        self.position = 0

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The next tensor, with whatever values the memory holds."""
        tensor = torch.frombuffer(self._memory, dtype=dtype, count=prod(shape), offset=self.position).view(*shape)
        self.position += aligned_bytes(shape, dtype)
        return tensor


def aligned_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    """The bytes that a tensor occupies in shared memory, padding included."""
    return -(-prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
