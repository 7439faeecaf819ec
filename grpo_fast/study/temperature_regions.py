"""From numbers to advice: which zone a temperature lies in, at which to evaluate and at which to train.

Accuracy over temperature is low, high, low. POLARIS (https://hkunlp.github.io/blog/2025/Polaris) names three zones: *robust generation*,
where accuracy is best and stable; *controlled exploration*, hotter, where it falls a little and diversity grows: train there; and
*performance collapse*. It draws the borders by eye. Here they follow from the table:

- robust generation: the temperature with the highest pass@1, and its neighbours on both sides as far as they cannot be told from it (95 %,
  prompt by prompt);
- controlled exploration: hotter than that, while at least the share ``keep`` of the highest pass@1 is left;
- performance collapse: from the first temperature on where less is left;
- too cold: colder than robust generation, from the first temperature on that is worse. POLARIS has no name for it; DeepSeek-R1
  (arXiv:2501.12948) saw repetition there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from grpo_fast.study.estimates import difference, told_apart

__all__ = ["COLD", "COLLAPSE", "ENTROPY_TARGET", "EXPLORATION", "ROBUST", "Point", "Reading", "Zoned", "read", "temperature_at_entropy"]

COLD, ROBUST, EXPLORATION, COLLAPSE = "too cold", "robust generation", "controlled exploration", "performance collapse"
MOSTLY_CUT = 0.5  # share of the completions above which the length limit is spoken of
ENTROPY_TARGET = 0.3  # of softmax(z/T), in nats a token: AceReason-Nemotron 1.1, arXiv:2506.13284


@dataclass(frozen=True)
class Point:
    """What the reading needs to know of one temperature; the lists have one number for each of N prompts, in the same order at all."""

    temperature: float
    right: Sequence[float]  # [N] share of the samples that are right
    signal: Sequence[float]  # [N] share of the groups whose rewards differ: they have a gradient
    distinct: float  # different completions in a group, of its size
    truncated: float
    entropy: float  # of softmax(z/T), nats per token
    judged: Sequence[float] | None = None  # [N] as ``signal``, of the reward alone that says what is right

    @property
    def pass_at_1(self) -> float:
        return math.fsum(self.right) / len(self.right)

    @property
    def with_signal(self) -> float:
        return math.fsum(self.signal) / len(self.signal)


@dataclass(frozen=True)
class Zoned:
    """A temperature and its zone."""

    temperature: float
    zone: str
    kept: float  # pass@1, of the highest
    settled: bool  # told by the data; False: pass@1 there cannot be told from the highest (too cold) or from the border to collapse


@dataclass(frozen=True)
class Reading:
    """What the table says."""

    zones: list[Zoned] = field(default_factory=list)  # from cold to hot; none where no completion was right
    tied: list[float] = field(default_factory=list)  # temperatures whose pass@1 cannot be told from the highest
    evaluate: float | None = None
    train: float | None = None
    sentences: list[str] = field(default_factory=list)


def read(points: Sequence[Point], *, keep: float = 0.5, samples: int | None = None) -> Reading:
    """Zones, the temperature to evaluate at, the one to train at, and why.

    Evaluate at the highest pass@1 (of equal ones the one with fewer cut completions, then the colder). Train at the temperature of
    controlled exploration that gives the most groups a gradient (of equal ones the colder); where no temperature lies in that zone, at the
    hottest of robust generation. T = 0 is never trained at.

    Args:
        points: one per temperature, all different.
        keep: above 0 and below 1: the share of the highest pass@1 that must be left before performance collapse.
        samples: of a group; with 1 there are no groups, and no advice on training.

    Example:
        >>> table = {0.0: 0.0, 0.6: 0.75, 1.0: 0.5, 1.4: 0.25}  # 40 prompts that are all alike
        >>> reading = read([Point(t, [right] * 40, [right] * 40, t, 0.0, t) for t, right in table.items()])
        >>> [zoned.zone for zoned in reading.zones]
        ['too cold', 'robust generation', 'controlled exploration', 'performance collapse']
        >>> reading.evaluate, reading.train
        (0.6, 1.0)
    """
    points = sorted(points, key=lambda point: point.temperature)
    best = min(points, key=lambda point: (-point.pass_at_1, point.truncated, point.temperature))
    if best.pass_at_1 == 0:
        nothing = (
            "No completion was right at any temperature, so nothing can be said of zones. Cure: easier prompts, more samples, a larger "
            "max_completion_length, or a format that the reward can read."
        )
        return Reading(sentences=[nothing])
    zones = _zones(points, best, keep)
    tied = [point.temperature for point in points if point is not best and not _apart(point, best)]
    sentences = [_of_zones(zones, best, keep), *_of_borders(zones, best, keep), _of_evaluation(points, zones, best, tied)]
    if samples == 1:
        train, why = None, "Train at: no advice. With one sample there are no groups that could differ. Cure: more --samples."
    else:
        train, why = _to_train_at(points, zones, best)
    sentences += [why, *_of_length(points, best, train)]
    if (entropic := _of_entropy(points)) is not None:
        sentences.append(entropic)
    return Reading(zones, tied, best.temperature, train, sentences)


def temperature_at_entropy(points: Sequence[Point], target: float = ENTROPY_TARGET) -> float | None:
    """Where the entropy of softmax(z/T) passes ``target``, between two neighbours of the grid above 0, on a straight line; or None."""
    warm = sorted((point for point in points if point.temperature > 0), key=lambda point: point.temperature)
    for cold, hot in pairwise(warm):
        if cold.entropy <= target <= hot.entropy and cold.entropy < hot.entropy:
            share = (target - cold.entropy) / (hot.entropy - cold.entropy)
            return cold.temperature + share * (hot.temperature - cold.temperature)
    return None


def _apart(point: Point, best: Point, share: float = 1.0) -> bool:
    """Whether pass@1 can be told from this share of the highest."""
    return told_apart(difference(point.right, [share * right for right in best.right]))


def _zones(points: Sequence[Point], best: Point, keep: float) -> list[Zoned]:
    middle = points.index(best)
    first = last = middle
    while first > 0 and not _apart(points[first - 1], best):
        first -= 1
    while last + 1 < len(points) and not _apart(points[last + 1], best):
        last += 1
    zones, collapsed = [], False
    for i, point in enumerate(points):
        kept = point.pass_at_1 / best.pass_at_1
        if i < first:
            zones.append(Zoned(point.temperature, COLD, kept, _apart(point, best)))
        elif i <= last:
            zones.append(Zoned(point.temperature, ROBUST, kept, point is best))
        else:
            collapsed = collapsed or kept < keep
            zones.append(Zoned(point.temperature, COLLAPSE if collapsed else EXPLORATION, kept, _apart(point, best, keep)))
    return zones


def _of_zones(zones: Sequence[Zoned], best: Point, keep: float) -> str:
    meaning = {
        COLD: "colder than robust generation",
        ROBUST: "pass@1 cannot be told from the highest",
        EXPLORATION: f"hotter, and at least {keep:.0%} of the highest pass@1 is left",
        COLLAPSE: f"less than {keep:.0%} of it is left",
    }
    parts = []
    for zone, rule in meaning.items():
        inside = [zoned.temperature for zoned in zones if zoned.zone == zone]
        if inside:
            parts.append(f"{zone}: {_list(inside)} ({rule})")
        elif zone != COLD:
            parts.append(f"{zone}: none of this grid ({rule})")
    return f"Zones. {'; '.join(parts)}. The highest is {best.pass_at_1:.3f}, at T = {best.temperature:g}."


def _of_borders(zones: Sequence[Zoned], best: Point, keep: float) -> list[str]:
    found = []
    if len(zones) > 1 and all(zoned.zone == ROBUST for zoned in zones):
        found.append("The data cannot tell these temperatures apart. Cure: more prompts, more rounds, or a wider grid.")
    open_ones = [zoned.temperature for zoned in zones if zoned.zone in (EXPLORATION, COLLAPSE) and not zoned.settled]
    if open_ones:
        found.append(f"Whether {keep:.0%} is left at T = {_list(open_ones)} is within the errors: the border to collapse is open there.")
    ends = [name for name, zoned in (("coldest", zones[0]), ("hottest", zones[-1])) if zoned.temperature == best.temperature]
    if ends and len(zones) > 1:
        found.append(f"The highest pass@1 is at the {ends[0]} temperature of the grid: there may be a better one beyond it.")
    return found


def _of_evaluation(points: Sequence[Point], zones: Sequence[Zoned], best: Point, tied: Sequence[float]) -> str:
    sentence = f"Evaluate at T = {best.temperature:g}: the highest pass@1."
    if not tied:
        return sentence if len(points) == 1 else f"{sentence} Every other temperature is worse by more than the errors."
    sentence = f"{sentence} Not to be told from it within the errors: T = {_list(tied)}."
    beyond = [zoned.temperature for zoned in zones if zoned.temperature in tied and zoned.zone != ROBUST]
    if beyond:
        sentence += f" Of these T = {_list(beyond)} is not of robust generation, since a temperature between is worse."
    return sentence


def _of_length(points: Sequence[Point], best: Point, train: float | None) -> list[str]:
    """Where most completions are cut, the limit decides what is right."""
    advised = [point for point in points if point is best or point.temperature == train]
    cut = [point for point in advised if point.truncated > MOSTLY_CUT]
    if not cut:
        return []
    shares = " and ".join(f"{point.truncated:.0%} of the completions at T = {point.temperature:g}" for point in cut)
    return [f"The length limit cuts {shares}: what is right there depends on the limit. Cure: a larger max_completion_length."]


def _to_train_at(points: Sequence[Point], zones: Sequence[Zoned], best: Point) -> tuple[float | None, str]:
    zone_of = {zoned.temperature: zoned.zone for zoned in zones}
    exploring = [point for point in points if zone_of[point.temperature] == EXPLORATION]
    robust = [point for point in points if zone_of[point.temperature] == ROBUST and point.temperature > 0]
    if exploring:
        chosen = max(exploring, key=lambda point: (point.with_signal, -point.temperature))
        rule = "the most groups with a gradient in controlled exploration"
        rivals = [p.temperature for p in exploring if p is not chosen and not told_apart(difference(chosen.signal, p.signal))]
        equal = [p.temperature for p in exploring if p is not chosen and p.with_signal == chosen.with_signal]
        rest = []
        if equal:
            rest.append(f"That did not decide it: T = {_list(equal)} gives exactly as many, and the colder one is taken.")
        if within := [temperature for temperature in rivals if temperature not in equal]:
            rest.append(f"T = {_list(within)} gives as many within the errors.")
        if chosen.distinct <= best.distinct:
            rest.append(f"But its groups are no more diverse than those at T = {best.temperature:g}: it costs accuracy and gives nothing.")
    elif robust:
        chosen = robust[-1]
        rule = "the hottest of robust generation, since none of this grid lies in controlled exploration"
        rest = ["Cure: temperatures between it and the next hotter one, or beyond the grid."]
    else:
        return None, "Train at: no advice. No temperature above 0 lies in robust generation or controlled exploration."
    told = [f"{chosen.with_signal:.0%} of groups", f"{chosen.distinct:.0%} distinct completions"]
    if chosen.judged is not None:
        told.insert(1, f"{math.fsum(chosen.judged) / len(chosen.judged):.0%} by the judging reward alone")
    words = f"Train at T = {chosen.temperature:g}: {rule} ({', '.join(told)})."
    if chosen.with_signal == 0:
        rest.append("No group at it has a gradient: GRPO would learn nothing from these prompts and rewards.")
    return chosen.temperature, " ".join([words, *rest])


def _of_entropy(points: Sequence[Point]) -> str | None:
    warm = [point for point in points if point.temperature > 0]
    if not warm:
        return None
    rule = f"AceReason-Nemotron 1.1 trains where the entropy of softmax(z/T) is about {ENTROPY_TARGET:g} nats a token"
    where = temperature_at_entropy(points)
    if where is not None:
        return f"A second opinion: {rule}; here that is T = {where:.2f}, by a straight line between its neighbours."
    low, high = min(warm, key=lambda point: point.entropy), max(warm, key=lambda point: point.entropy)
    return f"A second opinion: {rule}; the entropies of this grid, {low.entropy:.2f} to {high.entropy:.2f}, do not pass it."


def _list(temperatures: Sequence[float]) -> str:
    names = [f"{temperature:g}" for temperature in temperatures]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
