"""The advantages of a rollout and of an evaluation, from the settings."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import Tensor

import grpo_fast as gf
from grpo_fast.trainer.config_checks import check_count, one_of
from grpo_fast.trainer.setting_errors import bad_setting

if TYPE_CHECKING:
    from grpo_fast.trainer.config import GRPOConfig

__all__ = ["check_advantages", "compute_advantages"]

SCALES = ("group", "batch", "none", "mean", "tokens")  # of scale_rewards; the first three are TRL's


def check_advantages(config: GRPOConfig) -> None:
    """Check the settings of the advantages.

    Raises:
        ValueError: names the setting, its value, what was expected and how to fix it.
    """
    one_of("scale_rewards", config.scale_rewards, SCALES)
    one_of("multi_objective_aggregation", config.multi_objective_aggregation, ("sum_then_normalize", "normalize_then_sum"))
    if config.multi_objective_aggregation == "normalize_then_sum" and config.scale_rewards != "group":
        raise bad_setting("scale_rewards", config.scale_rewards, "'group' with normalize_then_sum, which divides by the stds itself")
    if config.pass_at_k is None:
        return
    check_count("pass_at_k", config.pass_at_k, 1)
    if config.pass_at_k >= config.num_generations:
        expected = f"less than num_generations = {config.num_generations}: with fewer completions than that every advantage is 0"
        raise bad_setting("pass_at_k", config.pass_at_k, f"{expected}. Fix: a smaller k, or more generations")
    if config.scale_rewards not in ("group", "none"):
        raise bad_setting("scale_rewards", config.scale_rewards, "'group' or 'none' with pass_at_k, which has a std of its own")
    if config.multi_objective_aggregation != "sum_then_normalize":
        raise bad_setting("multi_objective_aggregation", config.multi_objective_aggregation, "'sum_then_normalize' with pass_at_k")


def compute_advantages(
    args: GRPOConfig, rewards: Tensor, weights: Tensor, *, group_size: int, lengths: Tensor | None
) -> gf.GroupAdvantages:
    """Return the advantages of the completions of all processes.

    Args:
        args: the settings.
        rewards: float32 [B, R] of all processes, the completions of a prompt one after the other; NaN where a reward does not apply.
        weights: float32 [R].
        group_size: completions per prompt. With at most ``pass_at_k`` of them, in an evaluation, the advantages are those without pass@k.
        lengths: [B], the tokens of each completion in the loss; they are read with ``scale_rewards="tokens"``.

    Raises:
        ValueError: rewards below 0 with ``scale_rewards="mean"``; or a reward is infinite.
    """
    with gf.debug_checks():  # on a GPU, too: a rollout reads the rewards in any case
        return gf.group_advantages(
            rewards,
            group_size=group_size,
            scale=args.scale_rewards,
            reward_weights=weights.to(rewards.device),
            normalize=args.multi_objective_aggregation,
            lengths=lengths if args.scale_rewards == "tokens" else None,
            exclude_degenerate=args.exclude_degenerate,
            pass_at_k=args.pass_at_k if group_size > (args.pass_at_k or math.inf) else None,
        )
