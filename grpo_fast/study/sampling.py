"""``grpo-fast study sampling``: one model at several sampling temperatures, on the prompts and with the rewards of a training.

What is drawn and how it is scored is the trainer's: its samplers, its rewards, its forward passes. So the file of settings of a training
can be given, and what is found holds for that training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import grpo_fast as gf
from grpo_fast.metrics import consensus_at_k, pass_at_1, pass_at_k
from grpo_fast.rewards import FormatReward, canonical_answer, extract_answer
from grpo_fast.study.draw import Drawer, Drawn
from grpo_fast.study.estimates import Estimate, estimate
from grpo_fast.study.measures import by_group, distinct_shares
from grpo_fast.study.prepare import Prepared
from grpo_fast.study.zones import Point, Reading, read

__all__ = ["run", "summarise"]

FULL_MARKS = 1.0 - 1e-6
SHOWN, SHOWN_CHARACTERS = 2, 400  # completions of each temperature that are kept in the result, to be read
Progress = Callable[[float, int, int], None]


def run(prepared: Prepared, model: Any, on_calls: Progress = lambda temperature, done, total: None) -> dict[str, Any]:
    """Measure at every temperature. Returns what is written as JSON.

    Args:
        prepared: see `prepare`.
        model: see `load_model`.
        on_calls: told the temperature and how many calls of the sampler are done, of how many at this temperature.
    """
    drawer = Drawer(prepared, model)
    try:
        everything = [drawer.at(temperature, on_calls) for temperature in prepared.temperatures]
    finally:
        drawer.sampler.close()
        prepared.runner.close()
    rows, points = summarise(everything, prepared)
    reading = read(points, keep=prepared.options.keep) if points else Reading(sentences=[_nothing_to_score(prepared)])
    reading.sentences.extend(_notes(prepared, everything))
    options, config = prepared.options, prepared.config
    told = ("model", "dataset", "dataset_split", "rewards", "samples", "rounds", "ngram", "keep", "quick")
    sampled = ("max_completion_length", "top_p", "top_k", "min_p", "seed", "sampler")
    return {
        "kind": "temperature_sampling",
        "options": {name: getattr(options, name) for name in told} | {name: getattr(config, name) for name in sampled},
        "versions": {name: version(name) for name in ("torch", "transformers")} | {"grpo_fast": gf.__version__},
        "correct": prepared.runner.names[prepared.correct],
        "prompts": len(points[0].right) if points else 0,
        "prompts_without_answer": len(prepared.rows) - (len(points[0].right) if points else 0),
        "rows": rows,
        "reading": asdict(reading),
    }


def summarise(everything: Sequence[Drawn], prepared: Prepared) -> tuple[list[dict[str, Any]], list[Point]]:
    """One row of numbers per temperature, and what the reading needs of it. A prompt whose answer could not be scored at any temperature
    is left out of all; a completion that could not be scored, of a prompt that could, is not right.
    """
    each = everything[0].samples * everything[0].rounds
    scored = [by_group(drawn.rewards[:, prepared.correct].isfinite().tolist(), each) for drawn in everything]
    kept = [i for i in range(len(scored[0])) if any(any(table[i]) for table in scored)]
    if not kept:
        return [], []
    answers = [[_canonical(text) for text in drawn.texts] for drawn in everything]
    votes = any(answer is not None for stated in answers for answer in stated)
    found = [_row(drawn, stated if votes else None, kept, prepared) for drawn, stated in zip(everything, answers, strict=True)]
    return [row for row, _ in found], [point for _, point in found]


def _row(drawn: Drawn, answers: list[Any] | None, kept: list[int], prepared: Prepared) -> tuple[dict[str, Any], Point]:
    each, k = drawn.samples * drawn.rounds, drawn.samples

    def of_prompts(values: Sequence[Any], size: int) -> list[list[Any]]:
        groups = by_group(values, size)
        return [groups[i] for i in kept]

    def mean(values: Sequence[float], size: int = each) -> Estimate:
        return estimate([math.fsum(row) / len(row) for row in of_prompts(values, size)])

    right = of_prompts((drawn.rewards[:, prepared.correct].nan_to_num(0.0) >= FULL_MARKS).float().tolist(), each)
    at_1 = pass_at_1(right)
    consensus = None
    if answers is not None:
        rounds = [(by_group(stated, k), by_group(ok, k)) for stated, ok in zip(of_prompts(answers, each), right, strict=True)]
        consensus = estimate([consensus_at_k(*pair) for pair in rounds])
    signal = [1.0 - float(flat) for flat in drawn.no_signal]
    signals = [math.fsum(row) / len(row) for row in of_prompts(signal, drawn.rounds)]
    distinct = mean(distinct_shares(drawn.texts, k), drawn.rounds)
    truncated = mean(drawn.shape["truncated"])
    rewards = {}
    for name, column in zip(prepared.runner.names, drawn.rewards.T, strict=True):
        values = column[column.isfinite()]
        rewards[name] = values.mean().item() if values.numel() else None
    row = {
        "temperature": drawn.temperature,
        "pass_at_1": _numbers(Estimate(at_1.mean, at_1.prompt_error, at_1.prompts)) | {"sampling_error": _number(at_1.sampling_error)},
        "pass_at_k": _numbers(estimate([pass_at_k([results], k) for results in right])),
        "cons_at_k": None if consensus is None else _numbers(consensus),
        "format": _column(drawn, prepared, FormatReward, mean),
        "coherence": None if drawn.coherence is None else _numbers(mean(drawn.coherence)),
        **{name: _numbers(mean(values)) for name, values in drawn.shape.items()},
        "distinct": _numbers(distinct),
        "zero_std": _numbers(estimate([1.0 - share for share in signals])),
        "entropy": drawn.entropy,
        "entropy_at_1": drawn.entropy_at_1,
        "sampler_gap": drawn.sampler_gap,
        "rewards": rewards,
        "right": [math.fsum(results) / each for results in right],
        "examples": [text[:SHOWN_CHARACTERS] for text in drawn.texts[::each][:SHOWN]],
    }
    point = Point(drawn.temperature, row["right"], signals, distinct.mean, truncated.mean, drawn.entropy)  # type: ignore[arg-type]
    return row, point


def _column(drawn: Drawn, prepared: Prepared, kind: type, mean: Callable[[Sequence[float]], Estimate]) -> dict[str, Any] | None:
    for i, reward in enumerate(prepared.runner.reward_funcs):
        if isinstance(reward, kind):
            return _numbers(mean(drawn.rewards[:, i].nan_to_num(0.0).tolist()))
    return None


def _canonical(text: str) -> Any:
    stated = extract_answer(text)
    return None if stated is None else canonical_answer(stated)


def _numbers(found: Estimate) -> dict[str, float | None]:
    return {"mean": found.mean, "error": _number(found.error)}


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _nothing_to_score(prepared: Prepared) -> str:
    name = prepared.runner.names[prepared.correct]
    return f"No completion could be scored by {name}: it does not apply to any of these prompts. Cure: rows with an answer it can read."


def _notes(prepared: Prepared, everything: Sequence[Drawn]) -> list[str]:
    notes = []
    if prepared.options.samples == 1:
        notes.append("With one sample there are no groups: distinct completions and groups with a gradient mean nothing here.")
    limit = prepared.config.sampler_tolerance or (0.1 if prepared.config.bf16 or prepared.config.fp16 else 0.02)
    apart = [drawn for drawn in everything if drawn.sampler_gap is not None and drawn.sampler_gap > limit]
    if apart and not prepared.config.truncates:
        worst = max(apart, key=lambda drawn: drawn.sampler_gap or 0.0)
        notes.append(
            f"The sampler's log-probabilities differ from the loss's by {worst.sampler_gap:.2g} nats a token at T = "
            f"{worst.temperature:g} (expected {limit:g} at most): they are of other weights, or of another temperature."
        )
    if prepared.options.quick:
        notes.append("This was --quick: its figures mean nothing.")
    return notes
