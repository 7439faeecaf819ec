"""The memories of a GPU: global memory in allocations, and shared memory of the blocks. Faults: out of bounds, and misaligned."""

from __future__ import annotations

import bisect

import numpy as np

from .faults import FaultError
from .values import UNSIGNED, Array

GLOBAL_BASE = 0x7F00_0000_0000
SHARED_WINDOW = 0x5000_0000_0000  # where generic addresses mean shared memory
CLUSTER_STEP = 1 << 24  # shared::cluster addresses: (rank of the block + 1) * CLUSTER_STEP + offset
GAP = 256  # bytes of no allocation between two


class GlobalMemory:
    """Allocations at chosen addresses, in one buffer of bytes. Memory that was not written is 0xff: a NaN."""

    def __init__(self, size: int) -> None:
        self.bytes = np.full(size + GAP, 0xFF, np.uint8)
        self.top = GAP
        self.starts: list[int] = []  # addresses, sorted
        self.ends: list[int] = []
        self.shifts: list[int] = []  # place in the buffer minus address
        self.names: list[str] = []

    def allocate(self, data: Array, name: str = "", *, residue: int = 0, address: int | None = None) -> int:
        """Copy data to new memory, behind the last allocation or at `address`. Returns the address, `residue` modulo 256."""
        raw = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        place = -(-self.top // 256) * 256 + (residue if address is None else address % 256)
        if place + raw.size + GAP > self.bytes.size:
            self.bytes = np.concatenate([self.bytes, np.full(place + raw.size + GAP, 0xFF, np.uint8)])
        self.bytes[place : place + raw.size] = raw
        self.top = place + raw.size + GAP
        address = GLOBAL_BASE + place if address is None else address
        at = bisect.bisect(self.starts, address)
        if (at > 0 and self.ends[at - 1] > address) or (at < len(self.starts) and address + raw.size > self.starts[at]):
            raise ValueError(f"address is {address:#x} for {raw.size} bytes; expected a place that no other allocation has")
        self.starts.insert(at, address)
        self.ends.insert(at, address + raw.size)
        self.shifts.insert(at, place - address)
        self.names.insert(at, name)
        return address

    def read(self, address: int, like: Array) -> Array:
        """A copy of the memory at an address, with the type and shape of `like`."""
        place = address + self.shifts[bisect.bisect(self.starts, address) - 1]
        return self.bytes[place : place + like.nbytes].copy().view(like.dtype).reshape(like.shape)

    def places(self, addresses: Array, size: int) -> Array:
        """Where in the buffer `size` bytes at each address are."""
        low, high = int(addresses.min()), int(addresses.max()) + size
        at = bisect.bisect(self.starts, low) - 1
        if at >= 0 and high <= self.ends[at]:
            return addresses + self.shifts[at]
        index = np.searchsorted(np.asarray(self.starts, np.int64), addresses, "right") - 1
        inside = (index >= 0) & (addresses + size <= np.asarray([*self.ends, 0], np.int64)[index])
        if not inside.all():
            raise FaultError(f"out of bounds: {self._described(int(addresses[~inside][0]), size)}")
        return addresses + np.asarray(self.shifts, np.int64)[index]

    def _described(self, address: int, size: int) -> str:
        at = bisect.bisect(self.starts, address) - 1
        if at < 0:
            return f"{size} bytes at {address:#x}, below all allocations"
        name = self.names[at] or "an allocation"
        return f"{size} bytes at {address - self.starts[at]} of {name}, which has {self.ends[at] - self.starts[at]} bytes"


class SharedMemory:
    """The shared memory of all blocks that run together, filled with 0xff.

    Which thread stored a byte is kept until that thread executes fence.proxy.async: the copy engine does not see the byte before.
    """

    def __init__(self, blocks: int, size: int) -> None:
        self.size, self.step = size, -(-size // 16) * 16
        self.bytes = np.full(blocks * self.step + 16, 0xFF, np.uint8)
        self.unfenced = np.zeros(blocks * self.step + 16, np.int32)  # the thread that stored a byte since its last fence, plus 1

    def places(self, addresses: Array, size: int, block: Array, first_of_cluster: Array, blocks_of_cluster: int) -> Array:
        """Where in the buffer `size` bytes at each address are. block: of each thread, among all that run together."""
        remote = addresses >= CLUSTER_STEP
        rank = addresses // CLUSTER_STEP - 1
        offset = np.where(remote, addresses % CLUSTER_STEP, addresses)
        wrong = (offset < 0) | (offset + size > self.size) | (remote & (rank >= blocks_of_cluster))
        if wrong.any():
            raise FaultError(f"out of bounds: {size} bytes at {int(offset[wrong][0])} of {self.size} bytes of shared memory")
        return np.where(remote, first_of_cluster + rank, block) * self.step + offset

    def stored(self, places: Array, size: int, threads: Array) -> None:
        """Note who stored bytes."""
        for byte in range(size):
            self.unfenced[places + byte] = threads + 1

    def fenced(self, threads: Array) -> None:
        """The copy engine sees what these threads have stored."""
        at = np.flatnonzero(self.unfenced)
        self.unfenced[at[np.isin(self.unfenced[at], threads + 1)]] = 0

    def arrived(self, place: int, data: Array) -> None:
        """Bytes from the copy engine, or from another block."""
        self.bytes[place : place + data.size] = data
        self.unfenced[place : place + data.size] = 0


def check_aligned(addresses: Array, size: int) -> None:
    """Raise a fault unless all addresses are multiples of size."""
    if (wrong := addresses % size != 0).any():
        raise FaultError(f"misaligned: {size} bytes at {int(addresses[wrong][0]):#x}")


def gather(buffer: Array, places: Array, size: int, count: int) -> list[Array]:
    """`count` values of `size` bytes from each place, which are multiples of size."""
    view = buffer[: buffer.size // size * size].view(UNSIGNED[size])
    return [view[places // size + index] for index in range(count)]


def scatter(buffer: Array, places: Array, values: list[Array]) -> None:
    """Store values at each place, which are multiples of their size. Of several threads at one place, the last one's remains."""
    size = values[0].dtype.itemsize
    view = buffer[: buffer.size // size * size].view(UNSIGNED[size])
    for index, value in enumerate(values):
        view[places // size + index] = value.view(UNSIGNED[size])
