"""Which threads execute which instruction when.

Threads at one instruction execute it together, as one numpy operation. Each warp has a rank: warps of the lowest rank run until they wait
before others run. With one rank all warps go on together, which is fast; with more, drawn at random and drawn again at random, warps run
as far apart as barriers allow, so that a missing barrier shows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from . import accesses, arithmetic, conversions  # noqa: F401  they fill the table of the instructions
from . import transfers as asynchronous
from .faults import FaultError, UnsupportedError
from .instructions import BUILDERS, Action, refused
from .parser import Instruction
from .threads import WARP, Threads
from .transfers import Transfers
from .values import Array, Selection
from .waits import AT_BLOCK, AT_CLUSTER, AT_WARP, DONE, RUNS, Control, Waits

COLLECTIVE = ("shfl", "redux", "ldmatrix", "stmatrix")
LONGEST = 20_000_000  # instructions, before the machine gives up


@dataclass
class Step:
    """A prepared instruction: either an action, or a control function that sets where its threads go on."""

    instruction: Instruction
    predicate: Array | None = None
    action: Action | None = None
    control: Control | None = None


class Machine:
    """Runs all threads of some clusters of a launch to their end."""

    def __init__(self, threads: Threads, ranks: int = 1) -> None:
        self.threads, self.ranks = threads, ranks
        self.transfers = Transfers(threads)
        self.steps: list[Step | None] = [None] * len(threads.entry.code)
        self.at = np.zeros(threads.count, np.int64)  # the instruction that a thread executes next
        self.state = np.zeros(threads.count, np.int8)
        self.rank = np.zeros(threads.count, np.int64)
        self.barrier_id = np.zeros(threads.count, np.int64)
        self.arrivals = np.zeros(threads.count, np.int64)  # at the barrier of the cluster
        self.waits = Waits(self.transfers, self.at, self.state)
        self.executed = 0
        self._draw_ranks()

    def run(self) -> None:
        """Run to the end of all threads.

        Raises:
            FaultError: an access or a wait that a GPU would not survive, with the instruction.
            UnsupportedError: an instruction that the machine does not know.
        """
        with np.errstate(all="ignore"):
            while True:
                runs = self.state == RUNS
                if self.transfers.pending and (not runs.any() or self.threads.random.random() < 0.05):
                    if (self.state == DONE).all():
                        self.transfers.check_ended()
                    self.transfers.deliver()
                    self.waits.wake_at_mbarriers()
                    self.waits.wake_at_groups()
                elif runs.any():
                    self._run_some(runs)
                elif (self.state == DONE).all():
                    return
                elif not self._wake():
                    waiting = sorted({int(at) for at in self.at[self.state != DONE]})
                    raise FaultError("deadlock: threads wait at " + "; ".join(str(self.threads.entry.code[at]) for at in waiting))
                if self.executed > LONGEST:
                    raise FaultError(f"{self.executed} instructions executed, and no end")

    def _draw_ranks(self) -> None:
        if self.ranks > 1:
            warps = self.threads.random.integers(self.ranks, size=int(self.threads.warp[-1]) + 1)
            self.rank = warps[self.threads.warp]

    def _run_some(self, runs: Array) -> None:
        """Run the threads that are furthest behind among those of the lowest rank, until they wait or meet others of their rank."""
        if self.ranks > 1 and self.threads.random.random() < 0.1:
            self._draw_ranks()
        if self.ranks > 1:
            runs = runs & (self.rank == self.rank[runs].min())
        here = int(self.at[runs].min())
        chosen = runs & (self.at == here)
        selected = np.flatnonzero(chosen)
        others = self.at[runs & ~chosen]
        self._run_straight(selected, here, int(others.min()) if others.size else len(self.steps) + 1)

    def _run_straight(self, selected: Array, here: int, meeting: int) -> None:
        """Execute instructions for these threads up to the place where others wait for them."""
        selection: Selection = slice(None) if selected.size == self.threads.count else selected
        first = True
        while first or here != meeting:
            first = False
            if here == len(self.steps):
                self.state[selected] = DONE
                return
            step = self.steps[here] or self._prepare(here)
            self.executed += 1
            try:
                if step.action is not None:
                    self._act(step, step.action, selection, selected)
                elif step.control is not None and not step.control(selected, here):
                    return
            except FaultError as fault:
                raise FaultError(f"{fault} ({step.instruction})") from None
            except UnsupportedError as error:
                raise UnsupportedError(f"line {step.instruction.line}: {error}") from None
            here += 1
        self.at[selected] = here

    @staticmethod
    def _act(step: Step, action: Action, selection: Selection, selected: Array) -> None:
        if step.predicate is None:
            action(selection)
            return
        active = step.predicate[selection] != step.instruction.negated
        if active.all():
            action(selection)
        elif active.any():
            action(selected[active])

    def _prepare(self, index: int) -> Step:
        instruction = self.threads.entry.code[index]
        step = Step(instruction)
        try:
            step.predicate = self.threads.register(instruction.predicate) if instruction.predicate else None
            step.control = self._control(instruction)
            if step.control is None:
                step.action = self._action(instruction)
            elif instruction.predicate and instruction.name not in ("bra", "ret", "exit"):
                raise refused(instruction)
        except UnsupportedError as error:
            raise UnsupportedError(f"line {instruction.line}: {error}") from None
        self.steps[index] = step
        return step

    def _action(self, instruction: Instruction) -> Action:
        form = instruction.modifiers
        if instruction.name == "mbarrier":
            return asynchronous.mbarrier(self.transfers, instruction)
        if instruction.name == "cp":
            return asynchronous.bulk(self.transfers, instruction)
        if instruction.name == "st" and form[0] == "async":
            return asynchronous.remote_store(self.transfers, instruction)
        if instruction.name not in BUILDERS:
            raise refused(instruction)
        return BUILDERS[instruction.name](self.threads, instruction)

    # Control --------------------------------------------------------------------------------------------------------------------------

    def _control(self, instruction: Instruction) -> Control | None:
        """The function of an instruction that decides where threads go on; None for one that only computes."""
        name, form = instruction.name, instruction.modifiers
        if name == "bra":
            return self._branch(instruction)
        if name in ("ret", "exit"):
            return self._exit(instruction)
        if name in COLLECTIVE:
            return self._together(self._action(instruction))
        if (name, form) == ("bar", ("warp", "sync")):
            return self._together(lambda selection: None)
        if (name, form) in (("bar", ("sync",)), ("barrier", ("sync",)), ("barrier", ("sync", "aligned"))):
            return self._block_barrier(instruction)
        if name == "barrier" and form[0] == "cluster":
            return self._cluster_arrive if form[1] == "arrive" else self._cluster_wait
        if name == "mbarrier" and form[0] == "try_wait":
            return self.waits.try_wait(instruction)
        if name == "cp" and form[2:3] == ("wait_group",):
            return self.waits.wait_group(instruction)
        return None

    def _condition(self, instruction: Instruction, selected: Array) -> Array:
        if not instruction.predicate:
            return np.ones(selected.size, np.bool_)
        return self.threads.register(instruction.predicate)[selected] != instruction.negated

    def _branch(self, instruction: Instruction) -> Control:
        target = self.threads.entry.labels.get(str(instruction.operands[0]))
        if target is None:
            raise refused(instruction)

        def branch(selected: Array, here: int) -> bool:
            taken = self._condition(instruction, selected)
            if not taken.any():
                return True
            self.at[selected] = np.where(taken, target, here + 1)
            return False

        return branch

    def _exit(self, instruction: Instruction) -> Control:
        def leave(selected: Array, here: int) -> bool:
            leaves = self._condition(instruction, selected)
            self.state[selected[leaves]] = DONE
            self.at[selected] = here + 1
            return not leaves.any()

        return leave

    def _together(self, action: Action) -> Control:
        """For whole warps: a thread waits for those of its warp that have not ended."""

        def act(selected: Array, here: int) -> bool:
            if self._whole_warps(selected):
                action(selected)
                return True
            self.at[selected], self.state[selected] = here, AT_WARP
            arrived = np.flatnonzero((self.state == AT_WARP) & (self.at == here))
            warps = self.threads.warp
            missing = np.bincount(warps[self.state != DONE], minlength=warps[-1] + 1) - np.bincount(warps[arrived], minlength=warps[-1] + 1)
            whole = arrived[missing[warps[arrived]] == 0]
            if whole.size:
                action(whole)
                self.state[whole], self.at[whole] = RUNS, here + 1
            return False

        return act

    def _whole_warps(self, selected: Array) -> bool:
        if selected.size == self.threads.count:
            return True
        if selected.size % WARP or self.threads.grid.threads % WARP:
            return False
        first = selected[::WARP]
        return bool((first % WARP == 0).all() and (selected[WARP - 1 :: WARP] == first + WARP - 1).all())

    def _block_barrier(self, instruction: Instruction) -> Control:
        number = int(str(instruction.operands[0]))
        wanted = int(str(instruction.operands[1])) if len(instruction.operands) > 1 else 0

        def meet(selected: Array, here: int) -> bool:
            self.state[selected], self.at[selected], self.barrier_id[selected] = AT_BLOCK, here + 1, number
            self._meet_in_blocks(number, wanted)
            return False

        return meet

    def _meet_in_blocks(self, number: int, wanted: int) -> bool:
        """Let threads go on in blocks in which as many have come to a barrier as it waits for: by default all that have not ended."""
        block = self.threads.block
        there = (self.state == AT_BLOCK) & (self.barrier_id == number)
        come = np.bincount(block[there], minlength=block[-1] + 1)
        needed = np.bincount(block[self.state != DONE], minlength=block[-1] + 1) if wanted == 0 else np.full(come.shape, wanted)
        complete = there & (come >= needed)[block]
        self.state[complete] = RUNS
        return bool(complete.any())

    def _cluster_arrive(self, selected: Array, here: int) -> bool:
        self.arrivals[selected] += 1
        return True

    def _cluster_wait(self, selected: Array, here: int) -> bool:
        self.state[selected], self.at[selected] = AT_CLUSTER, here + 1
        self._wake_at_clusters()
        return False

    def _wake_at_clusters(self) -> bool:
        least = np.full(self.threads.cluster[-1] + 1, np.iinfo(np.int64).max)
        lives = self.state != DONE
        np.minimum.at(least, self.threads.cluster[lives], self.arrivals[lives])
        complete = (self.state == AT_CLUSTER) & (least[self.threads.cluster] >= self.arrivals)
        self.state[complete] = RUNS
        return bool(complete.any())

    def _wake(self) -> bool:
        """Look again at all that wait, since threads have ended or transfers have arrived. Returns whether one goes on."""
        woken = self.waits.wake_at_mbarriers() | self.waits.wake_at_groups() | self._wake_at_clusters()
        for number in sorted(set(self.barrier_id[self.state == AT_BLOCK].tolist())):
            woken |= self._meet_in_blocks(number, 0)
        waits = self.state == AT_WARP  # they come to their instruction again, and find out whether their warp is complete
        lives = self.threads.warp[self.state != DONE]
        for index in sorted(set(self.at[waits].tolist())):
            there = waits & (self.at == index)
            counts = np.bincount(self.threads.warp[there], minlength=self.threads.warp[-1] + 1)
            complete = there & (counts == np.bincount(lives, minlength=self.threads.warp[-1] + 1))[self.threads.warp]
            self.state[complete] = RUNS
            woken |= bool(complete.any())
        return woken
