"""Summary of a sampling study: means over the prompts with standard errors, paired comparisons of the temperatures, and advice."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from typing import Any

from grpo_fast.study.estimates import Estimate, EstimateJSON, difference, estimate
from grpo_fast.study.result_files import JSONObject, differing_versions
from grpo_fast.study.sampling_advice import SamplingAdvice, advise
from grpo_fast.study.temperature_regions import TemperaturePoint
from grpo_fast.utils.statistics import pass_at_1, pass_at_k

__all__ = ["COMPARED", "mean_or_none", "summarize_sampling"]

COMPARED = {"pass_at_1": "right", "cons_at_k": "cons_at_k", "zero_std": "zero_std", "zero_std_correct": "zero_std_correct"}
GAP_LIMIT, GAP_LIMIT_16_BIT = 0.02, 0.1  # expected difference of logprobs between sampler and loss, in nats per token


def summarize_sampling(measurements: Mapping[str, Any], temperatures: Sequence[float]) -> JSONObject:
    """Summarize the measurements at some temperatures.

    Args:
        measurements: with ``options``, ``quick``, ``correct`` and ``drawn``: one result of `measure` per temperature.
        temperatures: those that are asked for, from cold to hot; ``drawn`` may hold more.

    Returns:
        ``temperatures``, ``prompts``, ``prompts_without_answer``, ``rows`` (one per temperature), ``comparisons`` (of each pair of
        temperatures, the mean paired difference over the prompts, the colder one minus the hotter one, with its standard error, by the
        measures in COMPARED) and ``advice``, see `SamplingAdvice`. A prompt without any completion that could be scored, at any of these
        temperatures, is left out of every number.
    """
    options = measurements["options"]
    parts = [next(one for one in measurements["drawn"] if one["temperature"] == temperature) for temperature in temperatures]
    asked = len(parts[0]["per_prompt"]["right"])
    which = [i for i in range(asked) if any(one["per_prompt"]["right"][i] is not None for one in parts)]
    rows: list[JSONObject] = []
    comparisons: list[JSONObject] = []
    if which:
        votes = any(share > 0 for one in parts for share in one["per_prompt"]["stated"])
        values = [_values(one, which) for one in parts]
        rows = [_row(one, of_one, which, votes, options) for one, of_one in zip(parts, values, strict=True)]
        points = [_point(row, of_one) for row, of_one in zip(rows, values, strict=True)]
        comparisons = [
            {"measure": measure, "temperatures": [temperatures[i], temperatures[j]]}
            | dict(difference(values[i][name] or [], values[j][name] or []).as_dict())
            for measure, name in COMPARED.items()
            if votes or measure != "cons_at_k"
            for i, j in combinations(range(len(parts)), 2)
        ]
        advice = advise(points, keep=options["keep"], samples=options["samples"])
    else:
        message = f"No completion could be scored by {measurements['correct']}: it does not apply to any of these prompts."
        advice = SamplingAdvice(sentences=[f"{message} Fix: rows with an answer it can read."])
    advice.sentences.extend(_sampler_warnings(rows, options))
    if (others := differing_versions(parts)) is not None:
        advice.sentences.append(f"The temperatures were not all measured with the same: {others}.")
    if measurements["quick"]:
        advice.sentences.append("This was --quick: its figures mean nothing.")
    return {
        "temperatures": list(temperatures),
        "prompts": len(which),
        "prompts_without_answer": asked - len(which),
        "rows": rows,
        "comparisons": comparisons,
        "advice": asdict(advice),
    }


def mean_or_none(values: Sequence[float]) -> float | None:
    """Return the mean, or None for no values."""
    return math.fsum(values) / len(values) if values else None


def _values(one: Mapping[str, Any], which: Sequence[int]) -> dict[str, list[float] | None]:
    """Return each measure of the prompts ``which``; a prompt that could not be scored has 0 correct completions."""
    return {name: None if values is None else [values[i] or 0.0 for i in which] for name, values in one["per_prompt"].items()}


def _row(
    one: Mapping[str, Any], values: Mapping[str, list[float] | None], which: Sequence[int], votes: bool, options: Mapping[str, Any]
) -> JSONObject:
    """Summarize one temperature over the prompts ``which``."""
    k, each = options["samples"], options["samples"] * options["rounds"]

    def over_prompts(name: str) -> EstimateJSON | None:
        of_prompts = values[name]
        return None if of_prompts is None else estimate(of_prompts).as_dict()

    def over_tokens(name: str) -> float | None:
        of_prompts, lengths = values[name], values["length"] or []
        if of_prompts is None:
            return None
        return math.fsum(value * length for value, length in zip(of_prompts, lengths, strict=True)) / (math.fsum(lengths) or 1.0)

    counts = [round(share * each) for share in values["right"] or []]
    results = [[1.0] * count + [0.0] * (each - count) for count in counts]
    at_1 = pass_at_1(results)
    sampling_error = None if math.isnan(at_1.sampling_error) else at_1.sampling_error
    rewards = {name: mean_or_none([column[i] for i in which if column[i] is not None]) for name, column in one["rewards"].items()}
    return {
        "temperature": one["temperature"],
        "pass_at_1": {**Estimate(at_1.mean, at_1.prompt_error, at_1.prompts).as_dict(), "sampling_error": sampling_error},
        "pass_at_k": estimate([pass_at_k([result], k) for result in results]).as_dict(),
        "cons_at_k": over_prompts("cons_at_k") if votes else None,
        **{name: over_prompts(name) for name in ("format", "coherence", "truncated", "endless", "repetition", "length")},
        **{name: over_prompts(name) for name in ("distinct", "zero_std", "zero_std_correct")},
        **{name: over_tokens(name) for name in ("entropy", "entropy_at_1", "sampler_gap")},
        "rewards": rewards,
    }


def _point(row: JSONObject, values: Mapping[str, list[float] | None]) -> TemperaturePoint:
    with_gradient, with_gradient_correct = ([1.0 - share for share in values[name] or []] for name in ("zero_std", "zero_std_correct"))
    return TemperaturePoint(
        row["temperature"],
        values["right"] or [],
        with_gradient,
        row["distinct"]["mean"],
        row["truncated"]["mean"],
        row["entropy"] or 0.0,
        with_gradient_correct,
    )


def _sampler_warnings(rows: Sequence[JSONObject], options: Mapping[str, Any]) -> list[str]:
    """Warn if sampler and loss disagree on the log-probabilities; a sampler that truncates or penalises always does."""
    penalises = options.get("repetition_penalty", 1.0) != 1 or options.get("generation_kwargs")
    if options["top_p"] < 1 or options["top_k"] > 0 or options["min_p"] or penalises:
        return []
    limit = options["sampler_tolerance"] or (GAP_LIMIT_16_BIT if options["bf16"] or options["fp16"] else GAP_LIMIT)
    beyond = [row for row in rows if row["sampler_gap"] is not None and row["sampler_gap"] > limit]
    if not beyond:
        return []
    worst = max(beyond, key=lambda row: row["sampler_gap"])
    return [
        f"The sampler's log-probabilities differ from the loss's by {worst['sampler_gap']:.2g} nats per token at T = "
        f"{worst['temperature']:g} (expected at most {limit:g}): the sampler uses other weights, or another temperature."
    ]
