"""One repetition on the CPU: cold caches, two clocks, peak memory."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import Tensor

__all__ = ["Measurement", "Record", "keep_freed_memory", "measure", "reset_peak", "resident_peak", "trim"]

T = TypeVar("T")
Record = dict[str, Any]  # a JSON object: a measurement, the answer of a worker, a part of a result

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h


@dataclass(frozen=True)
class Measurement(Generic[T]):
    """One repetition."""

    result: T
    wall_ms: float
    cpu_ms: float | None  # of the calling thread; None with several threads, whose sum says nothing about the time that passes
    resident_before: int | None  # bytes of resident memory before the call; None where the system does not tell
    resident_peak: int | None  # ... at the worst moment of the call

    @property
    def seconds(self) -> float:
        """The time that is reported, see BenchmarkSettings.clock."""
        return (self.wall_ms if self.cpu_ms is None else self.cpu_ms) / 1e3

    @property
    def peak_bytes(self) -> int | None:
        """How far the resident memory rose above what was there before the call."""
        if self.resident_before is None or self.resident_peak is None:
            return None
        return max(0, self.resident_peak - self.resident_before)


def measure(
    step: Callable[[], T],
    threads: int,
    *,
    flush: Tensor | None = None,
    return_freed_memory: bool = True,
    cpu_clock: Callable[[], int] = time.thread_time_ns,
) -> Measurement[T]:
    """Run ``step`` once, without the garbage collector.

    Args:
        threads: that PyTorch uses.
        flush: a buffer larger than the largest cache, which is read and written before the call, so that no input is left in a cache.
        return_freed_memory: give the memory that earlier calls freed back to the system, so that the peak is that of this call alone.
        cpu_clock: of the calling thread, or ``time.process_time_ns`` if ``step`` waits for another thread that does the work.
    """
    gc.collect()
    if return_freed_memory:
        trim()
    if flush is not None:
        flush.add_(1)
    gc.disable()
    before = reset_peak()
    try:
        wall, cpu = time.perf_counter_ns(), cpu_clock()
        result = step()
        cpu, wall = cpu_clock() - cpu, time.perf_counter_ns() - wall
    finally:
        gc.enable()
    peak = None if before is None else resident_peak()
    return Measurement(result, wall / 1e6, cpu / 1e6 if threads == 1 else None, before, peak)


def trim() -> None:
    """Return freed memory to the system, where the C library can do that."""
    function = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if function is not None:
        function(0)


def keep_freed_memory() -> None:
    """Make malloc keep what is freed from now on, as in a process started with MALLOC_MMAP_MAX_=0 and an endless MALLOC_TRIM_THRESHOLD_.

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
    """Restart the high-water mark from what is resident now, which is returned; None where the system does not allow it."""
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
