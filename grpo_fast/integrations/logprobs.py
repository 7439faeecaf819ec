"""The loss for trainers that hand over log-probabilities: everything behind the logits, in plain PyTorch over [B, T].

Such a trainer has already paid for the logits, so nothing of the vocabulary is saved here; what is gained is one specification, gradients
that a masked token cannot make NaN, and metrics that stay on the device. `gf.linear_token_logprobs` makes the log-probabilities cheap.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_fast.loss import checks
from grpo_fast.loss.aggregation import aggregation_weights
from grpo_fast.loss.config import LossConfig
from grpo_fast.loss.inputs import LossInputs
from grpo_fast.loss.logprob_loss import policy_loss
from grpo_fast.loss.sequences import Sequences
from grpo_fast.loss.validation import check_config

__all__ = ["logprob_loss", "lower_bound_of_cispo", "mean_over_tokens", "ratio_of"]


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
    """gf.grpo_loss from the policy's log-probabilities in place of its logits; arguments and metrics as there.

    Args:
        entropy: of the policy; needed with ``config.entropy_coef``, and its metric is 0 without.

    Returns:
        The loss, 0-d and differentiable with respect to logprobs and entropy, and its metrics, 0-d tensors.

    Raises:
        TypeError, ValueError: names the argument, what it was, what was expected and the cure.

    Example:
        >>> logprobs = torch.randn(2, 3, requires_grad=True)
        >>> loss, metrics = logprob_loss(logprobs, torch.tensor([1.0, -1.0]), config=LossConfig(), mask=torch.ones(2, 3))
    """
    policy = logprob_policy(
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
        _check("entropy", entropy, logprobs)
    with torch.autocast(logprobs.device.type, enabled=False):
        return policy_loss(_wide(logprobs), _wide(entropy), policy, policy.mask)


def logprob_policy(
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
    """The arguments of logprob_loss, checked, as policy_loss and token_losses want them."""
    check_config(config)
    checks.tensor("logprobs", logprobs, like=None)
    if logprobs.dim() != 2:
        raise ValueError(f"logprobs has shape {list(logprobs.shape)}; expected [B, T].")
    _check("mask", mask, logprobs, floating=False)
    if config.beta != 0 and ref_logprobs is None:
        raise ValueError(f"ref_logprobs is None; expected [B, T], since config.beta = {config.beta:g}. Pass them, or set beta=0.")
    for name, x in (("old_logprobs", old_logprobs), ("ref_logprobs", ref_logprobs)):
        if x is not None:
            _check(name, x, logprobs)
    counts = mask if mask.dtype == torch.bool else mask != 0
    sequences = Sequences(counts)
    dtype = torch.float64 if logprobs.dtype == torch.float64 else torch.float32
    weights = aggregation_weights(config.resolved_aggregation, counts, sequences, num_items, config.max_completion_length, dtype)
    entropy_weights = weights
    if config.entropy_aggregation != "same":
        entropy_weights = aggregation_weights(config.entropy_aggregation, counts, sequences, dtype=dtype)
    if rollout_weights is not None:
        _check("rollout_weights", rollout_weights, logprobs, one_column=True)
    _check("advantages", advantages, logprobs, per_sequence=True)
    return LossInputs(
        config=config,
        mask=counts,
        sequences=sequences,
        advantages=(advantages.unsqueeze(1) if advantages.dim() == 1 else advantages).detach(),
        weights=weights,
        entropy_weights=entropy_weights,
        old_logprobs=None if old_logprobs is None else old_logprobs.detach(),
        ref_logprobs=None if ref_logprobs is None else ref_logprobs.detach(),
        rollout_weights=None if rollout_weights is None else rollout_weights.detach(),
        rollout_per_sequence=rollout_weights is not None and rollout_weights.shape != logprobs.shape,
        loss_scale=loss_scale,
    )


# What the adapters' metrics and corrections have in common ------------------------------------------------------------------------------


@torch.no_grad()
def ratio_of(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """exp of the log-ratio, clamped to ±20; 1 where masked. All [B, T]."""
    return torch.where(mask != 0, logprobs - old_logprobs, 0).clamp(-20.0, 20.0).exp()


def mean_over_tokens(x: Tensor, mask: Tensor) -> Tensor:
    """Over those that count; 0 where none does."""
    counts = mask != 0
    return torch.where(counts, x, 0).sum(dtype=torch.float32) / counts.sum().clamp(min=1)


def lower_bound_of_cispo(ratio: Tensor, low: float, high: float) -> Tensor:
    """What makes min(ratio, high) into clamp(ratio, low, high): a rollout weight, since MiniMax-M1 and LossConfig have no lower bound."""
    return ratio.clamp(low, high) / ratio.clamp(max=high)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _check(name: str, x: Tensor, like: Tensor, *, floating: bool = True, one_column: bool = False, per_sequence: bool = False) -> None:
    checks.tensor(name, x, like=like, like_name="logprobs", floating=floating)
    allowed: list[tuple[tuple[int, ...], str]] = [(tuple(like.shape), "[B, T]")]
    if one_column:
        allowed.append(((like.shape[0], 1), "[B, 1]"))
    if per_sequence:
        allowed.append(((like.shape[0],), "[B]"))
    checks.shape(name, x, *allowed, source="logprobs")
