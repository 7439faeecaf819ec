"""Makes the rewards of a run from the trainer's argument and the settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from grpo_fast.rewards import RewardRunner, SoftOverlongPunishment
from grpo_fast.rewards.common import Reward

if TYPE_CHECKING:
    from grpo_fast.trainer.config import GRPOConfig

__all__ = ["make_reward_runner"]


def make_reward_runner(reward_funcs: str | Reward | Sequence[str | Reward], args: GRPOConfig) -> RewardRunner:
    """The rewards with their settings, and DAPO's soft overlong punishment (arXiv:2503.14476) if the settings ask for it."""
    rewards = [reward_funcs] if isinstance(reward_funcs, str) or not isinstance(reward_funcs, Sequence) else list(reward_funcs)
    weights = None if args.reward_weights is None else list(args.reward_weights)
    if args.soft_punish_cache is not None:
        rewards.append(SoftOverlongPunishment(args.max_completion_length, args.soft_punish_cache))
        weights = None if weights is None else [*weights, 1.0]
    return RewardRunner(
        rewards, weights=weights, timeout=args.reward_timeout, on_error=args.reward_on_error, isolation=args.reward_isolation
    )
