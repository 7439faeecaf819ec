"""The study's statistics and advice, against tables worked by hand: errors, unbiased pass@k, votes, temperature regions, advice."""

from __future__ import annotations

import doctest
import json
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from grpo_fast.rewards import RewardRunner
from grpo_fast.study import estimates, options, plot, result_files, sampling, sampling_advice, training_summary
from grpo_fast.study.estimates import difference, estimate, is_significant
from grpo_fast.study.generate_completions import TemperatureSamples
from grpo_fast.study.sampling_advice import advise
from grpo_fast.study.sampling_summary import summarize_sampling
from grpo_fast.study.temperature_regions import COLD, COLLAPSE, EXPLORATION, ROBUST, TemperaturePoint, temperature_at_entropy
from grpo_fast.utils.errors import SettingsError


@pytest.mark.parametrize("module", [estimates, options, result_files, sampling_advice, training_summary])
def test_examples(module: Any) -> None:
    found = doctest.testmod(module)
    assert found.attempted > 0 and found.failed == 0


# ---- estimates


def test_the_error_is_over_prompts_and_not_over_samples() -> None:
    """Two prompts of which one is always correct: more samples per prompt do not reduce the error."""
    found = estimate([1.0, 0.0])
    assert (found.mean, found.error) == (0.5, 0.5)
    assert estimate([3.0]).mean == 3.0 and math.isnan(estimate([3.0]).error) and math.isinf(estimate([3.0]).margin)
    with pytest.raises(ValueError, match="values is empty"):
        estimate([])


