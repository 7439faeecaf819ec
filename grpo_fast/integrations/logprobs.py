"""The loss for trainers that pass log-probabilities: all computations after the logits, in plain PyTorch over [B, T].

Such a trainer has already computed the logits, so this function saves neither their memory nor their time. Its advantages are the same
specification as the fused loss, gradients that a masked token cannot make NaN, and metrics that stay on the device.
`gf.linear_token_logprobs` computes log-probabilities from hidden states.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_fast.loss.config import LossConfig
from grpo_fast.loss.inputs import LossInputs
from grpo_fast.loss.logprob_loss import policy_loss
from grpo_fast.loss.token_inputs import logprob_inputs
from grpo_fast.loss.validation import validated_loss_inputs

__all__ = ["importance_ratio", "logprob_loss", "logprob_loss_inputs", "mean_over_tokens"]


def logprob_loss(
    logprobs: Tensor,  # [B, T], with the gradient
    advantages: Tensor,  # [B] or [B, T]
    *,
    config: LossConfig,
    mask: Tensor,  # [B, T]
    entropy: Tensor | None = None,  # [B, T]
    old_logprobs: Tensor | None = None,  # [B, T]; None = on-policy
    ref_logprobs: Tensor | None = None,  # [B, T]
    rollout_weights: Tensor | None = None,  # [B, T] or [B, 1]
    num_items: int | float | Tensor | None = None,
    loss_scale: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute gf.grpo_loss from the policy's log-probabilities in place of its logits; arguments and metrics are those of gf.grpo_loss.

    Args:
        entropy: the entropy of the policy; required with ``config.entropy_coef``. If it is None, the metric is 0.

    Returns:
        The loss, 0-d and differentiable with respect to logprobs and entropy, and its metrics, 0-d tensors.

    Raises:
        TypeError, ValueError: names the argument, what it was, what was expected and the fix.

    Example:
        >>> logprobs = torch.randn(2, 3, requires_grad=True)
        >>> loss, metrics = logprob_loss(logprobs, torch.tensor([1.0, -1.0]), config=LossConfig(), mask=torch.ones(2, 3))
    """
    inputs = logprob_loss_inputs(
        logprobs,
        advantages,
        config=config,
        mask=mask,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        rollout_weights=rollout_weights,
        num_items=num_items,
        loss_scale=loss_scale,
    )
    if entropy is None:
        if config.entropy_coef != 0:
            raise ValueError(
                f"entropy is None; expected [B, T], since config.entropy_coef = {config.entropy_coef:g}. Pass it, or set entropy_coef=0."
            )
        entropy = torch.zeros_like(logprobs)
    else:
        logprob_inputs(logprobs, mask).per_token("entropy", entropy, like_sequences=False)
    with torch.autocast(logprobs.device.type, enabled=False):
        return policy_loss(_at_least_float32(logprobs), _at_least_float32(entropy), inputs, inputs.mask)


def logprob_loss_inputs(
    logprobs: Tensor,
    advantages: Tensor,
    *,
    config: LossConfig,
    mask: Tensor,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    rollout_weights: Tensor | None = None,
    num_items: int | float | Tensor | None = None,
    loss_scale: float = 1.0,
) -> LossInputs:
    """Validate the arguments of logprob_loss, and return them in the form that policy_loss and token_losses take.

    Raises:
        TypeError, ValueError: names the argument, what it was, what was expected and the fix.
    """
    return validated_loss_inputs(
        logprob_inputs(logprobs, mask),
        advantages,
        config=config,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        rollout_weights=rollout_weights,
        cu_seqlens=None,
        num_items=num_items,
        loss_scale=loss_scale,
        metrics_on="all",
    )


# Shared by the adapters' metrics and corrections ----------------------------------------------------------------------------------------


@torch.no_grad()
def importance_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Return exp of the log-ratio, clamped to ±20; 1 where masked. All tensors are [B, T]."""
    return torch.where(mask != 0, logprobs - old_logprobs, 0).clamp(-20.0, 20.0).exp()


def mean_over_tokens(x: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over the unmasked tokens, 0-d; 0 if all tokens are masked."""
    unmasked = mask != 0
    return torch.where(unmasked, x, 0).sum(dtype=torch.float32) / unmasked.sum().clamp(min=1)


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
