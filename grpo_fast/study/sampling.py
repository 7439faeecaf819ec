"""``grpo-fast study sampling``: one model at several sampling temperatures, on the prompts and with the rewards of a training.

Completions are generated and scored by the trainer's own samplers, rewards and forward passes, so a training's settings file can be given
and the results hold for that training. The measurements of a temperature are stored, prompt by prompt, before the next one begins, and a
study that is started again continues from there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING

from grpo_fast.loss.statistics import zero_variance_share
from grpo_fast.rewards import FormatReward, canonical_answer, extract_answer
from grpo_fast.study.estimates import split_groups
from grpo_fast.study.generate_completions import OnCalls, TemperatureSampler, TemperatureSamples
from grpo_fast.study.result_files import JSONObject, versions
from grpo_fast.study.sampling_setup import SamplingStudy
from grpo_fast.study.sampling_summary import mean_or_none, summarize_sampling
from grpo_fast.utils.statistics import consensus_at_k
from grpo_fast.utils.text_statistics import distinct_shares

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["measure", "published_result", "run"]

FULL_MARKS = 1.0 - 1e-6
EXAMPLES, EXAMPLE_CHARACTERS = 2, 400  # completions of each temperature that the result shows


def run(
    study: SamplingStudy,
    model: PreTrainedModel | None,
    on_calls: OnCalls = lambda temperature, done, total: None,
    store: Callable[[JSONObject], None] = lambda measurements: None,
) -> JSONObject:
    """Measure at every temperature that is missing.

    Args:
        study: see `prepare_sampling`.
        model: see `load_model`; None if no temperature is missing.
        on_calls: called with the temperature, the number of finished sampler calls and their total at this temperature.
        store: called with all measurements after each temperature.

    Returns:
        The result, see `published_result`.
    """
    if study.result is not None:
        return study.result
    measurements = study.measurements
    made_with = versions()  # first: the commit of a checkout changes to "-dirty" with the first file that is written into it
    try:
        if missing := study.missing():
            assert model is not None
            generator = TemperatureSampler(study, model)
            try:
                for temperature in missing:
                    began = time.perf_counter()
                    found = measure(generator.generate(temperature, on_calls), study)
                    measurements["drawn"].append(found | {"seconds": time.perf_counter() - began, "made_with": made_with})
                    measurements["drawn"].sort(key=lambda one: one["temperature"])
                    store(measurements)
            finally:
                generator.sampler.close()
    finally:
        study.runner.close()
    return published_result(measurements, study.temperatures)


def published_result(measurements: JSONObject, temperatures: Sequence[float]) -> JSONObject:
    """Return what is published of finished measurements: no measurement of a single prompt.

    Returns:
        ``kind``, ``quick``, ``machine`` (on which the study began), ``options``, ``correct`` (name of the correctness reward), the keys of
        `summarize_sampling`, and ``runs``: of each temperature ``seconds``, ``made_with`` (see `versions`) and ``examples``.
    """
    head = {name: value for name, value in measurements.items() if name != "drawn"}
    runs = [
        {name: one.get(name) for name in ("temperature", "seconds", "made_with", "examples")}
        for one in measurements["drawn"]
        if one["temperature"] in temperatures
    ]
    return head | summarize_sampling(measurements, temperatures) | {"runs": runs}


def measure(samples: TemperatureSamples, study: SamplingStudy) -> JSONObject:
    """Average each measure over the completions of each of the N prompts.

    Returns:
        ``temperature``; ``per_prompt``, by measure N numbers, or None if the measure does not apply; ``rewards``, by reward N means; and
        ``examples``, a few completions. ``right`` is the share of correct completions, None for a prompt without any completion that could
        be scored; a completion that could not be scored is wrong if another one of its prompt could. ``stated``: the share of completions
        with a readable answer. ``zero_std_correct``: as ``zero_std``, by the correctness reward alone. Entropies are means over tokens.
    """
    k, rounds = samples.samples, samples.rounds
    each = k * rounds
    correctness = samples.rewards[:, study.correct]
    correct = split_groups((correctness.nan_to_num(0.0) >= FULL_MARKS).float().tolist(), each)
    scored = [any(row) for row in split_groups(correctness.isfinite().tolist(), each)]
    answers = split_groups([_answer(text) for text in samples.texts], each)

    def means(values: Sequence[float], size: int = each) -> list[float]:
        return [math.fsum(row) / size for row in split_groups(values, size)]

    columns = list(zip(study.runner.names, study.runner.reward_funcs, samples.rewards.T, strict=True))
    format_values = next((column for _, reward, column in columns if isinstance(reward, FormatReward)), None)
    votes = [consensus_at_k(split_groups(stated, k), split_groups(results, k)) for stated, results in zip(answers, correct, strict=True)]
    per_prompt = {
        "right": [math.fsum(row) / each if ok else None for row, ok in zip(correct, scored, strict=True)],
        "stated": [sum(answer is not None for answer in row) / each for row in answers],
        "cons_at_k": votes,
        "format": None if format_values is None else means(format_values.nan_to_num(0.0).tolist()),
        "coherence": None if samples.coherence is None else means(samples.coherence),
        **{name: means(values) for name, values in samples.statistics.items()},
        "distinct": means(distinct_shares(samples.texts, k), rounds),
        "zero_std": means([float(equal) for equal in samples.zero_std], rounds),
        "zero_std_correct": means([zero_variance_share(group, k) for group in correctness.split(k)], rounds),
        "entropy": samples.entropy,
        "entropy_at_1": samples.entropy_at_1,
        "sampler_gap": samples.sampler_gap,
    }
    rewards = {
        name: [mean_or_none([value for value in row if math.isfinite(value)]) for row in split_groups(column.tolist(), each)]
        for name, _, column in columns
    }
    shown = [i for i, ok in enumerate(scored) if ok][:EXAMPLES]
    examples = [samples.texts[i * each][:EXAMPLE_CHARACTERS] for i in shown]
    return {"temperature": samples.temperature, "per_prompt": per_prompt, "rewards": rewards, "examples": examples}


def _answer(text: str) -> Hashable | None:
    stated = extract_answer(text)
    return None if stated is None else canonical_answer(stated)
