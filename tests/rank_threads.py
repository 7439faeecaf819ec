"""The ranks of a process group as threads of this process: what one process computes that merges the shards in the order of the ranks.

No process starts and no backend of torch.distributed is used, so that it costs little, and the order in which the ranks arrive is ours.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

Result = TypeVar("Result")


class RankGroup(ProcessGroup):
    """The group as one rank sees it."""

    def __init__(self, own: int, shared: Shared):
        super().__init__(own, shared.count)  # type: ignore[call-arg]  # the overload without a store
        self.own, self.shared = own, shared


class Shared:
    """What the ranks exchange: one tensor of each at a time."""

    def __init__(self, count: int, seed: int | None):
        self.count, self.tensors, self.barrier = count, [torch.empty(0)] * count, threading.Barrier(count)
        self.delays = None if seed is None else random.Random(seed)

    def gather(self, own: int, x: Tensor) -> list[Tensor]:
        if self.delays is not None:
            time.sleep(self.delays.random() * 2e-3)
        self.tensors[own] = x.detach().clone()
        self.barrier.wait()
        found = list(self.tensors)
        self.barrier.wait()
        return found


def _all_gather(into: list[Tensor], x: Tensor, group: RankGroup) -> None:
    for to, found in zip(into, group.shared.gather(group.own, x), strict=True):
        to.copy_(found)


def _all_reduce(x: Tensor, operation: Any, group: RankGroup) -> None:
    assert operation == torch.distributed.ReduceOp.MIN, "the order of a sum is the backend's own"
    x.copy_(torch.stack(group.shared.gather(group.own, x)).amin(0))


def run_as_ranks(count: int, work: Callable[[int, ProcessGroup], Result], *, seed: int | None = None) -> list[Result]:
    """Call ``work(rank, group)`` for every rank, each in a thread, and return the results in the order of the ranks.

    Args:
        seed: the ranks wait for a random time before each exchange; None: they do not.
    """
    shared = Shared(count, seed)
    results: dict[int, Result] = {}
    errors: list[Exception] = []

    def rank(own: int) -> None:
        try:
            results[own] = work(own, RankGroup(own, shared))
        except Exception as error:
            errors.append(error)
            shared.barrier.abort()

    threads = [threading.Thread(target=rank, args=(own,)) for own in range(count)]
    with mock.patch.multiple(
        torch.distributed,
        all_gather=_all_gather,
        all_reduce=_all_reduce,
        get_world_size=lambda group: group.shared.count,
        get_rank=lambda group: group.own,
    ):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    return [results[own] for own in range(count)]
