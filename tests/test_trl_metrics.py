"""Metrics by TRL's names, the evaluation's loss, and the choice of the best checkpoint by the reward."""

from __future__ import annotations

import dataclasses
import re
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from moe_models import moe_model
from peers import needs_trl
from trainer_cases import ROWS, TOKENIZER, Scripted, config, logs, model, short, trainer

import grpo_fast as gf
from grpo_fast.loss.statistics import entropy_summary, quantiles, top_threshold
from grpo_fast.trainer.diagnostics import measure_rewards
from grpo_fast.trainer.evaluation import add_means
from grpo_fast.trainer.metrics import MetricAccumulator
from grpo_fast.trainer.rollout import Rollout
from grpo_fast.trainer.trl_metrics import METRICS, NOT_LOGGED, measure_clipping, measure_reward_spread

EVALUATED: dict[str, Any] = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "eval_rounds": 2,
    "eval_dataset": ROWS[:3],
    "per_device_eval_batch_size": 2,
}
OF_TRANSFORMERS = {"step", "epoch", "total_flos", "train_loss", "train_runtime", "train_samples_per_second", "train_steps_per_second"}


def known(name: str) -> bool:
    return re.sub(r"^step_time/\w+", "step_time/PART", re.sub(r"^rewards/\w+/", "rewards/NAME/", name)) in METRICS


@needs_trl
def test_the_table_has_trls_names() -> None:
    from trl.trainer import grpo_trainer

    source = Path(grpo_trainer.__file__).read_text()
    names = set(re.findall(r'_metrics\[(?:mode|"train")\]\["([\w/]+)"\]', source))
    assert len(names) > 25
    assert names - set(METRICS) == set(NOT_LOGGED) and not set(METRICS) & set(NOT_LOGGED)


@needs_trl
def test_the_reward_statistics_are_trls() -> None:
    """TRL's own lines that log them, run on rewards of two functions: some do not apply, and one completion has none."""
    from trl.trainer import grpo_trainer

    source = Path(grpo_trainer.__file__).read_text()
    first, last = "        # Calculate mean reward per function", '["reward_std"].append'
    lines = source[source.index(first) : source.index("\n", source.index(last))]
    nan = float("nan")
    rewards = torch.tensor([[1.0, 0.5], [0.0, nan], [nan, nan], [2.0, -1.0], [nan, 3.0], [1.0, 1.0]])
    weights, found = torch.tensor([1.0, 0.7]), _Lists({})
    stand_in = SimpleNamespace(reward_func_names=["a", "b"], reward_weights=weights, _metrics={"train": found})
    given = {"self": stand_in, "mode": "train", "rewards_per_func": rewards, "unscorable_mask": rewards.isnan().all(1)}
    exec(textwrap.dedent(lines), {**vars(grpo_trainer), **given})
    metrics = MetricAccumulator()
    measure_reward_spread(metrics, rewards, weights)
    measure_rewards(metrics, ["a", "b"], rewards, weights, gf.group_advantages(rewards, group_size=3))
    ours, theirs = metrics.read(), {name: values[0] for name, values in found.into.items()}
    assert len(theirs) == 6 and {name: ours[name] for name in theirs} == pytest.approx(theirs)
    assert abs(ours["reward_std_group"] - ours["reward_std"]) > 0.05


def test_the_guide_lists_the_table() -> None:
    guide = (Path(__file__).parent.parent / "docs" / "metrics.md").read_text()
    rows = dict(re.findall(r"^\| `([\w/]+)` \| (.*) \|$", guide, re.M))
    assert {name: text for name, text in rows.items() if name in METRICS} == METRICS


def test_a_run_logs_them(tmp_path: Path) -> None:
    run = trainer(tmp_path, sampler=Scripted(), beta=0.1, num_iterations=2, max_steps=2, epsilon=0.01, **EVALUATED)
    run.train()
    first, second = logs(run)
    evaluated = next(record for record in run.state.log_history if "eval_loss" in record)
    assert not [name for name in first if not known(name) and name not in OF_TRANSFORMERS]
    assert {name for name in METRICS if name.startswith(("completions/", "clip_ratio/"))} <= set(first)
    assert run.rollout is not None
    lengths = run.rollout.lengths
    assert (first["completions/min_length"], first["completions/max_length"]) == (min(lengths), max(lengths))
    least, mean, largest = (first[f"completions/{which}_terminated_length"] for which in ("min", "mean", "max"))
    assert least <= mean <= largest
    assert first["clip_ratio/high_max"] == first["clip_ratio/low_min"] == 0.0  # on-policy
    assert second["clip_ratio/high_mean"] < second["clip_ratio/high_max"] <= 1.0
    parts = sum(value for name, value in first.items() if name.startswith("step_time/") and not name.endswith("optimizer"))
    assert first["step_time"] == pytest.approx(parts)
    for name in (
        "loss",
        "kl",
        "entropy",
        "reward_std",
        "reward_std_all",
        "reward_std_group",
        "frac_reward_zero_std",
        "completions/min_length",
    ):
        assert f"eval_{name}" in evaluated, name
    assert evaluated["eval_kl"] > 0 and evaluated["eval_entropy"] > 0


