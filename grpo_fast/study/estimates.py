"""Means with standard errors over independent units, and significance of paired differences.

Samples of one prompt are not independent of each other, so errors are taken over prompts: each prompt contributes its own mean (clustered
standard errors, arXiv:2411.00640). Two temperatures that answer the same prompts are compared prompt by prompt, which removes the
differences in difficulty between prompts; two trainings from the same warm start are compared seed by seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from statistics import fmean
from typing import NamedTuple, TypedDict, TypeVar

from grpo_fast.utils.statistics import standard_error

__all__ = ["Estimate", "EstimateJSON", "difference", "estimate", "is_significant", "split_groups"]

Item = TypeVar("Item")


class EstimateJSON(TypedDict):
    """An `Estimate` in JSON, which has no NaN: the error of a single value is None."""

    mean: float
    error: float | None


class Estimate(NamedTuple):
    """A mean, its standard error (NaN for a single value), and the number of independent values: prompts, or seeds."""

    mean: float
    error: float
    units: int

    @property
    def margin(self) -> float:
        """Half the width of the 95 % confidence interval by Student's t; infinite if the error is unknown."""
        return math.inf if math.isnan(self.error) else _t_quantile(self.units - 1) * self.error

    def as_dict(self) -> EstimateJSON:
        """Return ``mean`` and ``error`` for JSON."""
        return {"mean": self.mean, "error": None if math.isnan(self.error) else self.error}


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean of independent values with its standard error.

    Raises:
        ValueError: there are no values.

    Example:
        >>> estimate([0.0, 1.0, 1.0, 0.0])
        Estimate(mean=0.5, error=0.28867513459481287, units=4)
    """
    if not values:
        raise ValueError("estimate: values is empty; expected at least one.")
    return Estimate(fmean(values), standard_error(values), len(values))


def split_groups(values: Sequence[Item], group_size: int) -> list[list[Item]]:
    """Split ``[B]`` into ``[B / group_size][group_size]``: one row per prompt, or per group.

    Example:
        >>> split_groups([1, 2, 3, 4], 2)
        [[1, 2], [3, 4]]
    """
    return [list(values[start : start + group_size]) for start in range(0, len(values), group_size)]


def difference(first: Sequence[float], second: Sequence[float]) -> Estimate:
    """Return the mean of the paired differences ``first - second``: the same prompts at two temperatures, or seeds in two trainings.

    Raises:
        ValueError: the two have different lengths.

    Example:
        >>> difference([0.5, 1.0], [0.25, 0.25])
        Estimate(mean=0.5, error=0.25, units=2)
    """
    return estimate([a - b for a, b in zip(first, second, strict=True)])


def is_significant(gap: Estimate) -> bool:
    """Return whether a difference is larger than its 95 % margin; never true for a single pair."""
    return abs(gap.mean) > gap.margin


@lru_cache(maxsize=256)
def _t_quantile(degrees: int) -> float:
    """Return the 97.5 % quantile of Student's t distribution."""
    from scipy.stats import t  # slow to import

    return float(t.ppf(0.975, degrees))
