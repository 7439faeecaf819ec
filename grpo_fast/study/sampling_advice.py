"""Advice from a sampling study, in numbers and in sentences: the temperature to evaluate at and the temperature to train at."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from grpo_fast.study.estimates import difference, is_significant
from grpo_fast.study.temperature_regions import (
    COLD,
    COLLAPSE,
    ENTROPY_TARGET,
    EXPLORATION,
    ROBUST,
    ClassifiedTemperature,
    TemperaturePoint,
    best_point,
    classify,
    differs_from_best,
    temperature_at_entropy,
)

__all__ = ["SamplingAdvice", "advise"]

MOSTLY_TRUNCATED = 0.5  # share of truncated completions above which the advice mentions the length limit


@dataclass(frozen=True)
class SamplingAdvice:
    """What a sampling study recommends."""

    regions: list[ClassifiedTemperature] = field(default_factory=list)  # from cold to hot; empty if no completion was correct
    tied: list[float] = field(default_factory=list)  # temperatures whose pass@1 does not differ significantly from the highest
    evaluate: float | None = None
    train: float | None = None
    sentences: list[str] = field(default_factory=list)


def advise(points: Sequence[TemperaturePoint], *, keep: float = 0.5, samples: int | None = None) -> SamplingAdvice:
    """Determine the regions, the temperature to evaluate at, and the temperature to train at, with the reasons.

    Evaluate at the highest pass@1 (of equal ones the one with fewer truncated completions, then the colder). Train at the temperature of
    controlled exploration that gives the most groups a gradient (of equal ones the colder); if no temperature lies in that region, at the
    hottest of robust generation. T = 0 is never recommended for training.

    Args:
        points: one per temperature, all temperatures different.
        keep: above 0 and below 1: share of the highest pass@1 below which performance collapse begins.
        samples: group size; with 1 there are no groups, and no advice on training.

    Example:
        >>> table = {0.0: 0.0, 0.6: 0.75, 1.0: 0.5, 1.4: 0.25}  # 40 identical prompts
        >>> advice = advise([TemperaturePoint(t, [correct] * 40, [correct] * 40, t, 0.0, t) for t, correct in table.items()])
        >>> [classified.region for classified in advice.regions]
        ['too cold', 'robust generation', 'controlled exploration', 'performance collapse']
        >>> advice.evaluate, advice.train
        (0.6, 1.0)
    """
    points = sorted(points, key=lambda point: point.temperature)
    best = best_point(points)
    if best.pass_at_1 == 0:
        message = (
            "No completion was correct at any temperature, so there is no advice. Fix: easier prompts, more samples, a larger "
            "max_completion_length, or a format that the reward can read."
        )
        return SamplingAdvice(sentences=[message])
    regions = classify(points, best, keep)
    tied = [point.temperature for point in points if point is not best and not differs_from_best(point, best)]
    sentences = [_describe_regions(regions, best, keep), *_describe_borders(regions, best, keep)]
    sentences.append(_evaluation_sentence(points, regions, best, tied))
    if samples == 1:
        train, reason = None, "Train at: no advice. With one sample there are no groups that could differ. Fix: more --samples."
    else:
        train, reason = _training_temperature(points, regions, best)
    sentences += [reason, *_length_sentences(points, best, train)]
    if (entropy := _entropy_sentence(points)) is not None:
        sentences.append(entropy)
    return SamplingAdvice(regions, tied, best.temperature, train, sentences)


def _describe_regions(regions: Sequence[ClassifiedTemperature], best: TemperaturePoint, keep: float) -> str:
    rules = {
        COLD: "colder than robust generation",
        ROBUST: "pass@1 does not differ significantly from the highest",
        EXPLORATION: f"hotter, with at least {keep:.0%} of the highest pass@1",
        COLLAPSE: f"less than {keep:.0%} of the highest pass@1",
    }
    parts = []
    for region, rule in rules.items():
        inside = [classified.temperature for classified in regions if classified.region == region]
        if inside:
            parts.append(f"{region}: {_join(inside)} ({rule})")
        elif region != COLD:
            parts.append(f"{region}: none of this grid ({rule})")
    return f"Regions. {'; '.join(parts)}. The highest pass@1 is {best.pass_at_1:.3f}, at T = {best.temperature:g}."


def _describe_borders(regions: Sequence[ClassifiedTemperature], best: TemperaturePoint, keep: float) -> list[str]:
    sentences = []
    if len(regions) > 1 and all(classified.region == ROBUST for classified in regions):
        sentences.append("The data cannot tell these temperatures apart. Fix: more prompts, more rounds, or a wider grid.")
    uncertain = [one.temperature for one in regions if one.region in (EXPLORATION, COLLAPSE) and not one.settled]
    if uncertain:
        sentences.append(
            f"pass@1 at T = {_join(uncertain)} does not differ significantly from {keep:.0%} of the highest: the border of performance "
            "collapse is uncertain there."
        )
    ends = [name for name, one in (("coldest", regions[0]), ("hottest", regions[-1])) if one.temperature == best.temperature]
    if ends and len(regions) > 1:
        sentences.append(f"The highest pass@1 is at the {ends[0]} temperature of the grid: there may be a better one beyond it.")
    return sentences


def _evaluation_sentence(
    points: Sequence[TemperaturePoint], regions: Sequence[ClassifiedTemperature], best: TemperaturePoint, tied: Sequence[float]
) -> str:
    sentence = f"Evaluate at T = {best.temperature:g}: the highest pass@1."
    if not tied:
        return sentence if len(points) == 1 else f"{sentence} Every other temperature is significantly worse."
    sentence = f"{sentence} Not significantly worse: T = {_join(tied)}."
    outside = [one.temperature for one in regions if one.temperature in tied and one.region != ROBUST]
    if outside:
        sentence += f" Of these, T = {_join(outside)} is outside robust generation, because a temperature in between is worse."
    return sentence


def _length_sentences(points: Sequence[TemperaturePoint], best: TemperaturePoint, train: float | None) -> list[str]:
    """Where most completions are truncated, accuracy depends on the length limit."""
    advised = [point for point in points if point is best or point.temperature == train]
    truncated = [point for point in advised if point.truncated > MOSTLY_TRUNCATED]
    if not truncated:
        return []
    shares = " and ".join(f"{point.truncated:.0%} of the completions at T = {point.temperature:g}" for point in truncated)
    return [f"The length limit cuts {shares}: accuracy there depends on the limit. Fix: a larger max_completion_length."]


def _training_temperature(
    points: Sequence[TemperaturePoint], regions: Sequence[ClassifiedTemperature], best: TemperaturePoint
) -> tuple[float | None, str]:
    region_of = {classified.temperature: classified.region for classified in regions}
    exploring = [point for point in points if region_of[point.temperature] == EXPLORATION]
    robust = [point for point in points if region_of[point.temperature] == ROBUST and point.temperature > 0]
    remarks = []
    if exploring:
        chosen = max(exploring, key=lambda point: (point.gradient_share, -point.temperature))
        rule = "the most groups with a gradient in controlled exploration"
        others = [point for point in exploring if point is not chosen]
        equal = [point.temperature for point in others if point.gradient_share == chosen.gradient_share]
        similar = [point.temperature for point in others if not is_significant(difference(chosen.with_gradient, point.with_gradient))]
        if equal:
            remarks.append(f"T = {_join(equal)} gives exactly as many; the colder temperature is taken.")
        if similar := [temperature for temperature in similar if temperature not in equal]:
            remarks.append(f"T = {_join(similar)} does not give significantly fewer.")
        if chosen.distinct <= best.distinct:
            remarks.append(f"But its groups are no more diverse than those at T = {best.temperature:g}: it costs accuracy without a gain.")
    elif robust:
        chosen = robust[-1]
        rule = "the hottest of robust generation, since none of this grid lies in controlled exploration"
        remarks.append("Fix: temperatures between it and the next hotter one, or beyond the grid.")
    else:
        return None, "Train at: no advice. No temperature above 0 lies in robust generation or controlled exploration."
    details = [f"{chosen.gradient_share:.0%} of groups", f"{chosen.distinct:.0%} distinct completions"]
    if chosen.with_gradient_correct is not None:
        share = math.fsum(chosen.with_gradient_correct) / len(chosen.with_gradient_correct)
        details.insert(1, f"{share:.0%} by the correctness reward alone")
    if chosen.gradient_share == 0:
        remarks.append("No group at this temperature has a gradient: GRPO would learn nothing from these prompts and rewards.")
    return chosen.temperature, " ".join([f"Train at T = {chosen.temperature:g}: {rule} ({', '.join(details)}).", *remarks])


def _entropy_sentence(points: Sequence[TemperaturePoint]) -> str | None:
    warm = [point for point in points if point.temperature > 0]
    if not warm:
        return None
    rule = f"AceReason-Nemotron 1.1 trains where the entropy of softmax(z/T) is about {ENTROPY_TARGET:g} nats per token"
    where = temperature_at_entropy(points)
    if where is not None:
        return f"For comparison: {rule}; here that is T = {where:.2f}, interpolated linearly between its neighbours."
    low, high = min(warm, key=lambda point: point.entropy), max(warm, key=lambda point: point.entropy)
    return f"For comparison: {rule}; the entropies of this grid, {low.entropy:.2f} to {high.entropy:.2f}, do not reach it."


def _join(temperatures: Sequence[float]) -> str:
    names = [f"{temperature:g}" for temperature in temperatures]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
