"""The arguments of the operators ``grpo_loss`` and ``grpo_loss_``, built from the validated inputs of a loss."""

from __future__ import annotations

from grpo_fast.loss.inputs import LossInputs
from grpo_fast.loss.kernel_settings import loss_settings
from grpo_fast.loss.token_rows import TokenRows
from grpo_fast.ops.grpo_loss import GrpoLossArguments

__all__ = ["loss_arguments"]


def loss_arguments(rows: TokenRows, inputs: LossInputs) -> GrpoLossArguments:
    """Return the arguments of the operators ``grpo_loss`` and ``grpo_loss_`` after the logits."""
    old_logprobs, ref_logprobs, rollout_weights = (
        None if x is None else x.float() for x in (inputs.old_logprobs, inputs.ref_logprobs, inputs.rollout_weights)
    )
    temperatures, temperature, softcap, logit_scale = rows.scoring
    return GrpoLossArguments(
        rows.token_ids,
        rows.mask,
        inputs.advantages.float(),
        inputs.weights,
        inputs.entropy_weights if inputs.config.entropy_coef != 0 else None,
        old_logprobs,
        ref_logprobs,
        rollout_weights,
        temperatures,
        temperature,
        softcap,
        logit_scale,
        inputs.loss_scale,
        loss_settings(inputs.config),
        only_active=False,
    )
