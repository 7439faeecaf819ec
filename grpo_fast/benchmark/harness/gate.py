"""Correctness gates: no time is reported for a wrong result.

Two kinds: a result is held to a float64 truth (suites ``logits`` and ``head``), or, where there is none, to the result of the baseline that
it replaces (trainer, TRL and drop-ins).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["UnavailableError", "Verdict", "relative_difference", "row_error"]


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
