"""What a training step measured, added up until it is logged: without a synchronisation in between, and over all processes in the end."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

__all__ = ["MetricAccumulator"]


class MetricAccumulator:
    """Weighted means, maxima and seconds per step, by name.

    Example:
        >>> metrics = MetricAccumulator()
        >>> metrics.mean("length", 10.0, weight=1)
        >>> metrics.mean("length", 40.0, weight=2)
        >>> metrics.read()
        {'length': 30.0}
    """

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Any, Any]] = {}  # name -> (sum of value * weight, sum of weights)
        self._largest: dict[str, Any] = {}
        self._seconds: dict[str, float] = {}
        self.steps = 0  # over which the seconds are averaged

    def mean(self, name: str, value: float | Tensor, weight: float | Tensor = 1.0) -> None:
        self.add(name, value * weight, weight)

    def add(self, name: str, total: float | Tensor, weight: float | Tensor) -> None:
        """A sum, and of how many."""
        before, weights = self._sums.get(name, (0.0, 0.0))
        self._sums[name] = before + total, weights + weight

    def merge(self, other: MetricAccumulator) -> None:
        """Take over what another has measured: of one step into those of many."""
        for name, (total, weight) in other._sums.items():
            self.add(name, total, weight)
        for name, value in other._largest.items():
            self.largest(name, value)
        for name, value in other._seconds.items():
            self.seconds(name, value)
        self.steps += other.steps

    def largest(self, name: str, value: float | Tensor) -> None:
        before = self._largest.get(name)
        if before is None:
            self._largest[name] = value
        elif isinstance(value, Tensor):
            self._largest[name] = value.maximum(before)
        else:
            self._largest[name] = max(before, value)

    def seconds(self, name: str, value: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + value

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the seconds spent inside. On a GPU: those in which work was queued, since nothing is synchronised for a clock."""
        started = time.perf_counter()
        yield
        self.seconds(name, time.perf_counter() - started)

    def total_seconds(self, name: str) -> float:
        """So far, in this process."""
        return self._seconds.get(name, 0.0)

    def read(self) -> dict[str, float]:
        """Everything, over all processes, which must all call this."""
        from accelerate.utils import gather_object

        mine = (
            {name: (float(total), float(weight)) for name, (total, weight) in self._sums.items()},
            {name: float(value) for name, value in self._largest.items()},
            {name: value / max(self.steps, 1) for name, value in self._seconds.items()},
        )
        everyone = gather_object([mine])
        sums: dict[str, list[tuple[float, float]]] = {}
        found: dict[str, float] = {}
        for means, largest, seconds in everyone:
            for name, pair in means.items():
                sums.setdefault(name, []).append(pair)
            for name, value in largest.items():
                found[name] = max(value, found.get(name, value))
            for name, value in seconds.items():
                found[name] = found.get(name, 0.0) + value / len(everyone)
        for name, pairs in sums.items():
            weight = sum(pair[1] for pair in pairs)
            if weight > 0:
                found[name] = sum(pair[0] for pair in pairs) / weight
        return found
