"""Factors of the surrogate that compare the current policy with the one that sampled, for the sequences of a micro-batch.

They are DeepSeek-V3.2's off-policy sequence mask (arXiv:2512.02556, equation 9) and, where the old policy is not computed, rejections.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from grpo_fast.loss.corrections import off_policy_sequence_mask
from grpo_fast.loss.rejection import Rejection, rejection_mask
from grpo_fast.models.batch import ForwardBatch
from grpo_fast.models.packing import PackedBatch

__all__ = ["masked_weights", "rejected_shares", "rejection_factor"]


def masked_weights(
    batch: ForwardBatch, packed: PackedBatch, logprobs: Tensor, threshold: float | None, rejections: Sequence[Rejection] = ()
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """Set the weights of rejected tokens to 0, and those of off-policy sequences with a negative advantage.

    The sampling log-probabilities are the sampler's, or those of the old policy if the sampler reports none. With neither, the policy is
    still the one that sampled, and nothing is masked.

    Args:
        batch: B sequences with N tokens.
        packed: the same as tensors.
        logprobs: float32 [N], of the current policy.
        threshold: largest distance of a sequence, the mean of sampling - current log-probability, in nats per token; None = off.
        rejections: criteria by which tokens and sequences are rejected.

    Returns:
        The weights of the surrogate, float32 [N] (None = all 1), and metrics without dimensions: with a threshold ``off_policy_masked``,
        the share of the sequences that are masked, and with rejections those of `rejected_shares`.
    """
    weights, sampled = batch.tokens.get("weights"), batch.tokens.get("sampler", batch.tokens.get("old"))
    loss_mask = packed.per_token(batch.loss_mask)
    metrics: dict[str, Tensor] = {}
    factors = [] if weights is None else [weights]
    if threshold is not None:
        metrics["off_policy_masked"] = logprobs.new_zeros(())
    if sampled is None:
        return weights, metrics
    if threshold is not None:
        advantages = packed.per_token(batch.advantages).to(logprobs)
        kept = off_policy_sequence_mask(logprobs, sampled, advantages, loss_mask, threshold=threshold, cu_seqlens=packed.cu_seqlens)
        first = packed.cu_seqlens[:-1].long()  # every completion has at least one token
        metrics["off_policy_masked"] = 1 - kept[first].mean()
        factors.append(kept)
    if rejections:
        kept = rejection_factor(rejections, logprobs, sampled, loss_mask, packed.cu_seqlens)
        metrics |= rejected_shares(kept, loss_mask, packed.cu_seqlens)
        factors.append(kept)
    for factor in factors[1:]:
        factors[0] = factors[0] * factor
    return (factors[0] if factors else None), metrics


def rejection_factor(rejections: Sequence[Rejection], logprobs: Tensor, sampled: Tensor, loss_mask: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return 1 for the tokens that satisfy all criteria, else 0: float32 [N]; the arguments are those of `rejection_mask`."""
    kept = torch.ones_like(logprobs, dtype=torch.float32)
    for each in rejections:
        kept = kept * rejection_mask(logprobs, sampled, loss_mask, **each._asdict(), cu_seqlens=cu_seqlens)
    return kept


def rejected_shares(kept: Tensor, loss_mask: Tensor, cu_seqlens: Tensor) -> dict[str, Tensor]:
    """Return ``rejected_tokens``, the share of the tokens in the loss that are rejected, and ``rejected_sequences``, the share of the
    sequences that have such a token; without dimensions.
    """
    rejected = (loss_mask.bool() & (kept == 0)).float()
    of_sequence = torch.segment_reduce(rejected, "max", offsets=cu_seqlens.long(), initial=0.0)
    counted = torch.segment_reduce(loss_mask.float(), "max", offsets=cu_seqlens.long(), initial=0.0)
    return {
        "rejected_tokens": rejected.sum() / loss_mask.sum().clamp(min=1),
        "rejected_sequences": of_sequence.sum() / counted.sum().clamp(min=1),
    }
