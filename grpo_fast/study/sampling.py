"""``grpo-fast study sampling``: one model at several sampling temperatures, on the prompts and with the rewards of a training.

What is drawn and how it is scored is the trainer's: its samplers, its rewards, its forward passes. So the file of settings of a training
can be given, and what is found holds for that training. A temperature that is drawn is kept, prompt by prompt, before the next begins.
Means, errors and advice follow from what is kept, and a study that is started again goes on from there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from grpo_fast.loss.statistics import zero_variance_share
from grpo_fast.rewards import FormatReward, canonical_answer, extract_answer
from grpo_fast.study.estimates import Estimate, by_group, estimate
from grpo_fast.study.generate_completions import Drawer, Drawn
from grpo_fast.study.result_files import made_with, made_with_others
from grpo_fast.study.sampling_setup import Prepared
from grpo_fast.study.temperature_regions import Point, Reading, read
from grpo_fast.utils.statistics import consensus_at_k, pass_at_1, pass_at_k
from grpo_fast.utils.text_statistics import distinct_shares

__all__ = ["kept", "run", "summarise"]

FULL_MARKS = 1.0 - 1e-6
SHOWN, SHOWN_CHARACTERS = 2, 400  # completions of each temperature that are kept in the result, to be read
Progress = Callable[[float, int, int], None]
Keep = Callable[[dict[str, Any]], None]


def run(
    prepared: Prepared,
    model: Any,
    on_calls: Progress = lambda temperature, done, total: None,
    keep: Keep = lambda result: None,
) -> dict[str, Any]:
    """Measure at every temperature that is missing. Returns what is written as JSON.

    Args:
        prepared: see `prepare`.
        model: see `load_model`; it is not needed where no temperature is missing.
        on_calls: told the temperature and how many calls of the sampler are done, of how many at this temperature.
        keep: given the result so far, after each temperature.
    """
    result, made = prepared.result, made_with()  # before anything is written: a checkout that holds its result is another
    try:
        if missing := prepared.missing():
            drawer = Drawer(prepared, model)
            try:
                for temperature in missing:
                    began = time.perf_counter()
                    found = kept(drawer.at(temperature, on_calls), prepared)
                    result["drawn"].append(found | {"seconds": time.perf_counter() - began, "made_with": made})
                    result["drawn"].sort(key=lambda one: one["temperature"])
                    keep(result)
            finally:
                drawer.sampler.close()
    finally:
        prepared.runner.close()
    return result | summarise(result, prepared.temperatures)


def kept(drawn: Drawn, prepared: Prepared) -> dict[str, Any]:
    """What is kept of one temperature: each measure of each of the N prompts, its mean over all that was drawn for it.

    Returns:
        ``per_prompt``: by measure, N numbers, or None where nothing has it. ``right`` has None for a prompt of which no completion could be
        scored; a completion that could not, of a prompt of which one could, is not right. ``stated``: the share of completions with an
        answer that can be read. ``zero_std_correct``: as ``zero_std``, of the judging reward alone. Entropies are means over the
        prompt's tokens.
    """
    k, rounds = drawn.samples, drawn.rounds
    each = k * rounds
    judged = drawn.rewards[:, prepared.correct]
    right = by_group((judged.nan_to_num(0.0) >= FULL_MARKS).float().tolist(), each)
    scored = [any(row) for row in by_group(judged.isfinite().tolist(), each)]
    stated = [_canonical(text) for text in drawn.texts]
    answers = by_group(stated, each)

    def means(values: Sequence[float], size: int = each) -> list[float]:
        return [math.fsum(row) / size for row in by_group(values, size)]

    form = next((column for column, of in _columns(drawn, prepared) if isinstance(of, FormatReward)), None)
    equal = [zero_variance_share(judged[start : start + k], k) for start in range(0, len(judged), k)]
    per_prompt = {
        "right": [math.fsum(row) / each if ok else None for row, ok in zip(right, scored, strict=True)],
        "stated": means([float(answer is not None) for answer in stated]),
        "cons_at_k": [consensus_at_k(by_group(a, k), by_group(r, k)) for a, r in zip(answers, right, strict=True)],
        "format": None if form is None else means(form.nan_to_num(0.0).tolist()),
        "coherence": None if drawn.coherence is None else means(drawn.coherence),
        **{name: means(values) for name, values in drawn.shape.items()},
        "distinct": means(distinct_shares(drawn.texts, k), rounds),
        "zero_std": means([float(flat) for flat in drawn.no_signal], rounds),
        "zero_std_correct": means(equal, rounds),
        "entropy": drawn.entropy,
        "entropy_at_1": drawn.entropy_at_1,
        "sampler_gap": drawn.sampler_gap,
    }
    rewards = {
        name: [_mean([value for value in row if math.isfinite(value)]) for row in by_group(column.tolist(), each)]
        for name, (column, _) in zip(prepared.runner.names, _columns(drawn, prepared), strict=True)
    }
    shown = [i for i, ok in enumerate(scored) if ok][:SHOWN]
    examples = [drawn.texts[i * each][:SHOWN_CHARACTERS] for i in shown]
    return {"temperature": drawn.temperature, "per_prompt": per_prompt, "rewards": rewards, "examples": examples}


def summarise(result: Mapping[str, Any], temperatures: Sequence[float]) -> dict[str, Any]:
    """Means over the prompts with their standard errors, and a reading in words, from nothing but what is kept.

    Args:
        result: with ``options``, ``quick``, ``correct`` and ``drawn``: one entry of `kept` per temperature.
        temperatures: those that are asked for, from cold to hot; ``drawn`` may hold more.

    Returns:
        ``temperatures``, ``prompts``, ``prompts_without_answer``, ``rows`` (one per temperature) and ``reading``. A prompt of which no
        completion could be scored at any of these temperatures is left out of every number.
    """
    told = result["options"]
    drawn = [next(one for one in result["drawn"] if one["temperature"] == temperature) for temperature in temperatures]
    asked = len(drawn[0]["per_prompt"]["right"])
    which = [i for i in range(asked) if any(one["per_prompt"]["right"][i] is not None for one in drawn)]
    rows, points = [], []
    if which:
        votes = any(share > 0 for one in drawn for share in one["per_prompt"]["stated"])
        found = [_row(one, which, votes, told) for one in drawn]
        rows, points = [row for row, _ in found], [point for _, point in found]
        reading = read(points, keep=told["keep"], samples=told["samples"])
    else:
        name = result["correct"]
        cure = "Cure: rows with an answer it can read."
        reading = Reading(sentences=[f"No completion could be scored by {name}: it does not apply to any of these prompts. {cure}"])
    reading.sentences.extend(_notes(rows, told))
    if (others := made_with_others(drawn)) is not None:
        reading.sentences.append(f"The temperatures were not all measured with the same: {others}.")
    if result["quick"]:
        reading.sentences.append("This was --quick: its figures mean nothing.")
    return {
        "temperatures": list(temperatures),
        "prompts": len(which),
        "prompts_without_answer": asked - len(which),
        "rows": rows,
        "reading": asdict(reading),
    }


def _row(one: Mapping[str, Any], which: Sequence[int], votes: bool, told: Mapping[str, Any]) -> tuple[dict[str, Any], Point]:
    """Of the prompts ``which``."""
    k, each, per_prompt = told["samples"], told["samples"] * told["rounds"], one["per_prompt"]

    def of(name: str) -> list[float] | None:
        values = per_prompt[name]
        return None if values is None else [values[i] or 0.0 for i in which]

    def measured(name: str) -> dict[str, float | None] | None:
        values = of(name)
        return None if values is None else estimate(values).as_dict()

    def over_tokens(name: str) -> float | None:
        values, lengths = of(name), of("length")
        if values is None or lengths is None:
            return None
        return math.fsum(value * length for value, length in zip(values, lengths, strict=True)) / (math.fsum(lengths) or 1.0)

    right = of("right") or []
    counts = [round(share * each) for share in right]
    results = [[1.0] * count + [0.0] * (each - count) for count in counts]
    at_1 = pass_at_1(results)
    row = {
        "temperature": one["temperature"],
        "pass_at_1": Estimate(at_1.mean, at_1.prompt_error, at_1.prompts).as_dict() | {"sampling_error": _number(at_1.sampling_error)},
        "pass_at_k": estimate([pass_at_k([result], k) for result in results]).as_dict(),
        "cons_at_k": measured("cons_at_k") if votes else None,
        **{name: measured(name) for name in ("format", "coherence", "truncated", "endless", "repetition", "length")},
        **{name: measured(name) for name in ("distinct", "zero_std", "zero_std_correct")},
        **{name: over_tokens(name) for name in ("entropy", "entropy_at_1", "sampler_gap")},
        "rewards": {
            name: _mean([value for value in (values[i] for i in which) if value is not None]) for name, values in one["rewards"].items()
        },
    }

    def with_signal(name: str) -> list[float]:
        return [1.0 - share for share in of(name) or []]

    distinct, truncated = (math.fsum(of(name) or []) / len(which) for name in ("distinct", "truncated"))
    entropy = over_tokens("entropy") or 0.0
    signals = with_signal("zero_std"), with_signal("zero_std_correct")
    return row, Point(one["temperature"], right, signals[0], distinct, truncated, entropy, signals[1])


def _columns(drawn: Drawn, prepared: Prepared) -> list[tuple[Any, Any]]:
    """Each reward's values, [B], and the reward."""
    return list(zip(drawn.rewards.T, prepared.runner.reward_funcs, strict=True))


def _canonical(text: str) -> Any:
    stated = extract_answer(text)
    return None if stated is None else canonical_answer(stated)


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _notes(rows: Sequence[Mapping[str, Any]], told: Mapping[str, Any]) -> list[str]:
    notes = []
    limit = told["sampler_tolerance"] or (0.1 if told["bf16"] or told["fp16"] else 0.02)
    truncates = told["top_p"] < 1 or told["top_k"] > 0 or bool(told["min_p"])
    apart = [row for row in rows if row["sampler_gap"] is not None and row["sampler_gap"] > limit]
    if apart and not truncates:
        worst = max(apart, key=lambda row: row["sampler_gap"])
        notes.append(
            f"The sampler's log-probabilities differ from the loss's by {worst['sampler_gap']:.2g} nats a token at T = "
            f"{worst['temperature']:g} (expected {limit:g} at most): they are of other weights, or of another temperature."
        )
    return notes
