"""Accumulates the metrics of training steps until they are logged, without synchronising the device, and reduces them over processes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

__all__ = ["MetricAccumulator", "Throughput"]

Value = float | Tensor  # tensors have no dimensions and stay on their device until `read`


class MetricAccumulator:
    """Weighted means, minima, maxima and seconds per step, by name.

    Example:
        >>> metrics = MetricAccumulator()
        >>> metrics.add_mean("length", 10.0, weight=1)
        >>> metrics.add_mean("length", 40.0, weight=2)
        >>> metrics.read()
        {'length': 30.0}
    """

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Value, Value]] = {}  # name -> (weighted sum, sum of weights)
        self._max: dict[str, Value] = {}
        self._min: dict[str, Value] = {}
        self._seconds: dict[str, float] = {}
        self.steps = 0  # optimizer steps over which the seconds are averaged

    def add_mean(self, name: str, value: Value, weight: Value = 1.0) -> None:
        """Add a mean and the weight, such as a number of tokens, that it has among the other values of this name."""
        self.add_sum(name, value * weight, weight)

    def add_sum(self, name: str, total: Value, weight: Value) -> None:
        """Add a weighted sum and its sum of weights; what is logged is their quotient."""
        total_before, weight_before = self._sums.get(name, (0.0, 0.0))
        self._sums[name] = total_before + total, weight_before + weight

    def add_max(self, name: str, value: Value) -> None:
        """Add a value of which the maximum is logged."""
        before = self._max.get(name)
        if before is None:
            self._max[name] = value
        elif isinstance(value, Tensor) and isinstance(before, Tensor):
            self._max[name] = value.maximum(before)
        else:
            self._max[name] = max(before, value)

    def add_min(self, name: str, value: Value) -> None:
        """Add a value of which the minimum is logged."""
        before = self._min.get(name)
        if before is None:
            self._min[name] = value
        elif isinstance(value, Tensor) and isinstance(before, Tensor):
            self._min[name] = value.minimum(before)
        else:
            self._min[name] = min(before, value)

    def add_seconds(self, name: str, value: float) -> None:
        """Add seconds, of which the mean per optimizer step is logged."""
        self._seconds[name] = self._seconds.get(name, 0.0) + value

    def merge(self, other: MetricAccumulator) -> None:
        """Add everything that another accumulator holds, such as the metrics of one step to those since the last log."""
        for name, (total, weight) in other._sums.items():
            self.add_sum(name, total, weight)
        for name, value in other._max.items():
            self.add_max(name, value)
        for name, value in other._min.items():
            self.add_min(name, value)
        for name, seconds in other._seconds.items():
            self.add_seconds(name, seconds)
        self.steps += other.steps

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the seconds spent inside the context, also if it raises. On a GPU this is the time to launch the work, because nothing is
        synchronised.
        """
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add_seconds(name, time.perf_counter() - started)

    def total_seconds(self, name: str) -> float:
        """The seconds of this name so far, in this process."""
        return self._seconds.get(name, 0.0)

    def read(self) -> dict[str, float]:
        """All metrics, reduced over all processes. It is a collective operation: every process must call it."""
        from accelerate.utils import gather_object

        local = (
            {name: (float(total), float(weight)) for name, (total, weight) in self._sums.items()},
            {name: float(value) for name, value in self._max.items()},
            {name: float(value) for name, value in self._min.items()},
            {name: value / max(self.steps, 1) for name, value in self._seconds.items()},
        )
        per_process = gather_object([local])
        sums: dict[str, list[tuple[float, float]]] = {}
        result: dict[str, float] = {}
        for process_sums, process_max, process_min, process_seconds in per_process:
            for name, pair in process_sums.items():
                sums.setdefault(name, []).append(pair)
            for name, value in process_max.items():
                result[name] = max(value, result.get(name, value))
            for name, value in process_min.items():
                result[name] = min(value, result.get(name, value))
            for name, value in process_seconds.items():
                result[name] = result.get(name, 0.0) + value / len(per_process)
        for name, pairs in sums.items():
            weight = sum(pair[1] for pair in pairs)
            if weight > 0:
                result[name] = sum(pair[0] for pair in pairs) / weight
        return result


class Throughput:
    """Tokens per second between log calls. Steps that reuse a rollout add no tokens; their time belongs to the next rollout."""

    def __init__(self) -> None:
        self.start(0)

    def start(self, tokens: int) -> None:
        """Start the clock, when ``tokens`` have been processed."""
        self._time, self._tokens = time.perf_counter(), tokens

    def measure(self, tokens: int) -> float | None:
        """Tokens per second since the last measurement that returned a number; None if there are no new tokens."""
        if tokens == self._tokens:
            return None
        now, new = time.perf_counter(), tokens - self._tokens
        rate = new / max(now - self._time, 1e-9)
        self._time, self._tokens = now, tokens
        return rate
