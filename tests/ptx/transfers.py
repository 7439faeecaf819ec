"""What happens while threads go on: mbarriers, bulk copies between global and shared memory, and stores to another block.

A transfer waits in a list until the machine delivers it, in a random order. The bytes that it will write are NaN until then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .accesses import address_of
from .faults import FaultError
from .instructions import Action, builds, refused
from .memory import CLUSTER_STEP
from .parser import Instruction
from .threads import Threads
from .values import Array, Selection


@dataclass
class Barrier:
    """An mbarrier: a phase ends when as many threads have arrived, and as many bytes, as it expects."""

    count: int
    pending: int
    bytes: int = 0
    phase: int = 0

    def arrive(self, expected_bytes: int = 0) -> None:
        if self.pending == 0:
            raise FaultError("one arrival more than the mbarrier expects in a phase")
        self.bytes += expected_bytes
        self.pending -= 1
        self._complete()

    def receive(self, size: int) -> None:
        self.bytes -= size
        self._complete()

    def _complete(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.pending = self.count
            self.phase += 1


@dataclass(eq=False)
class Transfer:
    """A copy on its way. steps: what remains to be done, one step per delivery."""

    steps: list[Callable[[], None]]


class Transfers:
    """All that is on its way, and the mbarriers by their place in shared memory."""

    def __init__(self, threads: Threads) -> None:
        self.threads = threads
        self.barriers: dict[int, Barrier] = {}
        self.pending: list[Transfer] = []
        self.open: dict[int, list[Transfer]] = {}  # bulk stores of a thread since its last commit
        self.groups: dict[int, list[list[Transfer]]] = {}  # committed, oldest first

    def deliver(self) -> None:
        """Do one step of a transfer chosen at random."""
        index = int(self.threads.random.integers(len(self.pending)))
        transfer = self.pending[index]
        transfer.steps.pop(0)()
        if not transfer.steps:
            self.pending.pop(index)

    def check_ended(self) -> None:
        """Raise a fault if all threads have ended and shared memory is still to be read or written; writes to global memory may be late."""
        stores = {id(transfer) for groups in self.groups.values() for group in groups for transfer in group}
        if any(id(transfer) not in stores or len(transfer.steps) > 1 for transfer in self.pending):
            raise FaultError("the blocks have ended before transfers from or to their shared memory were done")

    def barrier(self, place: int) -> Barrier:
        if place not in self.barriers:
            raise FaultError("no mbarrier was initialized at this place")
        return self.barriers[place]

    def ready(self, place: int, parity: int) -> bool:
        """Whether the phase of this parity is over."""
        return self.barrier(place).phase % 2 != parity

    def unfinished_groups(self, thread: int, *, only_reading: bool) -> int:
        """Groups of bulk stores whose source is not yet read, or whose target is not yet written."""
        steps_left = 1 if only_reading else 0
        groups = self.groups.get(thread, [])
        return sum(any(len(transfer.steps) > steps_left for transfer in group) for group in groups)

    def load(self, place: int, address: int, size: int, barrier: int) -> None:
        """Copy from global to shared memory, and count the bytes at a barrier."""
        source, shared, memory = self._global(address, size), self.threads.shared, self.threads.memory
        shared.arrived(place, np.full(size, 0xFF, np.uint8))

        def arrive() -> None:
            shared.arrived(place, memory.bytes[source : source + size])
            self.barrier(barrier).receive(size)

        self.pending.append(Transfer([arrive]))

    def store(self, thread: int, place: int, address: int, size: int) -> None:
        """Copy from shared to global memory: read, then written some time later."""
        target, shared, memory = self._global(address, size), self.threads.shared, self.threads.memory
        if shared.unfenced[place : place + size].any():
            raise FaultError("a bulk copy reads shared memory that a thread has stored without fence.proxy.async behind it")
        read: list[Array] = []

        def write() -> None:
            memory.bytes[target : target + size] = read[0]

        transfer = Transfer([lambda: read.append(shared.bytes[place : place + size].copy()), write])
        self.pending.append(transfer)
        self.open.setdefault(thread, []).append(transfer)

    def send(self, place: int, data: Array, barrier: int) -> None:
        """Store in the shared memory of another block, and count the bytes at a barrier there."""

        def arrive() -> None:
            self.threads.shared.arrived(place, data)
            self.barrier(barrier).receive(data.size)

        self.pending.append(Transfer([arrive]))

    def _global(self, address: int, size: int) -> int:
        if address % 16 or size % 16 or size <= 0:
            raise FaultError(f"misaligned: a bulk copy of {size} bytes at {address:#x}; expected multiples of 16")
        return int(self.threads.memory.places(np.array([address], np.int64), size)[0])


def places_of(threads: Threads, addresses: Array, size: int, alignment: int, selected: Array) -> Array:
    """Where `size[i]` bytes of shared memory are."""
    if (addresses % alignment != 0).any():
        raise FaultError(f"misaligned: {int(addresses[addresses % alignment != 0][0]):#x}; expected a multiple of {alignment}")
    block, first = threads.block[selected], threads.first_of_cluster[selected]
    return threads.shared.places(addresses, size, block, first, threads.grid.cluster)


def mbarrier(transfers: Transfers, instruction: Instruction) -> Action:
    """mbarrier.init and mbarrier.arrive; the machine executes mbarrier.try_wait."""
    threads = transfers.threads
    if instruction.modifiers[0] == "init":
        address, count = address_of(threads, instruction.operands[0], instruction), threads.reader(instruction.operands[1], "u32")

        def initialize(selection: Selection) -> None:
            selected, addresses = threads.indices(selection), address(selection)
            counts = np.broadcast_to(count(selection), selected.shape)
            for place, expected in zip(places_of(threads, addresses, 8, 8, selected).tolist(), counts.tolist(), strict=True):
                transfers.barriers[place] = Barrier(expected, expected)

        return initialize
    if instruction.modifiers[0] != "arrive" or instruction.operands[0] != "_":
        raise refused(instruction)
    address = address_of(threads, instruction.operands[1], instruction)
    expects = "expect_tx" in instruction.modifiers
    number = threads.reader(instruction.operands[2], "u32") if len(instruction.operands) > 2 else None
    if number is not None and not expects:
        raise refused(instruction)

    def arrive(selection: Selection) -> None:
        selected = threads.indices(selection)
        sizes = np.broadcast_to(number(selection), selected.shape).tolist() if number else [0] * selected.size
        for place, size in zip(places_of(threads, address(selection), 8, 8, selected).tolist(), sizes, strict=True):
            transfers.barrier(place).arrive(size)

    return arrive


def bulk(transfers: Transfers, instruction: Instruction) -> Action:
    """cp.async.bulk and its groups; the machine executes wait_group."""
    threads, form = transfers.threads, instruction.modifiers
    if form[:3] == ("async", "bulk", "commit_group"):

        def commit(selection: Selection) -> None:
            for thread in threads.indices(selection).tolist():
                transfers.groups.setdefault(thread, []).append(transfers.open.pop(thread, []))

        return commit
    loads = form == ("async", "bulk", "shared::cluster", "global", "mbarrier::complete_tx::bytes")
    if not loads and form != ("async", "bulk", "global", "shared::cta", "bulk_group"):
        raise refused(instruction)
    to, source = (address_of(threads, operand, instruction) for operand in instruction.operands[:2])
    size = threads.reader(instruction.operands[2], "u32")
    barrier = address_of(threads, instruction.operands[3], instruction) if loads else None

    def copy(selection: Selection) -> None:
        selected, first, second = threads.indices(selection), to(selection), source(selection)
        sizes = np.broadcast_to(size(selection), selected.shape).tolist()
        arrivals = barrier(selection) if barrier else first
        for index, thread in enumerate(selected.tolist()):
            here = selected[index : index + 1]
            shared = (first if loads else second)[index : index + 1]
            place = int(places_of(threads, shared, sizes[index], 16, here)[0])
            if loads:
                at = int(places_of(threads, arrivals[index : index + 1], 8, 8, here)[0])
                transfers.load(place, int(second[index]), sizes[index], at)
            else:
                transfers.store(thread, place, int(first[index]), sizes[index])

    return copy


def remote_store(transfers: Transfers, instruction: Instruction) -> Action:
    """st.async: both addresses are those of one block of the cluster."""
    threads, form = transfers.threads, instruction.modifiers
    values = instruction.operands[1]
    if form[:4] != ("async", "weak", "shared::cluster", "mbarrier::complete_tx::bytes") or not isinstance(values, tuple):
        raise refused(instruction)
    to, barrier = (address_of(threads, instruction.operands[index], instruction) for index in (0, 2))
    read = [threads.reader(name, instruction.type) for name in values]

    def send(selection: Selection) -> None:
        selected, addresses, arrivals = threads.indices(selection), to(selection), barrier(selection)
        if (addresses < CLUSTER_STEP).any() or (arrivals // CLUSTER_STEP != addresses // CLUSTER_STEP).any():
            raise FaultError("st.async to a place in one block, counted in another")
        data = np.stack([np.broadcast_to(each(selection), selected.shape) for each in read], axis=1)
        size = data[0].nbytes
        places, at = places_of(threads, addresses, size, size, selected), places_of(threads, arrivals, 8, 8, selected)
        for index in range(selected.size):
            transfers.send(int(places[index]), data[index].copy().view(np.uint8), int(at[index]))

    return send


@builds("fence", "membar")
def fence(threads: Threads, instruction: Instruction) -> Action:
    """Of all fences, that between stores and the copy engine has an effect here."""
    if instruction.modifiers[:2] == ("proxy", "async"):
        return lambda selection: threads.shared.fenced(threads.indices(selection))
    return lambda selection: None
