"""Importance weights for a sampler whose probabilities differ from the trainer's, and masks that exclude tokens from the surrogate.

Each function returns a factor per token or per sequence. Multiply the factors and pass them as ``grpo_loss(..., rollout_weights=...)``,
which applies them to the surrogate and not to the KL penalty, and does not change the denominators (as in TRL). They have no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_fast.loss import checks
from grpo_fast.loss.config import LARGEST_LOG_RATIO
from grpo_fast.loss.sequences import Sequences
from grpo_fast.loss.statistics import top_threshold
from grpo_fast.loss.token_inputs import check_cu_seqlens, checked_mask

__all__ = ["checked_bound", "checked_loss_mask", "checked_sequences", "off_policy_sequence_mask", "rollout_weights", "top_entropy_mask"]

LEVELS = ("token", "sequence", "sequence_mean")


@torch.no_grad()
def rollout_weights(
    old_logprobs: Tensor,  # [B, T] or packed [N]
    rollout_logprobs: Tensor,  # like old_logprobs
    mask: Tensor,  # like old_logprobs
    *,
    mode: str = "truncate",
    level: str = "token",
    low: float | None = None,
    high: float | None = 3.0,
    cu_seqlens: Tensor | None = None,  # int32 [S + 1]
    log_ratio_clamp: float = 20.0,
) -> Tensor:  # float32 [B, T], [B, 1] or [N]
    """Return importance weights exp(old - rollout) between the trainer's policy and the sampler's (truncated importance sampling).

    Args:
        old_logprobs: float ``[B, T]`` or packed ``[N]``: log-probabilities under the trainer's copy of the sampling policy.
        rollout_logprobs: like old_logprobs: as the sampler returned them, at the same temperature; NaN (not scored) means no difference.
        mask: bool or 0/1, like old_logprobs; a masked token gets the weight of a log-ratio of 0.
        mode: ``"truncate"`` clamps the weight to [low, high] (TIS); ``"mask"`` sets it to 0 outside (MIS, IcePop, arXiv:2510.18855).
        level: ``"token"``; ``"sequence"``, the product over the sequence (TRL, verl); ``"sequence_mean"``, its geometric mean (ms-swift,
            OpenRLHF).
        low, high: inclusive bounds of the weight, >= 0; None = no bound.
        cu_seqlens: int32 ``[S + 1]``, where sequences begin; required with packed input unless ``level="token"``.
        log_ratio_clamp: bound of the log-weight before exp, > 0 and at most 80.

    Returns:
        float32: ``[B, T]`` for ``level="token"``, ``[B, 1]`` for the sequence levels, ``[N]`` for packed input.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape, device or value is wrong; the message names the argument, its value, what was expected and the fix.

    Example:
        >>> rollout_weights(torch.tensor([[-1.0, -1.0]]), torch.tensor([[-1.0, -3.0]]), torch.ones(1, 2), high=3.0)
        tensor([[1., 3.]])
    """
    if mode not in ("truncate", "mask"):
        raise ValueError(f"mode is {mode!r}; expected 'truncate' or 'mask'.")
    if level not in LEVELS:
        raise ValueError(f"level is {level!r}; expected one of {', '.join(LEVELS)}.")
    low, high = checked_bound("low", low), checked_bound("high", high)
    if low is not None and high is not None and low > high:
        raise ValueError(f"low is {low}, high is {high}; expected low <= high.")
    if checks.positive("log_ratio_clamp", log_ratio_clamp, "20 is usual.") > LARGEST_LOG_RATIO:
        raise ValueError(f"log_ratio_clamp is {log_ratio_clamp}; expected at most {LARGEST_LOG_RATIO}, since exp(88.8) overflows float32.")
    loss_mask = checked_loss_mask("old_logprobs", old_logprobs, mask, rollout_logprobs=rollout_logprobs)
    log_weight = torch.where(loss_mask, (old_logprobs - rollout_logprobs).float(), 0).nan_to_num(nan=0.0)
    if level != "token" or cu_seqlens is not None:
        sequences = checked_sequences("old_logprobs", old_logprobs, cu_seqlens)
    if level != "token":
        log_weight = sequences.total(log_weight) if level == "sequence" else sequences.mean(log_weight, loss_mask)
    weight = log_weight.clamp(-log_ratio_clamp, log_ratio_clamp).exp()
    if mode == "truncate":
        return weight if low is None and high is None else weight.clamp(low, high)
    outside = torch.zeros_like(weight, dtype=torch.bool)
    outside = outside if low is None else outside | (weight < low)
    outside = outside if high is None else outside | (weight > high)
    return weight.masked_fill(outside, 0.0)


@torch.no_grad()
def off_policy_sequence_mask(
    logprobs: Tensor,  # [B, T] or packed [N]
    rollout_logprobs: Tensor,  # like logprobs
    advantages: Tensor,  # [B], [B, T] or [N]
    mask: Tensor,  # like logprobs
    *,
    threshold: float,
    cu_seqlens: Tensor | None = None,  # int32 [S + 1]
) -> Tensor:  # float32, like advantages; [B, 1] for [B]
    """Return 0 for the tokens of off-policy sequences with a negative advantage, else 1 (DeepSeek-V3.2, arXiv:2512.02556, equation 9).

    A token is masked where A < 0 and the mean over its sequence of rollout_logprobs - logprobs exceeds the threshold.

    Args:
        logprobs: float ``[B, T]`` or packed ``[N]``: log-probabilities under the current policy.
        rollout_logprobs: like logprobs: as the sampler returned them, at the same temperature; NaN (not scored) means no difference.
        advantages: ``[B]``, or like logprobs.
        mask: bool or 0/1, like logprobs.
        threshold: in nats per token; TRL suggests 0.5.
        cu_seqlens: int32 ``[S + 1]``, where sequences begin; required with packed input.

    Returns:
        float32: ``[B, 1]`` for advantages ``[B]``, else like logprobs.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape, device or value is wrong; the message names the argument, its value, what was expected and the fix.

    Example:
        >>> current, sampled = torch.tensor([[-3.0], [-3.0]]), torch.tensor([[-1.0], [-1.0]])
        >>> off_policy_sequence_mask(current, sampled, torch.tensor([1.0, -1.0]), torch.ones(2, 1), threshold=0.5)
        tensor([[1.],
                [0.]])
    """
    threshold = checks.finite("threshold", threshold, "It is in nats per token; 0.5 is usual.")
    loss_mask = checked_loss_mask("logprobs", logprobs, mask, rollout_logprobs=rollout_logprobs)
    sequences = checked_sequences("logprobs", logprobs, cu_seqlens)
    checks.tensor("advantages", advantages, like=logprobs, like_name="logprobs")
    allowed: list[tuple[tuple[int, ...], str]] = [(tuple(logprobs.shape), "[N]" if logprobs.dim() == 1 else "[B, T]")]
    if logprobs.dim() == 2:
        allowed.append(((logprobs.shape[0],), "[B]"))
    checks.shape("advantages", advantages, *allowed, source="logprobs")
    drift = torch.where(loss_mask, (rollout_logprobs - logprobs).float(), 0).nan_to_num(nan=0.0)
    per_token = advantages.unsqueeze(1) if advantages.dim() < logprobs.dim() else advantages
    drifted = sequences.mean(drift, loss_mask) > threshold
    return (~(drifted & (per_token < 0))).float()


@torch.no_grad()
def top_entropy_mask(
    entropy: Tensor,  # [B, T] or packed [N]
    mask: Tensor,  # like entropy
    *,
    quantile: float,
) -> Tensor:  # float32, like entropy
    """Return 1 for the share ``quantile`` of the unmasked tokens with the highest entropy, else 0 (arXiv:2506.01939 uses 0.2).

    All tokens at the threshold are kept, so that equal entropies keep every token. NaN is never kept and does not move the threshold.

    Args:
        entropy: float ``[B, T]`` or packed ``[N]``, in nats: from ``token_logprobs``, or from the loss under no_grad.
        mask: bool or 0/1, like entropy.
        quantile: the share of tokens to keep, 0 < quantile <= 1.

    Returns:
        float32, like entropy.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape, device or value is wrong; the message names the argument, its value, what was expected and the fix.

    Example:
        >>> top_entropy_mask(torch.tensor([[0.1, 0.9, 0.5, 0.3]]), torch.ones(1, 4), quantile=0.5)
        tensor([[0., 1., 1., 0.]])
    """
    quantile = checks.positive("quantile", quantile, "It is the share of tokens that are kept; 0.2 is usual.")
    if quantile > 1:
        raise ValueError(f"quantile is {quantile}; expected at most 1, which keeps every token.")
    loss_mask = checked_loss_mask("entropy", entropy, mask) & ~entropy.isnan()
    return (loss_mask & (entropy >= top_threshold(entropy[loss_mask], quantile))).float()


def checked_loss_mask(name: str, tokens: Tensor, mask: Tensor, **same_shape: Tensor) -> Tensor:
    """Validate the tokens, the tensors that must have their shape, and the mask; return the mask as bool."""
    checks.tensor(name, tokens, like=None)
    if tokens.dim() not in (1, 2):
        raise ValueError(f"{name} has shape {list(tokens.shape)}; expected [B, T] or packed [N].")
    for other, x in same_shape.items():
        checks.tensor(other, x, like=tokens, like_name=name)
        checks.shape(other, x, (tuple(tokens.shape), f"the shape of {name}"), source=name)
    return checked_mask(mask, tokens, name)


def checked_sequences(name: str, tokens: Tensor, cu_seqlens: Tensor | None) -> Sequences:
    """Validate the boundaries of the sequences of packed tokens, and return the sequences."""
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, tokens, name)
    elif tokens.dim() == 1:
        raise ValueError("cu_seqlens is None with packed input; expected int32 [S + 1]. Pass where the sequences begin, 0 ... N.")
    return Sequences(tokens, cu_seqlens)


def checked_bound(name: str, value: float | None, what: str = "It bounds a weight exp(old - rollout).") -> float | None:
    """Validate a bound that may be None; ``what`` says in the message what it bounds."""
    return None if value is None else checks.not_negative(name, value, f"{what} Pass None for no bound.")
