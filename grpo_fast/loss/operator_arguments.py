"""From a loss over tokens to the arguments of the operators ``grpo_loss`` and ``grpo_loss_``."""

from __future__ import annotations

from typing import Any

from grpo_fast.loss.kernel_settings import loss_settings
from grpo_fast.loss.reference import Policy
from grpo_fast.loss.token_rows import TokenRows

__all__ = ["loss_arguments"]


def loss_arguments(rows: TokenRows, policy: Policy) -> tuple[Any, ...]:
    """What the operators grpo_loss and grpo_loss_ take behind the logits."""
    floats = (None if x is None else x.float() for x in (policy.old_logprobs, policy.ref_logprobs, policy.rollout_weights))
    return (
        rows.token_ids,
        rows.mask,
        policy.advantages.float(),
        policy.weights,
        policy.entropy_weights if policy.config.entropy_coef != 0 else None,
        *floats,
        *rows.scoring,
        policy.loss_scale,
        loss_settings(policy.config),
        False,
    )