@needs_trl
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_extremes_of_clipping_are_trls(level: str) -> None:
    """TRL's own ``_compute_loss`` on four sequences; the last is not in the loss."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    lengths, advantages = [3, 2, 4, 1], torch.tensor([1.0, -1.0, -0.5, 2.0])
    generator = torch.Generator().manual_seed(2)
    logprobs, old = (0.6 * torch.randn(4, 4, generator=generator) - 2 for _ in range(2))
    mask = (torch.arange(4) < torch.tensor([3, 2, 4, 0]).unsqueeze(1)).long()
    found: dict[str, list[float]] = {}
    stand_in = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, -logprobs, None),
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(num_processes=1, sync_gradients=True, gather=lambda x: x, reduce=lambda x, reduction: x),
        args=SimpleNamespace(delta=None, steps_per_generation=1),
        loss_type="grpo",
        importance_sampling_level=level,
        beta=0.0,
        epsilon_low=0.1,
        epsilon_high=0.1,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        aux_loss_enabled=False,
        use_vllm=False,
        _metrics={"train": _Lists(found)},
    )
    ids = torch.ones(4, 4, dtype=torch.int64)
    inputs = {"prompt_ids": ids, "prompt_mask": ids, "completion_ids": ids, "completion_mask": mask, "advantages": advantages}
    GRPOTrainer._compute_loss(stand_in, stand_in.model, {**inputs, "old_per_token_logps": old})

    def packed(values: torch.Tensor) -> torch.Tensor:
        return torch.cat([row[:length] for row, length in zip(values, lengths, strict=True)])

    rows = Rollout([[1]] * 4, [[1] * n for n in lengths], torch.ones(4), advantages, mask.bool().any(1), {"old": packed(old)})
    out = gf.GRPOOutput(torch.zeros(()), packed(logprobs), packed(-logprobs), packed(mask).bool(), {})
    settings = gf.LossConfig(loss_type="grpo", importance_sampling_level=level, epsilon_low=0.1, epsilon_high=0.1)
    metrics = MetricAccumulator()
    measure_clipping(metrics, out, rows, settings, left_out=False)
    expected = {name: found[name][0] for name in ("clip_ratio/low_min", "clip_ratio/high_max")}
    assert metrics.read() == pytest.approx(expected) and expected["clip_ratio/high_max"] > 0
    measure_clipping(metrics, out, rows, settings, left_out=True)
    assert metrics.read()["clip_ratio/low_min"] == 0.0


class _Lists(dict[str, list[float]]):
    def __init__(self, into: dict[str, list[float]]) -> None:
        self.into = into

    def __getitem__(self, name: str) -> list[float]:
        return self.into.setdefault(name, [])


def test_the_loss_of_an_evaluation(tmp_path: Path) -> None:
    """That of the drawn completions, whose ratios are 1: minus the mean of the advantage over their tokens."""
    run = trainer(tmp_path, sampler=Scripted(), rewards=short, eval_rounds=4, eval_dataset=ROWS[:2], per_device_eval_batch_size=8)
    calls: list[Any] = []
    sampler = run.sampler
    assert isinstance(sampler, Scripted)
    generate, seeds = sampler.generate, iter(range(99))

    def differing(prompts: Any, params: Any) -> Any:  # Scripted draws the same in every round
        extra = next(seeds)
        found = [dataclasses.replace(each, token_ids=[5] * extra + list(each.token_ids)) for each in generate(prompts, params)]
        calls.append([len(each.token_ids) for each in found])
        return found

    sampler.generate = differing  # type: ignore[method-assign]
    results = run.evaluate()
    lengths = torch.tensor(calls, dtype=torch.float32).T  # [prompts, rounds]
    rewards = -0.1 * lengths
    advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    assert results["eval_loss"] == pytest.approx((-(advantages * lengths).sum() / lengths.sum()).item(), abs=1e-4)
    assert results["eval_reward_std"] == results["eval_reward_std_all"] == pytest.approx(rewards.std().item(), rel=1e-4)
    assert results["eval_reward_std_group"] == pytest.approx(rewards.std(1).mean().item(), rel=1e-4)
    assert results["eval_frac_reward_zero_std"] == 0.0 and results["eval_completions/max_length"] == lengths.max()
    assert run.metrics.read() == {}  # nothing of it is in the metrics of the step
    greedy = trainer(tmp_path, sampler=Scripted(), eval_temperature=0.0, eval_rounds=1, eval_dataset=ROWS[:3])
    assert greedy.evaluate()["eval_loss"] == 0.0  # one completion per prompt has no advantage


def test_the_auxiliary_loss_of_an_evaluation(tmp_path: Path) -> None:
    ends = {"eos_token_id": TOKENIZER.eos_token_id, "pad_token_id": TOKENIZER.pad_token_id}
    run = trainer(tmp_path, of=moe_model("mixtral", len(TOKENIZER), **ends), sampler=Scripted(), eval_rounds=1, eval_dataset=ROWS[:2])
    results = run.evaluate()
    assert results["eval_loss"] == pytest.approx(0.5 * results["eval_aux_loss"], rel=1e-5) and results["eval_aux_loss"] > 1.9


def test_the_best_model_is_loaded(tmp_path: Path) -> None:
    """By the reward, unless another metric is named; for several datasets by the mean of their rewards."""
    best = {**EVALUATED, "load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    several = {"a": ROWS[:2], "b": ROWS[2:4]}
    run = trainer(tmp_path, learning_rate=0.1, **{**best, "eval_dataset": several})
    rewards = iter([0.5, 2.0, 1.0])
    evaluate = run.evaluate

    def scripted(*args: Any, **kwargs: Any) -> dict[str, float]:
        results = evaluate(*args, **kwargs)
        if not args and "metric_key_prefix" not in kwargs:  # the call of the training loop
            assert results["eval_reward"] == pytest.approx((results["eval_a_reward"] + results["eval_b_reward"]) / 2)
            results["eval_reward"] = next(rewards)
        return results

    run.evaluate = scripted  # type: ignore[method-assign]
    run.train()
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-2") and run.state.best_metric == 2.0
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert all(torch.equal(p, saved[name]) for name, p in run.model.named_parameters())
    assert not torch.equal(saved["lm_head.weight"], load_file(tmp_path / "checkpoint-3" / "model.safetensors")["lm_head.weight"])


def test_which_metric_is_best(tmp_path: Path) -> None:
    strategies = {"eval_strategy": "steps", "save_strategy": "steps"}
    made = config(tmp_path, load_best_model_at_end=True, **strategies)
    assert (made.metric_for_best_model, made.greater_is_better) == ("eval_reward", True)
    named = config(tmp_path, load_best_model_at_end=True, metric_for_best_model="eval_loss", **strategies)
    assert (named.metric_for_best_model, named.greater_is_better) == ("eval_loss", False)
    plateau = config(tmp_path, lr_scheduler_type="reduce_lr_on_plateau", lr_scheduler_kwargs={"patience": 3}, **strategies)
    assert plateau.metric_for_best_model == "eval_reward" and plateau.lr_scheduler_kwargs == {"mode": "max", "patience": 3}
    assert config(tmp_path).metric_for_best_model is None
    assert add_means({"eval_a_reward": 1.0}, ["a", "b"], "eval") == {"eval_a_reward": 1.0}


def test_quantiles_of_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.quantile takes at most 2^24 values."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("quantile() input tensor is too large")

    monkeypatch.setattr(torch, "quantile", refuse)
    assert top_threshold(torch.arange(2**24 + 1, dtype=torch.float32), 0.25).item() == 3 * 2**22
    assert entropy_summary(torch.arange(11.0)) == (5.0, 5.0, 9.0, 11)


def test_quantiles_are_torchs() -> None:
    values = torch.randn(101, generator=torch.Generator().manual_seed(0))
    at = (0.0, 0.31, 0.5, 0.999, 1.0)
    torch.testing.assert_close(quantiles(values, at), torch.quantile(values, torch.tensor(at)))
    assert quantiles(torch.tensor([1.0, torch.nan]), (0.5,)).isnan().all()
    assert top_threshold(torch.zeros(0), 0.2) == torch.inf


def random_model(name: str) -> Any:
    ends = {"eos_token_id": TOKENIZER.eos_token_id, "pad_token_id": TOKENIZER.pad_token_id}
    return moe_model("mixtral", len(TOKENIZER), router_jitter_noise=0.9, **ends) if name == "jitter" else model(attention_dropout=0.5)


@pytest.mark.parametrize(
    ("name", "settings", "part"),
    [
        ("dropout", {"disable_dropout": False}, r"dropout \(attention_dropout = 0\.5 in 'model\.layers\.0\.self_attn'\)"),
        ("neftune", {"neftune_noise_alpha": 50.0}, r"NEFTune \(neftune_noise_alpha = 50\)"),
        ("jitter", {"router_aux_loss_coef": 0.0}, r"jitter of the routers \(router_jitter_noise = 0\.9\)"),
    ],
)
def test_a_forward_that_is_random_in_training(name: str, settings: dict[str, Any], part: str, tmp_path: Path) -> None:
    from grpo_fast.generation import SamplerError

    run = trainer(tmp_path, of=random_model(name), sampler_tolerance=1e-4, **settings)
    with pytest.raises(SamplerError) as error:
        run.train()
    message, gap = str(error.value), r"differ from those of the loss by 0\.\d+ nats"
    assert re.search(rf"random in training: .* {gap} .* Found: {part}\. Fix: disable_dropout=True", message)
    assert "Nothing was trained" in message and "T = " not in message
