"""Parts of the trainer against values worked out by hand: what is logged, seeds, temperatures, tolerances, and modes of the model."""

from __future__ import annotations

import dataclasses
import math
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from trainer_cases import ROWS, TOKENIZER, Scripted, config, logs, model, odd_tokens, short, trainer

import grpo_fast as gf
from grpo_fast.generation import Completion, SamplerError, SamplingParams
from grpo_fast.generation.transformers_sampler import TransformersSampler
from grpo_fast.models.forward import ModelForward
from grpo_fast.trainer import GRPOTrainer
from grpo_fast.trainer.completions import CompletionRunner, GeneratedCompletion
from grpo_fast.trainer.diagnostics import completion_records, mean_weighted_reward, measure_loss, measure_rewards, measure_rollout
from grpo_fast.trainer.evaluation import EvaluatedCompletion, summarize_round, summarize_rounds
from grpo_fast.trainer.metrics import MetricAccumulator, Throughput
from grpo_fast.trainer.prompt_source import PromptSource
from grpo_fast.trainer.reference_policy import ReferencePolicy
from grpo_fast.trainer.rollout import MicroBatch, Rollout
from grpo_fast.trainer.sampler_check import LogprobGap, SamplerCheck

NAN = math.nan


def rows_of(lengths: list[int], **tokens: list[float]) -> Rollout:
    count = len(lengths)
    columns = {name: torch.tensor(values) for name, values in tokens.items()}
    return Rollout([[3, 4]] * count, [[5] * n for n in lengths], torch.ones(count), torch.zeros(count), torch.ones(count).bool(), columns)


def output_of(logprobs: list[float], active: list[bool], **metrics: float) -> gf.GRPOOutput:
    names = ("entropy", "clip_low", "clip_high", "clip_region", "ratio_mean", "ratio_max", "kl", "active_fraction")
    values = {name: torch.tensor(metrics.get(name, 0.0)) for name in names}
    return gf.GRPOOutput(torch.tensor(0.0), torch.tensor(logprobs), torch.zeros(len(logprobs)), torch.tensor(active), values)


# Metrics -----------------------------------------------------------------------------------------------------------------------


def test_what_is_logged_of_a_loss() -> None:
    metrics = MetricAccumulator()
    names = {"entropy": 1.0, "clip_low": 0.1, "clip_high": 0.2, "clip_region": 0.3, "ratio_mean": 1.5, "ratio_max": 4.0, "kl": 0.5}
    first = rows_of([2, 1], sampler=[-1.0, -2.0, -1.0], ref=[0.0] * 3)
    out = output_of([-1.5, -1.0, 9.0], [True, True, False], **names, active_fraction=1.0)
    whole = rows_of([2, 1, 4], sampler=[0.0] * 7, ref=[0.0] * 7)  # the last row was not computed
    measure_loss(metrics, out, MicroBatch(whole, 7, 3, on_policy=True), first, truncated=True)
    second = rows_of([1, 1], sampler=[-3.0, NAN])
    out = output_of([-2.0, 5.0], [True, False], **{name: 10 * value for name, value in names.items()}, active_fraction=0.5)
    measure_loss(metrics, out, MicroBatch(second, 2, 2, on_policy=True), second, truncated=True)
    found = metrics.read()
    assert found == pytest.approx(
        {
            "entropy": (2 * 1 + 1 * 10) / 3,  # weighted by the computed tokens
            "clip_ratio/low_mean": (2 * 0.1 + 1) / 3,
            "clip_ratio/high_mean": (2 * 0.2 + 2) / 3,
            "clip_ratio/region_mean": (2 * 0.3 + 3) / 3,
            "ratio/mean": (2 * 1.5 + 15) / 3,
            "ratio/max": 40.0,
            "kl": 0.5,  # only of the batch with a reference
            "active_fraction": (3 * 1.0 + 2 * 0.5) / (7 + 2),
            "sampling/sampling_logp_difference/mean": (0.5 + 1.0 + 1.0) / 3,
            "sampling/sampling_logp_difference/max": 1.0,
            "sampling/kept_mass": (math.exp(-0.5) + math.exp(1.0) + math.exp(1.0)) / 3,
        }
    )
    later = MetricAccumulator()
    measure_loss(later, output_of([-1.0], [True]), MicroBatch(second, 1, 1, on_policy=False), rows_of([1], sampler=[0.0]), truncated=True)
    assert not [name for name in later.read() if "sampling" in name], "after an update the policy is not the one that sampled"
    whole_vocabulary = MetricAccumulator()
    measure_loss(whole_vocabulary, output_of([0.0], [True]), MicroBatch(second, 1, 1, True), rows_of([1], sampler=[0.0]), truncated=False)
    assert "sampling/kept_mass" not in whole_vocabulary.read()


