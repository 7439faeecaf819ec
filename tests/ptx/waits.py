"""How threads wait for what is on its way: at mbarriers, and for their groups of bulk stores."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .accesses import address_of
from .instructions import refused
from .parser import Instruction
from .transfers import Transfers, places_of
from .values import Array

RUNS, DONE, AT_WARP, AT_BLOCK, AT_CLUSTER, AT_MBARRIER, AT_GROUP = range(7)  # the state of a thread: what it waits for

Control = Callable[[Array, int], bool]  # threads at an instruction; True if they all go on behind it


class Waits:
    """The threads that wait for transfers. at, state: of all threads, those of the machine."""

    def __init__(self, transfers: Transfers, at: Array, state: Array) -> None:
        self.transfers, self.at, self.state = transfers, at, state
        self.threads_at: dict[tuple[int, int], list[Array]] = {}  # the threads at an mbarrier, by its place and the parity
        self.groups: dict[int, tuple[int, bool]] = {}  # of a thread at bulk stores: how many may remain, and whether reading is enough

    def try_wait(self, instruction: Instruction) -> Control:
        """It may be false before the phase is over: then too a correct program waits again."""
        if "parity" not in instruction.modifiers:
            raise refused(instruction)
        threads = self.transfers.threads
        write = threads.writer(instruction.operands[0], "pred")
        address, parity = (
            address_of(threads, instruction.operands[1], instruction),
            threads.reader(instruction.operands[2], "u32"),
        )

        def wait(selected: Array, here: int) -> bool:
            places = places_of(threads, address(selected), 8, 8, selected)
            keys, inverse = np.unique(2 * places + parity(selected), return_inverse=True)
            found = [(int(key) // 2, int(key) % 2) for key in keys]
            over = np.array([self.transfers.ready(*each) for each in found])
            ready = over[inverse]
            write(selected, ready)
            if ready.all() or threads.random.random() < 0.2:
                return True
            self.at[selected] = np.where(ready, here + 1, here)
            self.state[selected[~ready]] = AT_MBARRIER
            for index in np.flatnonzero(~over).tolist():
                self.threads_at.setdefault(found[index], []).append(selected[inverse == index])
            return False

        return wait

    def wake_at_mbarriers(self) -> bool:
        over = [key for key in self.threads_at if self.transfers.ready(*key)]
        for key in over:
            self.state[np.concatenate(self.threads_at.pop(key))] = RUNS
        return bool(over)

    def wait_group(self, instruction: Instruction) -> Control:
        remaining, only_reading = int(str(instruction.operands[0])), "read" in instruction.modifiers

        def wait(selected: Array, here: int) -> bool:
            for thread in selected.tolist():
                self.groups[thread] = remaining, only_reading
            self.state[selected], self.at[selected] = AT_GROUP, here + 1
            self.wake_at_groups()
            return False

        return wait

    def wake_at_groups(self) -> bool:
        unfinished = self.transfers.unfinished_groups
        over = [thread for thread, (most, reading) in self.groups.items() if unfinished(thread, only_reading=reading) <= most]
        for thread in over:
            del self.groups[thread]
        self.state[over] = RUNS
        return bool(over)
