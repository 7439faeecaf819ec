"""CPU tensors in the memory of the machine."""

from __future__ import annotations

import ctypes

import numpy as np
from torch import Tensor

from .memory import GlobalMemory
from .values import Array


class TensorMemory:
    """The memory of tensors, each storage once and at an address of the same residue modulo 256."""

    def __init__(self) -> None:
        self.memory = GlobalMemory(0)
        self.addresses: dict[int, int] = {}
        self.raw: dict[int, Array] = {}

    def address(self, tensor: Tensor | None, name: str = "") -> int:
        """The address of a tensor's first element; 0 for None."""
        if tensor is None:
            return 0
        storage = tensor.untyped_storage()
        base = storage.data_ptr()
        if base not in self.addresses:
            self.raw[base] = bytes_at(base, storage.nbytes())
            self.addresses[base] = self.memory.allocate(self.raw[base], name, residue=base % 256)
        return self.addresses[base] + tensor.data_ptr() - base

    def write_back(self) -> None:
        """Copy what a kernel has written to the tensors."""
        for base, address in self.addresses.items():
            self.raw[base][:] = self.memory.read(address, self.raw[base])


def bytes_at(address: int, size: int) -> Array:
    """The memory of this process, without a copy."""
    if size == 0:
        return np.zeros(0, np.uint8)
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
