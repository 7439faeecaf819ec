"""Classification of sampling temperatures into regions by their accuracy.

Accuracy over temperature rises, peaks and falls. POLARIS (https://hkunlp.github.io/blog/2025/Polaris) names three regions ("zones"):
*robust generation*, where accuracy is highest and stable; *controlled exploration*, hotter, where accuracy is slightly lower and diversity
higher, recommended for training; and *performance collapse*. POLARIS draws the borders by eye. Here they follow from the measurements:

- robust generation: the temperature with the highest pass@1, and its neighbours on both sides as long as their pass@1 does not differ
  significantly from it (95 %, paired by prompt);
- controlled exploration: hotter, as long as at least the share ``keep`` of the highest pass@1 is reached;
- performance collapse: every temperature from the first one on that falls below this share;
- too cold: colder than robust generation. POLARIS has no name for it; DeepSeek-R1 (arXiv:2501.12948) observed repetition there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from grpo_fast.study.estimates import difference, is_significant

__all__ = [
    "COLD",
    "COLLAPSE",
    "ENTROPY_TARGET",
    "EXPLORATION",
    "ROBUST",
    "ClassifiedTemperature",
    "TemperaturePoint",
    "best_point",
    "classify",
    "differs_from_best",
    "temperature_at_entropy",
]

COLD, ROBUST, EXPLORATION, COLLAPSE = "too cold", "robust generation", "controlled exploration", "performance collapse"
ENTROPY_TARGET = 0.3  # of softmax(z/T), in nats per token: AceReason-Nemotron 1.1, arXiv:2506.13284


@dataclass(frozen=True)
class TemperaturePoint:
    """The measurements at one temperature that the advice depends on. Lists have one number per prompt, in the same order everywhere."""

    temperature: float
    correct: Sequence[float]  # [N] share of the samples that are correct
    with_gradient: Sequence[float]  # [N] share of the groups whose rewards differ, so that they have a gradient
    distinct: float  # distinct completions of a group, as a share of its size
    truncated: float
    entropy: float  # of softmax(z/T), nats per token
    with_gradient_correct: Sequence[float] | None = None  # [N] as with_gradient, by the correctness reward alone

    @property
    def pass_at_1(self) -> float:
        return math.fsum(self.correct) / len(self.correct)

    @property
    def gradient_share(self) -> float:
        return math.fsum(self.with_gradient) / len(self.with_gradient)


@dataclass(frozen=True)
class ClassifiedTemperature:
    """A temperature and its region."""

    temperature: float
    region: str
    kept: float  # pass@1, as a share of the highest
    settled: bool  # False: pass@1 does not differ significantly from the highest (too cold), or from the border of collapse (hotter)


def best_point(points: Sequence[TemperaturePoint]) -> TemperaturePoint:
    """Return the point with the highest pass@1; of equal ones the less truncated, then the colder."""
    return min(points, key=lambda point: (-point.pass_at_1, point.truncated, point.temperature))


def classify(points: Sequence[TemperaturePoint], best: TemperaturePoint, keep: float) -> list[ClassifiedTemperature]:
    """Assign a region to each temperature.

    Args:
        points: one per temperature, from cold to hot.
        best: the one of them with the highest pass@1 (`best_point`), above 0.
        keep: share of the highest pass@1 below which performance collapse begins.
    """
    middle = points.index(best)
    first = last = middle
    while first > 0 and not differs_from_best(points[first - 1], best):
        first -= 1
    while last + 1 < len(points) and not differs_from_best(points[last + 1], best):
        last += 1
    regions, collapsed = [], False
    for i, point in enumerate(points):
        kept = point.pass_at_1 / best.pass_at_1
        if i < first:
            regions.append(ClassifiedTemperature(point.temperature, COLD, kept, differs_from_best(point, best)))
        elif i <= last:
            regions.append(ClassifiedTemperature(point.temperature, ROBUST, kept, point is best))
        else:
            collapsed = collapsed or kept < keep
            region = COLLAPSE if collapsed else EXPLORATION
            regions.append(ClassifiedTemperature(point.temperature, region, kept, differs_from_best(point, best, keep)))
    return regions


def differs_from_best(point: TemperaturePoint, best: TemperaturePoint, share: float = 1.0) -> bool:
    """Return whether pass@1 differs significantly from this share of the highest pass@1."""
    return is_significant(difference(point.correct, [share * correct for correct in best.correct]))


def temperature_at_entropy(points: Sequence[TemperaturePoint], target: float = ENTROPY_TARGET) -> float | None:
    """Interpolate linearly where, above T = 0, the entropy of softmax(z/T) reaches ``target``; None if no two neighbours enclose it."""
    warm = sorted((point for point in points if point.temperature > 0), key=lambda point: point.temperature)
    for cold, hot in pairwise(warm):
        if cold.entropy <= target <= hot.entropy and cold.entropy < hot.entropy:
            share = (target - cold.entropy) / (hot.entropy - cold.entropy)
            return cold.temperature + share * (hot.temperature - cold.temperature)
    return None