@pytest.mark.parametrize(("units", "quantile"), [(2, 12.7062), (6, 2.5706), (31, 2.0423), (41, 2.0211), (121, 1.9799), (10**6, 1.9600)])
def test_the_margin_is_students(units: int, quantile: float) -> None:
    values = [0.0, 1.0] * (units // 2) + [0.5] * (units % 2)
    found = estimate(values)
    assert found.margin == pytest.approx(quantile * found.error, rel=1e-4)


def test_paired_differences_are_significant_where_unpaired_means_are_not() -> None:
    """Prompts differ by up to 0.9, and the second temperature loses 0.1 on each but one: only the paired comparison detects it."""
    mine = [0.1 * i for i in range(1, 11)]
    theirs = [value - 0.1 for value in mine[:-1]] + [mine[-1] - 0.05]
    assert is_significant(difference(mine, theirs)) and not is_significant(difference(theirs, theirs))
    assert abs(estimate(mine).mean - estimate(theirs).mean) < estimate(mine).error
    assert not is_significant(difference([1.0], [0.0])), "one pair is never significant"
    assert not is_significant(difference([1.0, 0.0, 1.0], [0.0, 0.0, 0.0])), "2/3 with an error of 1/3, and t is 4.3"
    with pytest.raises(ValueError, match="zip"):
        difference([1.0, 2.0], [1.0])


# ---- one row of the table


def samples(**changes: Any) -> TemperatureSamples:
    """Four prompts A, B, C, D with two rounds of two samples. C has no true answer; the third sample of D could not be decided;
    B has half marks once, and almost full ones."""
    nan = math.nan
    right = [1, 1, 1, 0] + [0, 0.5, 0, 0.99] + [nan] * 4 + [1, 0, nan, 1]
    stated = ["7", "7", "7", "8"] + [None, "", "9", "9"] + ["1"] * 4 + ["5", None, "4", "5"]
    texts = [f"<answer>{text}</answer>" if text else f"no answer {text}" for text in stated]
    form = [1.0] * 8 + [0.0] * 4 + [1.0, 0.0, 0.0, 0.0]
    flat = [True, False, True, True, True, True, False, False]  # A, A, B, B, C, C, D, D
    statistics = {"truncated": [0.0] * 15 + [1.0], "endless": [0.0] * 16, "repetition": [0.5] * 16, "length": [float(i) for i in range(16)]}
    given: dict[str, Any] = {
        "temperature": 0.6,
        "samples": 2,
        "rounds": 2,
        "rewards": torch.tensor([right, form]).T,
        "zero_std": flat,
        "statistics": statistics,
        "texts": texts,
        "coherence": None,
        "entropy": [0.1, 0.2, 9.0, 0.4],
        "entropy_at_1": [0.5] * 4,
        "sampler_gap": None,
    }
    return TemperatureSamples(**{**given, **changes})


def summary(*of: TemperatureSamples, rewards: tuple[str, ...] = ("accuracy", "format"), **told: Any) -> dict[str, Any]:
    runner = RewardRunner(list(rewards))
    study: Any = SimpleNamespace(runner=runner, correct=0)
    neutral = {"sampler_tolerance": None, "bf16": False, "fp16": False, "top_p": 1.0, "top_k": 0, "min_p": None}
    options = {"samples": 2, "rounds": 2, "keep": 0.5} | neutral | told
    result = {"options": options, "quick": False, "correct": "accuracy_reward", "drawn": [sampling.measure(one, study) for one in of]}
    result = json.loads(json.dumps(result))  # measurements are stored as JSON
    return result | summarize_sampling(result, [one.temperature for one in of])


def test_a_row_of_the_table_worked_by_hand() -> None:
    found = summary(samples())
    (row,), (one,) = found["rows"], found["drawn"]
    per_prompt = one["per_prompt"]
    assert per_prompt["right"] == [0.75, 0.0, None, 0.5], "partial credit of B is not correct, nor is the undecided sample of D"
    assert (found["prompts"], found["prompts_without_answer"]) == (3, 1), "C is left out"
    at_1 = row["pass_at_1"]
    assert at_1["mean"] == pytest.approx(1.25 / 3)
    assert at_1["error"] == pytest.approx(0.220479, abs=1e-6)  # sqrt(((1/3)^2 + (5/12)^2 + (1/12)^2) / 2 / 3)
    assert at_1["sampling_error"] == pytest.approx(0.127294, abs=1e-6)  # sqrt((1/4 + 0 + 1/3) / 4) / 3
    assert row["pass_at_k"]["mean"] == pytest.approx((1 + 0 + 5 / 6) / 3)  # 1 - C(1,2)/C(4,2), 0, 1 - C(2,2)/C(4,2)
    assert per_prompt["cons_at_k"][0] == 0.75 and row["cons_at_k"]["mean"] == pytest.approx(
        (0.75 + 0 + 0.75) / 3
    )  # A: 1, a tie; D: 1, a tie
    assert per_prompt["zero_std"] == [0.5, 1.0, 1.0, 0.0] and row["zero_std"]["mean"] == pytest.approx((0.5 + 1 + 0) / 3)
    assert per_prompt["zero_std_correct"][:2] == [0.5, 0.0], "partial credit and no credit are different rewards"
    assert row["zero_std_correct"]["mean"] == pytest.approx((0.5 + 0 + 0.5) / 3)  # D: 1 and 0; alone
    assert row["distinct"]["mean"] == pytest.approx((0.75 + 0.75 + 1) / 3)
    assert row["format"]["mean"] == pytest.approx((1 + 1 + 0.25) / 3) and row["coherence"] is None
    assert row["length"]["mean"] == pytest.approx((1.5 + 5.5 + 13.5) / 3) and row["truncated"]["mean"] == pytest.approx(0.25 / 3)
    assert row["entropy"] == pytest.approx((0.1 * 1.5 + 0.2 * 5.5 + 0.4 * 13.5) / 20.5), "a mean over tokens, without those of C"
    assert row["entropy_at_1"] == pytest.approx(0.5) and row["sampler_gap"] is None
    assert row["rewards"]["accuracy_reward"] == pytest.approx((0.75 + 1.49 / 4 + 2 / 3) / 3)
    assert row["rewards"]["format_reward"] == pytest.approx(2.25 / 3), "C is left out of the rewards too"
    assert one["examples"] == ["<answer>7</answer>", "no answer None"] and "Train at T = 0.6" in found["advice"]["sentences"][-2]


def test_examples_are_of_prompts_with_an_answer() -> None:
    rewards = samples().rewards.clone()
    rewards[:4, 0] = math.nan
    assert summary(samples(rewards=rewards))["drawn"][0]["examples"] == ["no answer None", "<answer>5</answer>"]


def test_without_answers_there_is_no_vote_and_without_format_reward_no_form() -> None:
    found = summary(samples(texts=["nothing stated"] * 16, rewards=samples().rewards[:, :1]), rewards=("accuracy",))
    (row,) = found["rows"]
    assert row["cons_at_k"] is None and row["format"] is None and row["distinct"]["mean"] == 0.5


def test_a_prompt_counts_at_all_temperatures_or_at_none() -> None:
    """C could be scored at the second temperature, so at the first its samples count as wrong, and comparisons stay paired."""
    rewards = samples().rewards.clone()
    rewards[8, 0] = 1.0
    found = summary(samples(), samples(temperature=1.0, rewards=rewards))
    assert [row["pass_at_1"]["mean"] for row in found["rows"]] == [1.25 / 4, 1.5 / 4]
    assert found["prompts_without_answer"] == 0


def test_nothing_to_score() -> None:
    found = summary(samples(rewards=torch.full((16, 2), math.nan)))
    assert found["rows"] == [] and found["advice"]["regions"] == []
    assert found["advice"]["sentences"][0].startswith("No completion could be scored by accuracy_reward")


def test_a_gap_between_sampler_and_loss_is_reported_unless_truncation_explains_it() -> None:
    def told(gap: float, **options: Any) -> bool:
        sentences = summary(samples(sampler_gap=[gap] * 4), **options)["advice"]["sentences"]
        return any("The sampler's log-probabilities differ from the loss's by" in sentence for sentence in sentences)

    assert told(0.03) and not told(0.01)
    assert not told(0.03, sampler_tolerance=0.05) and told(0.01, sampler_tolerance=0.005)
    assert not told(0.03, bf16=True) and told(0.2, fp16=True)
    for truncation in (
        {"top_p": 0.9},
        {"top_k": 5},
        {"min_p": 0.1},
        {"repetition_penalty": 1.2},
        {"generation_kwargs": {"typical_p": 0.9}},
    ):
        assert not told(3.0, **truncation), "such a sampler has other probabilities"


# ---- temperature regions


def table(signal: dict[float, float] | None = None, **by_temperature: float) -> list[TemperaturePoint]:
    """T0_6=0.7: pass@1 of 0.7 at T = 0.6, the same for each of 40 prompts, so that every difference is significant."""
    points = []
    for name, right in by_temperature.items():
        temperature = float(name.removeprefix("T").replace("_", "."))
        share = (signal or {}).get(temperature, 0.5)
        points.append(TemperaturePoint(temperature, [right] * 40, [share] * 40, 0.1 + temperature / 2, 0.0, temperature / 2))
    return points


def noisy(temperature: float, right: float, *, spread: float, distinct: float = 0.5, truncated: float = 0.0) -> TemperaturePoint:
    """Prompts scattered around a mean, differently at each temperature."""
    values = [right + spread * math.sin(i * (1 + 7 * temperature)) for i in range(40)]
    return TemperaturePoint(temperature, values, [0.5] * 40, distinct, truncated, temperature)


def regions_of(points: list[TemperaturePoint], **more: Any) -> dict[float, str]:
    return {one.temperature: one.region for one in advise(points, **more).regions}


def test_the_three_regions_and_the_cold_side() -> None:
    points = table(T0=0.0, T0_2=0.3, T0_6=0.8, T1_0=0.6, T1_2=0.4, T1_4=0.39)
    expected = {0.0: COLD, 0.2: COLD, 0.6: ROBUST, 1.0: EXPLORATION, 1.2: EXPLORATION, 1.4: COLLAPSE}
    assert regions_of(points) == expected
    assert regions_of(points[::-1]) == expected, "whatever the order"
    assert regions_of(points, keep=0.6)[1.2] == COLLAPSE and regions_of(points, keep=0.8)[1.0] == COLLAPSE
    advice = advise(points)
    assert advice.evaluate == 0.6 and advice.tied == []
    assert "Evaluate at T = 0.6: the highest pass@1. Every other temperature is significantly worse." in advice.sentences
    assert advice.sentences[0].startswith("Regions. too cold: 0 and 0.2 ")


def test_every_temperature_above_the_first_collapse_is_collapse() -> None:
    """A hotter temperature with a higher accuracy by chance is not controlled exploration."""
    assert regions_of(table(T0_6=0.8, T1_0=0.3, T1_4=0.5)) == {0.6: ROBUST, 1.0: COLLAPSE, 1.4: COLLAPSE}


def test_robust_are_the_neighbours_that_do_not_differ_significantly_from_the_best() -> None:
    points = [noisy(0.2, 0.1, spread=0.05), noisy(0.6, 0.62, spread=0.2), noisy(0.8, 0.64, spread=0.2), noisy(1.0, 0.60, spread=0.2)]
    points += [noisy(1.4, 0.40, spread=0.05)]
    advice = advise(points)
    assert regions_of(points) == {0.2: COLD, 0.6: ROBUST, 0.8: ROBUST, 1.0: ROBUST, 1.4: EXPLORATION}
    assert advice.evaluate == 0.8 and advice.tied == [0.6, 1.0]
    assert any("Not significantly worse: T = 0.6 and 1." in sentence for sentence in advice.sentences)
    assert [one.settled for one in advice.regions] == [True, False, True, False, True]


def test_a_tie_with_the_best_beyond_a_gap_is_not_robust() -> None:
    points = [noisy(0.2, 0.61, spread=0.3), *table(T0_6=0.3), noisy(1.0, 0.62, spread=0.3)]
    assert regions_of(points) == {0.2: COLD, 0.6: COLD, 1.0: ROBUST}
    advice = advise(points)
    assert advice.tied == [0.2] and [one.settled for one in advice.regions] == [False, True, True]
    told = "Of these, T = 0.2 is outside robust generation, because a temperature in between is worse."
    assert any(told in sentence for sentence in advice.sentences) and "lower" not in advice.sentences[0]
    beside = [noisy(0.6, 0.61, spread=0.3), noisy(1.0, 0.62, spread=0.3)]
    assert not any("Of these" in sentence for sentence in advise(beside).sentences)


def test_one_sample_per_prompt_gives_no_advice_on_training() -> None:
    flat = table(T0_6=0.8, T1_0=0.6, signal={0.6: 0.0, 1.0: 0.0})
    advice = advise(flat, samples=1)
    assert advice.train is None and advice.evaluate == 0.6
    assert any("With one sample there are no groups" in sentence for sentence in advice.sentences)
    assert not any("would learn nothing" in sentence for sentence in advice.sentences)
    assert advise(flat, samples=2).train == 1.0


def test_advice_with_mostly_truncated_completions_is_qualified() -> None:
    def told(cut: dict[float, float]) -> list[str]:
        points = [replace(point, truncated=cut.get(point.temperature, 0.0)) for point in table(T0_6=0.8, T1_0=0.6, T1_4=0.1)]
        return [sentence for sentence in advise(points).sentences if "length limit" in sentence]

    assert told({0.6: 0.5, 1.0: 0.5, 1.4: 1.0}) == [], "half is not most, and 1.4 is not advised"
    assert told({0.6: 0.51})[0].startswith("The length limit cuts 51% of the completions at T = 0.6: ")
    assert told({0.6: 0.9, 1.0: 0.8})[0].startswith("The length limit cuts 90% of the completions at T = 0.6 and 80% of the comple")


def test_insufficient_data_is_reported() -> None:
    points = [noisy(0.2, 0.60, spread=0.3), noisy(0.6, 0.62, spread=0.3), noisy(1.0, 0.58, spread=0.3)]
    advice = advise(points)
    assert set(regions_of(points).values()) == {ROBUST}
    assert any(sentence.startswith("The data cannot tell these temperatures apart.") for sentence in advice.sentences)
    assert advice.train == 1.0, "no temperature of controlled exploration: the hottest of the robust ones"
    assert any("none of this grid lies in controlled exploration" in sentence for sentence in advice.sentences)


def test_an_uncertain_border_of_collapse_is_reported() -> None:
    points = [*table(T0_6=0.8), noisy(1.0, 0.41, spread=0.3), noisy(1.4, 0.1, spread=0.05)]
    advice = advise(points)
    assert regions_of(points) == {0.6: ROBUST, 1.0: EXPLORATION, 1.4: COLLAPSE}
    assert any("pass@1 at T = 1 does not differ significantly from 50% of the highest" in sentence for sentence in advice.sentences)
    assert not any("from 50%" in sentence for sentence in advise(table(T0_6=0.8, T1_0=0.6)).sentences)


def test_equal_bests_go_to_the_less_truncated_and_then_to_the_colder() -> None:
    cold, warm, hot = table(T0_6=0.5, T0_8=0.5, T1_0=0.5)
    assert advise([hot, warm, cold]).evaluate == 0.6
    assert advise([TemperaturePoint(0.6, [0.5] * 40, [0.5] * 40, 0.5, 0.2, 0.3), hot, warm]).evaluate == 0.8


def test_train_where_most_groups_have_a_gradient_in_controlled_exploration() -> None:
    points = table(T0_6=0.8, T0_8=0.7, T1_0=0.6, T1_2=0.5, T1_4=0.1, signal={0.6: 0.1, 0.8: 0.3, 1.0: 0.8, 1.2: 0.7, 1.4: 0.9})
    assert advise(points).train == 1.0
    tie = table(T0_6=0.8, T0_8=0.7, T1_0=0.6, signal={0.8: 0.4, 1.0: 0.4})
    assert advise(tie).train == 0.8, "the colder of two equal temperatures"
    decided = "T = 1 gives exactly as many; the colder temperature is taken."
    assert any(decided in sentence and "significantly" not in sentence for sentence in advise(tie).sentences)
    cold, warm, hot = table(T0_6=0.8, T0_8=0.7, T1_0=0.6)
    near = [replace(warm, with_gradient=[0.4, 0.6] * 20), replace(hot, with_gradient=[0.6, 0.39] * 20)]
    (sentence,) = (sentence for sentence in advise([cold, *near]).sentences if sentence.startswith("Train at"))
    assert "T = 1 does not give significantly fewer." in sentence and "exactly" not in sentence
    assert "correctness reward" not in sentence, "without its values it is not mentioned"
    near[0] = replace(near[0], with_gradient_correct=[0.25] * 40)
    assert any(
        "(50% of groups, 25% by the correctness reward alone, 50% distinct" in sentence for sentence in advise([cold, *near]).sentences
    )


def test_a_training_temperature_without_more_diversity_is_qualified() -> None:
    warm, hot = table(T0_6=0.8, T1_0=0.6)
    flat = TemperaturePoint(1.0, hot.correct, hot.with_gradient, warm.distinct, 0.0, 0.5)
    assert any("no more diverse" in sentence for sentence in advise([warm, flat]).sentences)
    assert not any("no more diverse" in sentence for sentence in advise([warm, hot]).sentences)


def test_greedy_decoding_is_never_advised_for_training_and_a_choice_without_gradient_is_reported() -> None:
    alone = advise(table(T0=0.8))
    assert alone.train is None and alone.evaluate == 0.0 and "no advice" in alone.sentences[-1]
    assert advise(table(T0=0.8, T0_6=0.1)).train is None
    dead = advise(table(T0_6=1.0, T1_0=0.9, signal={0.6: 0.0, 1.0: 0.0}))
    assert dead.train == 1.0 and any("No group at this temperature has a gradient" in sentence for sentence in dead.sentences)


def test_a_best_temperature_at_the_edge_of_the_grid_is_reported() -> None:
    assert any("at the coldest temperature of the grid" in sentence for sentence in advise(table(T0_6=0.8, T1_0=0.6)).sentences)
    assert any("at the hottest temperature of the grid" in sentence for sentence in advise(table(T0_6=0.5, T1_0=0.6)).sentences)
    inside = advise(table(T0_2=0.1, T0_6=0.8, T1_0=0.6)).sentences
    assert not any("temperature of the grid" in sentence for sentence in inside)


def test_without_correct_completions_there_are_no_regions() -> None:
    advice = advise(table(T0=0.0, T1_0=0.0))
    assert advice.regions == [] and advice.evaluate is None and advice.train is None and "No completion was correct" in advice.sentences[0]


def test_temperature_at_the_entropy_target() -> None:
    points = table(T0=0.5, T0_4=0.5, T0_8=0.5, T1_0=0.5)  # entropies 0, 0.2, 0.4, 0.5
    assert temperature_at_entropy(points) == pytest.approx(0.6)
    assert temperature_at_entropy(points, 0.6) is None and temperature_at_entropy(points, 0.1) is None, "T = 0 is not interpolated from"
    assert any("here that is T = 0.60" in sentence for sentence in advise(points).sentences)
    assert any("do not reach it" in sentence for sentence in advise(table(T0_2=0.5, T0_4=0.4)).sentences)


# ---- options


def test_temperatures_are_parsed_and_sorted() -> None:
    assert options.sampling_temperatures(["1.0", 0, "0.6"]) == [0.0, 0.6, 1.0]
    found = options.training_temperatures(["1.0", "0.6->1.4"], steps=5)
    assert found == {"1": {"kind": "constant", "value": 1.0}, "0.6->1.4": {"kind": "linear", "start": 0.6, "end": 1.4, "steps": 4}}


@pytest.mark.parametrize("wrong", [["hot"], ["-1"], ["nan"], ["inf"], ["0.6->1.4"], ["0.6", "0.60"], []])
def test_wrong_sampling_temperatures_are_named(wrong: list[str]) -> None:
    with pytest.raises(SettingsError, match=r"^temperatures (has|is) .*; expected"):
        options.sampling_temperatures(wrong)


@pytest.mark.parametrize("wrong", [["hot"], ["-1"], ["0"], ["0->1"], ["1->"], ["1->2->3"], ["1", "1.0"], ["1->2", "1.0->2.0"], []])
def test_wrong_training_temperatures_are_named(wrong: list[str]) -> None:
    with pytest.raises(SettingsError, match=r"^temperatures (has|is) .*; expected"):
        options.training_temperatures(wrong, steps=5)


# ---- figures


def test_steps_count_from_one() -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure()
    axis = figure.subplots()
    plot._draw_band(axis, training_summary.mean_curve([[0.1, 0.2, 0.3], [0.3, 0.2, 0.1]]), "black", "-")
    (line,), (band,) = axis.lines, axis.collections
    assert list(line.get_xdata()) == [1, 2, 3] and list(line.get_ydata()) == pytest.approx([0.2] * 3)
    assert band.get_paths()[0].get_extents().x0 == 1.0
