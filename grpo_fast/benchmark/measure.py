"""One repetition on the CPU: cold caches, two clocks, peak memory. What another device needs instead is in this file and nowhere else."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from grpo_fast.benchmark.contestants import Result
from grpo_fast.benchmark.data import Batch

__all__ = ["keep_freed_memory", "private", "repetition", "reset_peak", "resident_peak", "timed", "trim"]

Answer = TypeVar("Answer")

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h


def private(shared: Batch, storage: Tensor) -> Batch:
    """The shared batch with its logits copied into ``storage``, as a model would hand them over: not a leaf, wanting a gradient."""
    with torch.no_grad():
        storage.copy_(shared.logits)
    return replace(shared, logits=_ModelOutput.apply(torch.zeros((), requires_grad=True), [storage]))


class _ModelOutput(torch.autograd.Function):
    """Given memory as the output of a model: neither a leaf nor a view of one, and nothing is copied."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, memory: list[Tensor]) -> Tensor:
        (storage,) = memory  # in a list, so that autograd does not take the output for a view of an input
        return storage.new_empty(0).set_(storage.untyped_storage(), 0, storage.shape, storage.stride())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        return None, None


def repetition(
    step: Callable[[Batch], Result], shared: Batch, storage: Tensor, flush: Tensor, threads: int
) -> tuple[dict[str, Any], Result]:
    """Run ``step`` once.

    Returns:
        wall_ms; cpu_ms of this thread (None with several threads, whose sum says nothing about the time it takes); peak_bytes, how far the
        resident memory rose above what was there before (None where the system does not tell); and what the step gave.
    """
    batch = private(shared, storage)
    flush.add_(1)  # read and written: nothing of the logits is left in a cache
    gc.collect()
    gc.disable()
    before = reset_peak()
    try:
        wall, cpu = time.perf_counter_ns(), time.thread_time_ns()
        result = step(batch)
        cpu, wall = time.thread_time_ns() - cpu, time.perf_counter_ns() - wall
    finally:
        gc.enable()
    peak = None if before is None else max(0, resident_peak() - before)
    return {"wall_ms": wall / 1e6, "cpu_ms": cpu / 1e6 if threads == 1 else None, "peak_bytes": peak}, result


def timed(step: Callable[[], Answer], threads: int) -> tuple[Answer, float, int | None]:
    """Run ``step`` once, after freed memory has gone back to the system.

    Returns:
        What it gave; seconds, of CPU time of this thread or with several of wall time; and how far the resident memory rose above what was
        there before, in bytes (None where the system does not tell).
    """
    clock = time.thread_time if threads == 1 else time.perf_counter
    trim()
    before, start = reset_peak(), clock()
    answer = step()
    seconds = clock() - start
    return answer, seconds, None if before is None else max(0, resident_peak() - before)


def trim() -> None:
    """Freed memory back to the system, where the C library can do that."""
    function = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if function is not None:
        function(0)


def keep_freed_memory() -> None:
    """From now on malloc neither maps nor unmaps: as in a process started with MALLOC_MMAP_MAX_=0 and an endless MALLOC_TRIM_THRESHOLD_.

    Raises:
        RuntimeError: the C library has no mallopt.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not mallopt(_M_MMAP_MAX, 0) or not mallopt(_M_TRIM_THRESHOLD, -1):
        raise RuntimeError("the C library of this system has no mallopt (it is not glibc), so freed memory cannot be kept")


def resident_peak() -> int:
    """The high-water mark of this process's resident memory, in bytes; Linux only."""
    return _status_bytes("VmHWM")


def reset_peak() -> int | None:
    """Let the high-water mark start again from what is resident now, which is returned; None where the system does not allow it."""
    try:
        _CLEAR.write_text("5")
        return _status_bytes("VmRSS")
    except OSError:
        return None


def _status_bytes(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) << 10
    raise OSError(f"no {field} in {_STATUS}")
