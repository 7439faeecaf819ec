"""Means with standard errors over what was drawn independently, and whether two of them can be told apart.

Samples of one prompt are not independent of each other, so what is counted are prompts, not samples: each contributes its own mean
(clustered standard errors, arXiv:2411.00640). Two temperatures that answer the same prompts are compared prompt by prompt, which leaves
out what makes one prompt harder than another; two trainings from the same start are compared seed by seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any, NamedTuple

from grpo_fast.utils.statistics import standard_error

__all__ = ["Estimate", "by_group", "difference", "estimate", "told_apart"]


class Estimate(NamedTuple):
    """A mean, its standard error (NaN where there is one value only), and of how many values (prompts, or seeds)."""

    mean: float
    error: float
    units: int

    @property
    def margin(self) -> float:
        """Half the width of the 95 % confidence interval, by Student's t; infinite where the error is not known."""
        return math.inf if math.isnan(self.error) else _t_quantile(self.units - 1) * self.error

    def as_dict(self) -> dict[str, float | None]:
        """``mean`` and ``error`` for JSON, which has no NaN: None where the error is not known."""
        return {"mean": self.mean, "error": None if math.isnan(self.error) else self.error}


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of independent values, with its `standard_error`.

    Example:
        >>> estimate([0.0, 1.0, 1.0, 0.0])
        Estimate(mean=0.5, error=0.28867513459481287, units=4)
    """
    if not values:
        raise ValueError("estimate: values is empty; expected at least one.")
    return Estimate(fmean(values), standard_error(values), len(values))


def by_group(values: Sequence[Any], group_size: int) -> list[list[Any]]:
    """``[B]`` as ``[B / group_size][group_size]``: what belongs to one prompt, or to one group, in a row of its own."""
    return [list(values[start : start + group_size]) for start in range(0, len(values), group_size)]


def difference(mine: Sequence[float], theirs: Sequence[float]) -> Estimate:
    """The mean of the differences of pairs: the same prompts at two temperatures, or the same seeds in two trainings.

    Example:
        >>> difference([0.5, 1.0], [0.25, 0.25])
        Estimate(mean=0.5, error=0.25, units=2)
    """
    return estimate([a - b for a, b in zip(mine, theirs, strict=True)])


def told_apart(gap: Estimate) -> bool:
    """Whether a difference is larger than its 95 % margin. One pair alone tells nothing."""
    return abs(gap.mean) > gap.margin


def _t_quantile(degrees: int) -> float:
    """Return the 97.5 % quantile of Student's t distribution."""
    from scipy.stats import t  # takes most of a second to import

    return float(t.ppf(0.975, degrees))
