"""Correctness gates: no time is reported for a wrong result.

Two kinds: a result is held to a float64 truth (suites ``logits`` and ``head``), or, where there is none, to the result of the baseline that
it replaces (trainer, TRL and drop-ins).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_fast.benchmark.harness.measure import Record
from grpo_fast.benchmark.harness.suite import Progress, Result, summary

__all__ = ["UnavailableError", "Verdict", "compare", "relative_difference", "row_error"]


class UnavailableError(RuntimeError):
    """An implementation cannot take part here; the text says why."""


@dataclass(frozen=True)
class Verdict:
    """Errors against float64 by name, and the limit of each. An error that was not measured is None and passes; NaN does not."""

    errors: Mapping[str, float | None]
    limits: Mapping[str, float]

    @property
    def passed(self) -> bool:
        return all(error is None or error <= self.limits[name] for name, error in self.errors.items())

    def errors_for_json(self) -> dict[str, float | str | None]:
        """An error that is not finite becomes a string: JSON has no NaN."""
        return {name: str(error) if error is not None and not math.isfinite(error) else error for name, error in self.errors.items()}


def row_error(found: Tensor, truth: Tensor) -> float:
    """The largest error of a row [n, D] of a gradient: the length of the error over the length of the row, or over the typical length of a
    row where that is larger. A gradient that is zero or twice too long has the error 1."""
    lengths = truth.norm(dim=-1)
    typical = lengths[lengths > 0].median() if (lengths > 0).any() else lengths.new_ones(())
    return float(((found.double() - truth).norm(dim=-1) / lengths.clamp(min=float(typical))).max())


def relative_difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, smallest: float = 1e-12) -> float:
    """The largest relative difference of tensors by name, in the maximum norm and in the Euclidean norm.

    Infinite if the names differ, if there are none, or if a value is not finite. ``smallest``: the least that a norm counts as.
    """
    if found.keys() != expected.keys() or not expected:
        return math.inf
    worst = 0.0
    for name, theirs in expected.items():
        for order in (math.inf, 2.0):
            size = torch.linalg.vector_norm(theirs, order).clamp(min=smallest)
            difference = float(torch.linalg.vector_norm(found[name] - theirs, order) / size)
            worst = max(worst, difference if math.isfinite(difference) else math.inf)
    return worst


def compare(
    labels: Mapping[str, str],
    shares: Iterable[float],
    rounds: int,
    ask: Callable[[str, float], Record],
    *,
    tolerance: float,
    progress: Progress,
    smallest: float = 1e-12,
    skip: Callable[[str, float], bool] = lambda name, active: False,
) -> Result:
    """Measure implementations in turn (A B C A B C), so that what slows the machine slows all alike; the first round is the warm-up.

    Args:
        labels: the implementations by name, with what messages call them; the first is the baseline.
        shares: of the sequences or groups that are active; every implementation is measured at each.
        ask: runs an implementation at a share once. Its record has "seconds", "peak_bytes" and "outputs" (tensors or lists of numbers by
            name, "loss" among them, which are compared with the baseline's); other keys of the first repetition go into the result.
        tolerance: the largest relative difference from the baseline's first results at that share.
        progress: is told what is measured.
        smallest: see relative_difference.
        skip: whether an implementation is only compared, not timed, at a share.

    Raises:
        RuntimeError: results differ by more than the tolerance.
    """
    baseline = next(iter(labels))
    gate = dict.fromkeys(labels, 0.0)
    expected: dict[float, dict[str, Tensor]] = {}
    found: dict[tuple[str, float], list[Record]] = {}
    for number in range(rounds + 1):
        for active, name in ((active, name) for active in shares for name in labels):
            if number and skip(name, active):
                continue
            progress(f"{labels[name]}, {active:.0%} active")
            answer = ask(name, active)
            outputs = {key: torch.as_tensor(value) for key, value in answer.pop("outputs").items()}
            difference = relative_difference(outputs, expected.setdefault(active, outputs), smallest=smallest)
            gate[name] = max(gate[name], difference)
            if not difference <= tolerance:
                raise RuntimeError(
                    f"{labels[name]} at {active:.0%} active: loss, gradients or metrics differ from those of {labels[baseline]} by "
                    f"{difference:.2g} relative; expected {tolerance:g} at most. No times are reported."
                )
            if number:
                found.setdefault((name, active), []).append({**answer, "loss": float(outputs["loss"])})
    results = []
    for (name, active), answers in found.items():
        times = summary((answer["seconds"] for answer in answers), (answer["peak_bytes"] for answer in answers))
        entry = {"implementation": name, "active": active, **answers[0], **times}
        of_baseline = found.get((baseline, active)) or found[baseline, max(shares)]
        faster = statistics.median(answer["seconds"] for answer in of_baseline) / times["median"]
        results.append({**entry, f"faster_than_{baseline}": faster})
    return {"gate": {"tolerance": tolerance, "largest_relative_difference": gate}, "results": results}