def test_what_is_logged_of_rewards() -> None:
    rewards = torch.tensor([[1.0, 2.0], [3.0, NAN], [NAN, NAN], [5.0, NAN]])
    weights = torch.tensor([1.0, 0.5])
    groups = gf.GroupAdvantages(torch.zeros(4), torch.zeros(2), torch.tensor([1.0, 2.0]), torch.tensor([True, False]))
    metrics = MetricAccumulator()
    measure_rewards(metrics, ["a", "b"], rewards, weights, groups)
    assert metrics.read() == pytest.approx(
        {
            "reward": (1 + 0.5 * 2 + 3 + 5) / 3,
            "reward_std_group": 1.5,
            "frac_reward_zero_std": 0.5,
            "rewards/a/mean": 3.0,
            "rewards/a/std": 2.0,  # unbiased: sqrt((4 + 0 + 4) / 2)
            "rewards/b/mean": 2.0,
            "rewards/b/std": 0.0,
        }
    )
    assert mean_weighted_reward(torch.full((2, 1), NAN), torch.ones(1)).isnan()


def generated(ids: list[int], text: str, finished: bool) -> GeneratedCompletion:
    return GeneratedCompletion([3, 4], Completion(ids, finished, None), text, {})


def test_what_is_logged_of_completions() -> None:
    ids = [[5, 6, 7, 8, 5, 6, 7, 8], [5, 6], [5]]
    completions = [generated(ids[0], "a", False), generated(ids[1], "b", True), generated(ids[2], "b", True)]
    rollout = Rollout([[3]] * 3, ids, torch.tensor([1.0, 1.0, 4.0]), torch.zeros(3), torch.ones(3).bool())
    metrics = MetricAccumulator()
    measure_rollout(metrics, completions, [0, 0, 1], rollout)
    found = metrics.read()
    expected = {
        "completions/mean_length": 11 / 3,
        "completions/mean_terminated_length": 1.5,
        "completions/max_length": 8.0,
        "completions/clipped_ratio": 1 / 3,
        "completions/distinct": 1.0,  # of each group, and then their mean
        "temperature": 2.0,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert 0 < found["completions/repetition"] < 1 / 3
    metrics = MetricAccumulator()
    measure_rollout(metrics, completions, [0, 1, 1], rollout)
    assert metrics.read()["completions/distinct"] == pytest.approx(0.75)
    (record, *_) = completion_records(7, ["?"] * 3, completions, ["r"], torch.tensor([[NAN], [1.0], [2.0]]), rollout)
    assert record["step"] == 7 and record["rewards"] == {"r": None} and record["completion"] == "a"


def test_metrics_are_merged_over_steps_and_seconds_divided_by_them() -> None:
    total, step = MetricAccumulator(), MetricAccumulator()
    step.add_sum("a", 6.0, 2.0)
    step.add_max("m", torch.tensor(3.0))
    step.add_seconds("s", 1.0)
    step.steps = 1
    total.merge(step)
    total.merge(step)
    total.add_max("m", torch.tensor(-1.0))
    total.add_sum("none", 0.0, 0.0)
    assert total.read() == {"a": 3.0, "m": 3.0, "s": 1.0} and total.total_seconds("s") == 2.0 and total.steps == 2


def test_metrics_of_two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Means are weighted by the values of each process, and seconds are the mean of the processes."""
    metrics = MetricAccumulator()
    metrics.add_sum("a", 6.0, 2.0)
    metrics.add_max("m", 1.0)
    metrics.add_min("n", 2.0)
    metrics.add_seconds("s", 4.0)
    other = ({"a": (0.0, 4.0)}, {"m": 3.0}, {"n": 1.0}, {"s": 2.0})
    monkeypatch.setattr("accelerate.utils.gather_object", lambda local: [*local, other])
    assert metrics.read() == {"a": 1.0, "m": 3.0, "n": 1.0, "s": 3.0}


def test_the_speed_counts_new_tokens_only(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([10.0, 12.0, 17.0])
    monkeypatch.setattr("grpo_fast.trainer.metrics.time.perf_counter", lambda: next(now))
    throughput = Throughput.__new__(Throughput)
    throughput.start(100)
    assert throughput.measure(300) == 100.0 and throughput.measure(300) is None and throughput.measure(400) == 20.0


def test_what_is_logged_of_an_evaluation() -> None:
    evaluated = [EvaluatedCompletion([1.0, NAN], 2, True, 0.5), EvaluatedCompletion([3.0, 4.0], 6, False, 0.0)]
    found = summarize_round(["a", "b"], torch.tensor([1.0, 0.5]), evaluated)
    assert found == pytest.approx(
        {
            "reward": (1 + 5) / 2,
            "rewards/a/mean": 2.0,
            "rewards/b/mean": 4.0,
            "completions/mean_length": 4.0,
            "completions/clipped_ratio": 0.5,
            "completions/repetition": 0.25,
        }
    )
    rounds = [{"reward": value, "rewards/a/mean": 2 * value} for value in (1.0, 2.0, 6.0)]
    error = math.sqrt(((1 - 3) ** 2 + (2 - 3) ** 2 + (6 - 3) ** 2) / 2 / 3)
    expected = {"e_reward": 3.0, "e_rewards/a/mean": 6.0, "e_reward_se": error, "e_rewards/a/se": 2 * error, "e_rounds": 3.0}
    assert summarize_rounds(rounds, "e") == pytest.approx(expected)


# Prompts, seeds and rollouts ---------------------------------------------------------------------------------------------------


def test_each_epoch_has_another_order_of_the_same_rows() -> None:
    rows = [{"prompt": str(number)} for number in range(9)]
    prompts = PromptSource(rows, 2, seed=3, shuffle=True)
    epochs = [[row["prompt"] for number in range(4) for row in prompts.rows(4 * epoch + number)] for epoch in range(3)]
    assert all(len(set(epoch)) == 8 for epoch in epochs) and len({tuple(epoch) for epoch in epochs}) == 3
    assert [row["prompt"] for row in prompts.rows(0)] == epochs[0][:2], "an earlier epoch has the same order again"
    assert [row["prompt"] for row in PromptSource(rows, 2, seed=4, shuffle=True).rows(0)] != epochs[0][:2]
    attempts = [[row["prompt"] for row in prompts.replacements(rollout, attempt, 6)] for rollout, attempt in ((0, 1), (0, 2), (1, 1))]
    assert len({tuple(each) for each in attempts}) == 3


def test_each_rollout_and_each_round_of_an_evaluation_has_its_own_random_numbers(tmp_path: Path) -> None:
    sampler = Scripted()
    run = trainer(tmp_path, sampler=sampler, max_steps=3, num_iterations=2, eval_rounds=2, dynamic_sampling_attempts=1, seed=5, data_seed=1)
    run.train()
    run.evaluate(ROWS[:3])
    run.evaluate(ROWS[:3])
    seeds = [params.seed for _, params in sampler.calls]
    rollouts, evaluations = seeds[:-4], seeds[-4:]
    assert len(set(rollouts)) == len(rollouts) >= 2 and evaluations[:2] == evaluations[2:] and evaluations[0] != evaluations[1]
    again = Scripted()
    trainer(tmp_path, sampler=again, seed=6, data_seed=1).train()
    assert again.calls[0][0] == sampler.calls[0][0] and again.calls[0][1].seed != seeds[0]


def test_groups_that_are_drawn_again_have_other_random_numbers(tmp_path: Path) -> None:
    sampler = Scripted()
    trainer(tmp_path, sampler=sampler, rewards=[lambda completions, **_: [1.0] * len(completions)], dynamic_sampling_attempts=2).train()
    assert len({params.seed for _, params in sampler.calls}) == len(sampler.calls) == 3


def test_the_second_minibatch_of_a_rollout_has_old_log_probabilities(tmp_path: Path) -> None:
    for settings, needs in (({"steps_per_generation": 2, "max_steps": 2}, True), ({}, False)):
        run = trainer(tmp_path, sampler=Scripted(), per_device_train_batch_size=8, **settings)
        run.train()
        assert run.rollout is not None and ("old" in run.rollout.tokens) == needs


def test_settings_reach_the_sampler(tmp_path: Path) -> None:
    sampler = Scripted()
    truncation: dict[str, Any] = {"top_p": 0.9, "top_k": 7, "min_p": 0.01}
    run = trainer(tmp_path, sampler=sampler, temperature=0.9, eval_temperature=0.3, eval_top_p=0.5, eval_rounds=1, **truncation)
    run.train()
    run.evaluate(ROWS[:3])
    (_, drawn), (prompts, evaluated) = sampler.calls
    assert (drawn.top_p, drawn.top_k, drawn.min_p, set(drawn.temperatures)) == (0.9, 7, 0.01, {0.9})
    assert (evaluated.top_p, evaluated.top_k, evaluated.min_p, evaluated.temperatures) == (0.5, 0, 0.0, [0.3] * 3) and len(prompts) == 3
    assert drawn.max_new_tokens == 8 and drawn.eos_token_id == [TOKENIZER.eos_token_id] and drawn.pad_token_id == TOKENIZER.pad_token_id


def test_an_adaptive_temperature_is_steered_once_per_rollout(tmp_path: Path) -> None:
    schedule = {"kind": "entropy", "target": 0.1, "gain": 0.5}
    run = trainer(tmp_path, sampler=Scripted(), max_steps=5, num_iterations=2, temperature_schedule=schedule)
    observed: list[dict[str, float]] = []
    run.temperatures.observe = observed.append  # type: ignore[method-assign, assignment]
    run.train()
    assert len(observed) == 3, "the first step of each of three rollouts"
    entropies = [log["entropy"] for log in logs(run)]
    assert [metrics["entropy"] for metrics in observed] == entropies[::2]


def test_log_probabilities_of_the_old_policy_are_without_dropout() -> None:
    of = model(attention_dropout=0.5)
    forward = ModelForward(SimpleNamespace(device=torch.device("cpu"), autocast=torch.no_grad), TOKENIZER.pad_token_id)
    rows = rows_of([3, 2])
    expected = forward.logprobs(of.eval(), rows, batch_size=2)
    torch.testing.assert_close(forward.logprobs(of.train(), rows, batch_size=1), expected)
    torch.testing.assert_close(forward.logprobs_at(of, rows, rows.temperature), expected.logprobs)
    assert of.training and all(module.training for module in of.modules()), "the mode is as before"


@pytest.mark.parametrize("alpha", [0.25, 1.0])
def test_a_copy_follows_the_policy(tmp_path: Path, alpha: float) -> None:
    args = config(tmp_path, beta=0.1, sync_ref_model=True, ref_model_sync_steps=2, ref_model_mixup_alpha=alpha)
    policy, start = model(1), model(0)
    reference = ReferencePolicy(start, args)
    for step in (0, 1, 3):
        reference.follow(policy, policy, step)
        assert all(torch.equal(found, value) for found, value in zip(_copied(reference), start.parameters(), strict=True))
    reference.follow(policy, policy, 2)
    for found, old, new in zip(_copied(reference), start.parameters(), policy.parameters(), strict=True):
        torch.testing.assert_close(found, alpha * new.detach() + (1 - alpha) * old.detach())
    assert not any(p.requires_grad for p in _copied(reference))


def _copied(reference: ReferencePolicy) -> list[Tensor]:
    assert reference.copy is not None and not reference.copy.training
    return list(reference.copy.parameters())


# The sampler's check -----------------------------------------------------------------------------------------------------------


def check_with(tmp_path: Path, gap: float, *, truncation: float = 0.0, **settings: Any) -> None:
    """Check a batch whose sampler's log-probabilities are higher than ours by ``gap``."""
    args = config(tmp_path, sampler_tolerance_patience=2, **settings)
    rows = rows_of([2], sampler=[-1.0 + gap, NAN])
    losses = [(output_of([-1.0, 0.0], [True, False]), MicroBatch(rows, 2, 1, on_policy=True))]
    state = SimpleNamespace(
        args=args, rollouts=None, state=SimpleNamespace(global_step=0), accelerator=SimpleNamespace(is_main_process=True)
    )
    check: Any = SamplerCheck(state)  # type: ignore[arg-type]
    check._explain = lambda batch: "explained."
    check.check(losses)
    assert check.done and check.excesses == 0


@pytest.mark.parametrize(
    ("settings", "tolerance"), [({}, 0.02), ({"bf16": True}, 0.1), ({"fp16": True}, 0.1), ({"sampler_tolerance": 0.3, "bf16": True}, 0.3)]
)
def test_the_tolerance_of_the_first_step(tmp_path: Path, settings: dict[str, Any], tolerance: float) -> None:
    for sign in (-1, 1):
        check_with(tmp_path, sign * 0.9 * tolerance, **settings)
        with pytest.raises(SamplerError, match=f"sampler_tolerance = {tolerance:g} nats a token"):
            check_with(tmp_path, sign * 1.1 * tolerance, **settings)


def test_truncation_explains_a_higher_log_probability_of_the_sampler_only(tmp_path: Path) -> None:
    cut: dict[str, Any] = {"top_p": 0.5}
    check_with(tmp_path, math.log(2) + 0.01, **cut)
    for gap in (math.log(2) + 0.03, -0.03):
        with pytest.raises(SamplerError):
            check_with(tmp_path, gap, **cut)


def test_the_largest_gap_of_the_processes_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grpo_fast.trainer.sampler_check.gather_object", lambda local: [*local, LogprobGap(0.0, 1)])
    with pytest.raises(SamplerError):
        check_with(tmp_path, 1.0)


def test_an_excess_stops_the_run_when_it_repeats(tmp_path: Path) -> None:
    args = config(tmp_path, sampler_tolerance_patience=2)
    state = SimpleNamespace(
        args=args, rollouts=None, state=SimpleNamespace(global_step=4), accelerator=SimpleNamespace(is_main_process=True)
    )
    check = SamplerCheck(state)  # type: ignore[arg-type]

    def batch(gap: float, on_policy: bool = True) -> list[Any]:
        return [(output_of([-1.0], [True]), MicroBatch(rows_of([1], sampler=[-1.0 + gap]), 1, 1, on_policy))]

    check.check(batch(9.0, on_policy=False))
    assert not check.done
    check.check(batch(0.0))
    for gap in (1.0, 0.0, 1.0):
        check.check(batch(gap))
    check.check(batch(9.0, on_policy=False))
    with pytest.raises(SamplerError, match=r"Step 5: .* by 1 nats a token.* in 2 rollouts in a row"):
        check.check(batch(1.0))


# Weights of tokens -------------------------------------------------------------------------------------------------------------


def test_rows_without_a_gradient_are_left_out_unless_something_needs_them(tmp_path: Path) -> None:
    rows = rows_of([1, 1, 1])
    rows.advantages = torch.tensor([0.0, 1.0, -1.0])
    rows.loss_mask = torch.tensor([True, True, False])
    for settings, expected in (
        ({}, [1]),
        ({"beta": 0.1}, [0, 1, 2]),
        ({"entropy_coef": 0.1}, [0, 1, 2]),
        ({"metrics_on": "all"}, [0, 1, 2]),
    ):
        assert trainer(tmp_path, **settings).rows_with_gradient(rows) == expected, settings
    rows.advantages = torch.zeros(3)
    assert trainer(tmp_path).rows_with_gradient(rows) == [0], "every process makes a backward pass"


def test_weights_of_the_tokens(tmp_path: Path) -> None:
    bounds: dict[str, Any] = {"vllm_importance_sampling_clip_min": 0.5, "vllm_importance_sampling_clip_max": 2.0}
    run = trainer(tmp_path, top_entropy_quantile=0.5, vllm_importance_sampling_mode="token_mask", **bounds)
    assert run.rollouts is not None
    ratios = torch.tensor([1.0, 1.5, 0.4, 1.9, 1.9])  # the third is below the bound
    rows = rows_of([3, 2], sampler=(-ratios.log()).tolist())
    rows.loss_mask = torch.tensor([True, False])
    old = gf.TokenLogprobs(torch.zeros(5), torch.tensor([2.0, 3.0, 1.0, 9.0, 9.0]))  # half of 2, 3 and 1: those of at least the median
    weights = run.rollouts._token_weights(rows, old, corrects=True)
    assert weights is not None and weights[:3].tolist() == pytest.approx([1.0, 1.5, 0.0])
    found = run.metrics.read()
    assert found["sampling/importance_sampling_ratio/mean"] == pytest.approx(2.5 / 3)
    assert found["sampling/importance_sampling_ratio/max"] == pytest.approx(1.5)
    highest = run.rollouts._token_weights(rows, old, corrects=False)
    assert highest is not None and highest[:3].tolist() == [1.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {"scale": "group"}),
        ({"scale_rewards": "batch", "reward_weights": [1.0, 0.5]}, {"scale": "batch", "reward_weights": torch.tensor([1.0, 0.5])}),
        ({"multi_objective_aggregation": "normalize_then_sum"}, {"normalize": "normalize_then_sum"}),
    ],
)
def test_advantages_are_those_of_the_settings(tmp_path: Path, settings: dict[str, Any], expected: dict[str, Any]) -> None:
    run = trainer(tmp_path, rewards=[odd_tokens, short], **settings)
    assert run.rollouts is not None
    rewards = torch.randn(16, 2, generator=torch.Generator().manual_seed(0))
    _, found = run.rollouts._advantages(rewards, torch.ones(len(rewards)))
    torch.testing.assert_close(found.advantages, gf.group_advantages(rewards, group_size=4, **expected).advantages)


