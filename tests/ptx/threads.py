"""The threads that run together, their registers, and how an instruction reads and writes operands."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .faults import UnsupportedError
from .memory import GlobalMemory, SharedMemory
from .parser import Entry, Operand
from .values import BYTES, NUMPY, UNSIGNED, Array, Selection

Reader = Callable[[Selection], Array]
Writer = Callable[[Selection, Array], None]
WARP = 32
LEAST_BITS = 22  # an approximate result is off by up to 2^-22 of it: 2 units in the last place


@dataclass(frozen=True)
class Grid:
    """How a kernel is launched, in one dimension."""

    blocks: int
    threads: int  # per block
    cluster: int = 1  # blocks per cluster


class Threads:
    """All threads of consecutive clusters of a launch. Registers that were not written are 0xff... ."""

    def __init__(
        self, entry: Entry, grid: Grid, first_block: int, blocks: int, memory: GlobalMemory, parameters: bytes, shared_bytes: int,
        random: np.random.Generator, error: float,
    ) -> None:  # fmt: skip
        self.entry, self.grid, self.memory, self.random, self.error = entry, grid, memory, random, error
        self.count = blocks * grid.threads
        self.everyone = np.arange(self.count)
        self.block = self.everyone // grid.threads  # among those that run together
        self.index = self.everyone % grid.threads
        self.lane = self.index % WARP
        self.warp = self.block * (-(-grid.threads // WARP)) + self.index // WARP
        self.cluster = self.block // grid.cluster
        self.first_of_cluster = self.cluster * grid.cluster
        self.shared = SharedMemory(blocks, entry.shared_bytes + shared_bytes)
        self.parameters = np.frombuffer(parameters.ljust(entry.parameter_bytes, b"\0"), np.uint8)
        self.stack: dict[str, Array] = {}
        self.special = {
            "%tid.x": self.index,
            "%ntid.x": np.full(self.count, grid.threads),
            "%ctaid.x": first_block + self.block,
            "%nctaid.x": np.full(self.count, grid.blocks),
            "%laneid": self.lane,
            "%cluster_ctarank": self.block - self.first_of_cluster,
            "%cluster_nctarank": np.full(self.count, grid.cluster),
            "%cluster_ctaid.x": self.block - self.first_of_cluster,
            "%cluster_nctaid.x": np.full(self.count, grid.cluster),
            "%clusterid.x": (first_block + self.block) // grid.cluster,
            "%nclusterid.x": np.full(self.count, grid.blocks // grid.cluster),
        }
        for axis in "yz":
            self.special |= {f"%tid.{axis}": np.zeros(self.count, np.int64), f"%ctaid.{axis}": np.zeros(self.count, np.int64)}
            self.special |= {f"%ntid.{axis}": np.ones(self.count, np.int64), f"%nctaid.{axis}": np.ones(self.count, np.int64)}

    def indices(self, selection: Selection) -> Array:
        """The selected threads."""
        return self.everyone[selection] if isinstance(selection, slice) else selection

    def register(self, name: str) -> Array:
        """The values of a register in all threads, as unsigned integers or booleans."""
        if name not in self.stack:
            if name not in self.entry.registers:
                raise UnsupportedError(f"register '{name}'")
            kind = self.entry.registers[name]
            poison = False if kind == "pred" else np.iinfo(UNSIGNED[BYTES[kind]]).max
            self.stack[name] = np.full(self.count, poison, np.bool_ if kind == "pred" else UNSIGNED[BYTES[kind]])
        return self.stack[name]

    def reader(self, operand: Operand, kind: str) -> Reader:
        """A function that returns an operand of the selected threads, as values of a type of PTX; numbers have no dimension."""
        if not isinstance(operand, str):
            raise UnsupportedError(f"operand {operand} where a value of type {kind} is expected")
        dtype = np.dtype(NUMPY[kind])
        if operand.startswith("!"):
            inner = self.reader(operand[1:], kind)
            return lambda selection: ~inner(selection)
        if operand in self.special:
            values = self.special[operand].astype(dtype)
            return lambda selection: values[selection]
        if operand in self.entry.registers:
            register = self.register(operand)
            if register.dtype == np.bool_ or register.dtype.itemsize == dtype.itemsize:
                values = register if register.dtype == np.bool_ else register.view(dtype)
                return lambda selection: values[selection]
            raw = UNSIGNED[dtype.itemsize]
            return lambda selection: register[selection].astype(raw).view(dtype)
        value = np.asarray(self.number(operand, kind))
        return lambda selection: value

    def number(self, text: str, kind: str) -> Array:
        """A literal, or the address of a shared variable or of a parameter."""
        dtype = np.dtype(NUMPY[kind])
        if kind == "pred":
            return np.bool_(int(text))  # type: ignore[return-value]
        if found := re.fullmatch(r"0[fF]([0-9A-Fa-f]{8})", text):
            single = np.array(int(found[1], 16), np.uint32).view(np.float32)
            return single.view(dtype) if dtype.itemsize == 4 else single.astype(dtype)
        if found := re.fullmatch(r"0[dD]([0-9A-Fa-f]{16})", text):
            return np.array(int(found[1], 16), np.uint64).view(dtype)
        bits = 8 * dtype.itemsize
        if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", text):
            value = int(text.rstrip("U"), 0)
        elif text in self.entry.shared:
            value = self.entry.shared[text]
        elif text in self.entry.parameters:
            value = self.entry.parameters[text]
        else:
            raise UnsupportedError(f"operand '{text}'")
        if dtype.kind == "f" and not text.startswith("0x"):
            raise UnsupportedError(f"operand '{text}' of type {kind}")
        return np.array(value & ((1 << bits) - 1), UNSIGNED[dtype.itemsize]).view(dtype)

    def writer(self, operand: Operand, kind: str) -> Writer:
        """A function that stores values of a type of PTX in a register of the selected threads, extended to its width."""
        if not isinstance(operand, str):
            raise UnsupportedError(f"operand {operand} where a register of type {kind} is expected")
        if operand == "_":
            return lambda selection, values: None
        register, dtype = self.register(operand), np.dtype(NUMPY[kind])
        if register.dtype == np.bool_ or register.dtype.itemsize == dtype.itemsize:
            target = register if register.dtype == np.bool_ else register.view(dtype)
        else:
            wide = UNSIGNED[register.dtype.itemsize]
            target = register.view(np.dtype(f"i{register.dtype.itemsize}")) if dtype.kind == "i" else register.view(wide)
            if dtype.kind == "f":
                raise UnsupportedError(f"register '{operand}' for a value of type {kind}")

        def write(selection: Selection, values: Array) -> None:
            target[selection] = values

        return write

    def approximate(self, exact: Array) -> Array:
        """float32 with the error of an approximate instruction: up to `error` times 2^-22 of the result."""
        if self.error:
            exact = exact * (1 + self.error * 2.0**-LEAST_BITS * self.random.uniform(-1, 1, np.shape(exact)))
        return exact.astype(np.float32)
