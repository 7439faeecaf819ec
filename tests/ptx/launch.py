"""A launch: blocks in groups of clusters, all of a group at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .machine import Machine
from .memory import GlobalMemory
from .parser import Entry
from .threads import Grid, Threads

AT_ONCE = 4096  # threads


@dataclass(frozen=True)
class Hardware:
    """What differs from run to run of a GPU, and between a GPU and exact arithmetic.

    ranks: 1 for warps that go on together; more for warps that run apart, in an order drawn from seed.
    error: of approximate instructions, in units of 2^-22 of the result.
    """

    seed: int = 0
    ranks: int = 1
    error: float = 1.0


EXACT = Hardware(error=0.0)


def launch(entry: Entry, grid: Grid, memory: GlobalMemory, parameters: bytes, shared_bytes: int = 0, hardware: Hardware = EXACT) -> int:
    """Run a kernel. Returns the number of instructions executed, each for many threads.

    Args:
        parameters: as the kernel's parameters lie in memory, zeros where bytes are missing at the end.
        shared_bytes: of shared memory, besides the kernel's own variables.

    Raises:
        FaultError: see machine.py.
        UnsupportedError: see machine.py.
    """
    if grid.blocks % grid.cluster:
        raise ValueError(f"grid has {grid.blocks} blocks; expected a multiple of the cluster's {grid.cluster}")
    random = np.random.default_rng(hardware.seed)
    at_once = max(1, AT_ONCE // (grid.threads * grid.cluster)) * grid.cluster
    executed = 0
    for first in range(0, grid.blocks, at_once):
        blocks = min(at_once, grid.blocks - first)
        threads = Threads(entry, grid, first, blocks, memory, parameters, shared_bytes, random, hardware.error)
        machine = Machine(threads, hardware.ranks)
        machine.run()
        executed += machine.executed
    return executed