def test_what_one_run_logs(tmp_path: Path) -> None:
    """Two rollouts of two steps each: tokens, metrics of the sampler, and completions without special tokens."""
    calls: list[int] = []

    def reward(completion_ids: list[list[int]], ref_logprobs: Any, **columns: Any) -> list[float]:
        calls.append(len(completion_ids))
        seen.extend(ref_logprobs)
        return [0.0] * len(completion_ids) if len(calls) == 1 else [float(index) for index in range(len(completion_ids))]

    seen: list[Any] = []
    run = trainer(tmp_path, rewards=[reward], temperature=0.8, max_steps=4, num_iterations=2, dynamic_sampling_attempts=1)
    run.train()
    assert run.rollout is not None and calls == [16, 16, 16], "in the first rollout all groups are drawn again"
    first, second, third, fourth = logs(run)
    assert first["rewards/reward/mean"] == first["reward"] == 7.5, "without the completions that were dropped"
    for log, fresh in ((first, True), (second, False), (third, True), (fourth, False)):
        assert ("sampling/sampling_logp_difference/mean" in log) == ("completions/mean_length" in log) == fresh
    tokens = sum(run.rollout.lengths) + sum(map(len, run.rollout.prompt_ids))
    assert third["num_tokens"] - second["num_tokens"] == tokens and first["num_tokens"] == second["num_tokens"] > 0
    assert first["dynamic_sampling/attempts"] == 1 and third["dynamic_sampling/attempts"] == 0
    assert all(TOKENIZER.eos_token not in record["completion"] for record in run.last_completions)
    assert any(TOKENIZER.eos_token_id in ids for ids in run.rollout.completion_ids)
    assert [len(row) for row in seen[-16:]] == run.rollout.lengths
    reference = ModelForward(run.accelerator, TOKENIZER.pad_token_id).logprobs(model(), run.rollout, batch_size=16).logprobs
    assert [value for row in seen[-16:] for value in row] == pytest.approx(reference.tolist(), abs=1e-5), "at the run's temperature"


