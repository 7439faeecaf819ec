"""Advantages in the trainer: the settings reach group_advantages, and groups of equal rewards are left out of the loss's denominators."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_cases import Scripted, config, logs, odd_tokens, trainer

import grpo_fast as gf
from grpo_fast.trainer.advantages import compute_advantages

EQUAL = 2  # of the four groups of a step


def half_equal(prompts: Any, completions: Any, completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """The first groups of each call have equal rewards."""
    found = odd_tokens(prompts, completions, completion_ids)
    return [0.3] * 4 * EQUAL + found[4 * EQUAL :]


def ran(tmp_path: Path, **settings: Any) -> Any:
    run = trainer(tmp_path, rewards=half_equal, sampler=Scripted(), **settings)
    run.train()
    return run


def counted_tokens(run: Any) -> tuple[int, int]:
    """The tokens of a run's last rollout, and those of its groups with different rewards."""
    lengths = run.rollout.lengths
    return sum(lengths), sum(lengths[4 * EQUAL :])


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
def test_equal_groups_leave_the_denominators(loss_type: str, tmp_path: Path) -> None:
    """The same loss, divided by the tokens or sequences of the other groups only."""
    plain, excluded = (ran(tmp_path, loss_type=loss_type, exclude_degenerate=value) for value in (False, True))
    assert plain.rollout.completion_ids == excluded.rollout.completion_ids
    assert torch.equal(plain.rollout.advantages, excluded.rollout.advantages)
    tokens, counted = counted_tokens(excluded)
    factor = tokens / counted if loss_type == "dapo" else 4 / (4 - EQUAL)
    assert logs(plain)[0]["loss"] != 0
    assert logs(excluded)[0]["loss"] == pytest.approx(logs(plain)[0]["loss"] * factor, rel=1e-5)
    assert logs(excluded)[0]["grad_norm"] == pytest.approx(logs(plain)[0]["grad_norm"] * factor, rel=1e-4)
    assert (excluded.step_tokens, excluded.step_sequences) == ([counted], [16 - 4 * EQUAL])
    assert (plain.step_tokens, plain.step_sequences) == ([tokens], [16])


def test_equal_groups_have_no_kl_penalty(tmp_path: Path) -> None:
    """In the second step the policy has moved: all of the rollout's KL is that of the groups that count."""
    settings: dict[str, Any] = {"beta": 0.5, "num_iterations": 2, "max_steps": 2, "metrics_on": "all", "exclude_degenerate": True}
    run = ran(tmp_path, **settings)
    rows = run.rollout
    assert not rows.loss_mask[: 4 * EQUAL].any() and rows.loss_mask[4 * EQUAL :].all()
    alone = rows.select(range(4 * EQUAL, 16))
    both, part = (run.model_forward.loss(run.model, each, config=run.loss_config, num_items=run.step_tokens[0]) for each in (rows, alone))
    assert both.metrics["kl"] > 0
    torch.testing.assert_close(both.loss, part.loss)


def test_a_step_of_equal_groups_only(tmp_path: Path) -> None:
    run = trainer(tmp_path, rewards=lambda prompts, **columns: [0.3] * len(prompts), sampler=Scripted(), exclude_degenerate=True, beta=0.1)
    run.train()
    assert (run.step_tokens, run.step_sequences) == ([0], [0])
    assert logs(run)[0]["loss"] == logs(run)[0]["grad_norm"] == 0


def test_a_resumed_run_has_the_same_denominators(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"num_iterations": 2, "max_steps": 2, "loss_type": "grpo", "exclude_degenerate": True}
    run = ran(tmp_path, save_strategy="steps", save_steps=1, **settings)
    resumed = trainer(tmp_path, rewards=half_equal, sampler=Scripted(), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert resumed.step_sequences == [16 - 4 * EQUAL]
    assert logs(resumed)[-1]["loss"] == logs(run)[-1]["loss"] != 0


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"scale_rewards": "mean"}, {"scale": "mean"}),
        ({"scale_rewards": "none", "pass_at_k": 2}, {"scale": "none", "pass_at_k": 2}),
        ({"scale_rewards": "batch", "exclude_degenerate": True}, {"scale": "batch", "exclude_degenerate": True}),
    ],
)
def test_the_settings_reach_the_advantages(settings: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    run = ran(tmp_path, **settings)
    rewards = torch.tensor(half_equal(None, None, run.rollout.completion_ids))
    wanted = gf.group_advantages(rewards, group_size=4, **expected).advantages
    torch.testing.assert_close(run.rollout.advantages, wanted)
    assert (wanted[: 4 * EQUAL] == 0).all() and wanted.any()


def test_reinforce_plus_plus_counts_the_tokens_in_the_loss(tmp_path: Path) -> None:
    """Not those of completions that were cut at the limit, which are masked."""
    run = ran(tmp_path, scale_rewards="tokens", mask_truncated_completions=True)
    rewards = torch.tensor(half_equal(None, None, run.rollout.completion_ids))
    lengths = run.rollout.loss_lengths()
    assert (lengths == 0).any()
    wanted = gf.group_advantages(rewards, group_size=4, scale="tokens", lengths=lengths).advantages
    torch.testing.assert_close(run.rollout.advantages, wanted)


def test_an_evaluation_with_fewer_completions_than_k(tmp_path: Path) -> None:
    args, rewards = config(tmp_path, pass_at_k=3), torch.tensor([[0.0], [1.0], [1.0], [0.0]])
    found = compute_advantages(args, rewards, torch.ones(1), group_size=2, lengths=None)
    torch.testing.assert_close(found.advantages, gf.group_advantages(rewards, group_size=2).advantages)


def test_rewards_below_0_are_refused_for_maxrl(tmp_path: Path) -> None:
    rewards = torch.tensor([[-1.0], [1.0]])
    with pytest.raises(ValueError, match=r"the weighted sum of rewards\[0\] is -1.0; expected at least 0 with scale='mean'"):
        compute_advantages(config(tmp_path, scale_rewards="mean"), rewards, torch.ones(1), group_size=2, lengths=None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale_rewards": "std"}, r"scale_rewards is 'std'; expected one of 'group', 'batch', 'none', 'mean', 'tokens'\."),
        ({"pass_at_k": 4}, r"pass_at_k is 4; expected less than num_generations = 4.*Fix: a smaller k"),
        ({"pass_at_k": 0}, "pass_at_k is 0; expected a whole number of at least 1"),
        ({"pass_at_k": 2, "scale_rewards": "batch"}, "scale_rewards is 'batch'; expected 'group' or 'none' with pass_at_k"),
        ({"pass_at_k": 2, "multi_objective_aggregation": "normalize_then_sum"}, "expected 'sum_then_normalize' with pass_at_k"),
        ({"exclude_degenerate": "yes"}, "exclude_degenerate is 'yes'; expected True or False"),
        ({"scale_rewards": "tokens", "multi_objective_aggregation": "normalize_then_sum"}, "scale_rewards is 'tokens'; expected 'group'"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **settings)
