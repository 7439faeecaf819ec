"""From a loss over tokens to the arguments of the operators ``grpo_loss`` and ``grpo_loss_``."""

from __future__ import annotations

from typing import Any

from grpo_fast.loss.inputs import LossInputs
from grpo_fast.loss.kernel_settings import loss_settings
from grpo_fast.loss.token_rows import TokenRows

__all__ = ["loss_arguments"]


def loss_arguments(rows: TokenRows, inputs: LossInputs) -> tuple[Any, ...]:
    """Return the arguments of the operators ``grpo_loss`` and ``grpo_loss_`` after the logits."""
    floats = (None if x is None else x.float() for x in (inputs.old_logprobs, inputs.ref_logprobs, inputs.rollout_weights))
    return (
        rows.token_ids,
        rows.mask,
        inputs.advantages.float(),
        inputs.weights,
        inputs.entropy_weights if inputs.config.entropy_coef != 0 else None,
        *floats,
        *rows.scoring,
        inputs.loss_scale,
        loss_settings(inputs.config),
        False,
    )