def test_an_adaptive_temperature_reads_the_metrics_of_all_rows(tmp_path: Path) -> None:
    assert trainer(tmp_path, temperature_schedule={"kind": "entropy"}).metrics_on == "all"
    assert trainer(tmp_path).metrics_on == "active"


class OfAnotherProcess:
    """A trainer as it is in the second of two processes."""

    def __init__(self, run: Any) -> None:
        self._run = run
        self.accelerator = SimpleNamespace(
            process_index=1, num_processes=2, scaler=None, reduce=self.reduce, autocast=lambda *_: nullcontext()
        )

    def reduce(self, value: Tensor, reduction: str) -> Tensor:
        assert reduction == "sum"
        return value + 0.0  # of the other process, whose loss is not finite

    def __getattr__(self, name: str) -> Any:
        return getattr(self._run, name)


def test_processes_draw_with_other_random_numbers_and_stop_together(tmp_path: Path) -> None:
    of = model()
    of.generation_config.eos_token_id = [TOKENIZER.eos_token_id, 9]
    sampler = Scripted()
    run = trainer(tmp_path, of=of, sampler=sampler)
    for each in (run, OfAnotherProcess(run)):
        CompletionRunner(each).generate_completions(ROWS[:2], [1.0, 1.0], "rollout", 0)  # type: ignore[arg-type]
    (_, first), (_, second) = sampler.calls
    assert first.seed != second.seed and first.eos_token_id == [TOKENIZER.eos_token_id, 9]
    run._losses = [(output_of([-1.0], [True]), MicroBatch(rows_of([1]), 1, 1, on_policy=True))]
    run._grad_norm = torch.tensor(1.0)
    with pytest.raises(FloatingPointError, match="The loss of another process is not finite at step 1, process 1"):
        GRPOTrainer.check_step(OfAnotherProcess(run))  # type: ignore[arg-type]


# The sampler -------------------------------------------------------------------------------------------------------------------


def test_completions_end_at_the_end_token_and_have_the_log_probabilities_of_their_temperatures() -> None:
    of, prompts, ends = model(attention_dropout=0.5).train(), [[3, 4], [5, 6, 7], [3]], [8, 9, 10, 11, 12]
    params = SamplingParams(4, [0.7, 0.0, 1.3], seed=0, eos_token_id=ends, pad_token_id=TOKENIZER.pad_token_id)
    drawn = TransformersSampler(of, batch_size=2).generate(prompts, params)
    assert of.training and drawn[1].logprobs is None, "greedy decoding has no probabilities"
    assert len({each.finished for each in drawn}) == 2
    for ids, each, temperature in zip(prompts, drawn, params.temperatures, strict=True):
        assert each.finished == (each.token_ids[-1] in ends) and not set(ends) & set(each.token_ids[:-1])
        logits = of.eval()(torch.tensor([[*ids, *each.token_ids]])).logits[0, len(ids) - 1 : -1]
        if temperature == 0:
            assert each.token_ids == logits.argmax(-1).tolist()
        else:
            expected = (logits / temperature).log_softmax(-1).gather(-1, torch.tensor(each.token_ids)[:, None]).flatten()
            torch.testing.assert_close(torch.tensor(each.logprobs), expected, atol=1e-5, rtol=1e-5)
    again = TransformersSampler(of, batch_size=2).generate(prompts, params)
    other = TransformersSampler(of, batch_size=2).generate(prompts, dataclasses.replace(params, seed=5))
    assert [each.token_ids for each in again] == [each.token_ids for each in drawn] != [each.token_ids for each in other]
