"""DeepSeek-V3.2's off-policy sequence mask (arXiv:2512.02556, equation 9) for the sequences of a micro-batch."""

from __future__ import annotations

from torch import Tensor

from grpo_fast.loss.corrections import off_policy_sequence_mask
from grpo_fast.models.batch import ForwardBatch
from grpo_fast.models.packing import PackedBatch

__all__ = ["masked_weights"]


def masked_weights(batch: ForwardBatch, packed: PackedBatch, logprobs: Tensor, threshold: float) -> tuple[Tensor | None, Tensor]:
    """Set the weights of off-policy sequences with a negative advantage to 0.

    The distance of a sequence is the mean of sampling - current log-probability; the sampling ones are the sampler's, or those of the old
    policy if the sampler reports none. With neither, the policy is still the one that sampled, and nothing is masked.

    Args:
        batch: B sequences with N tokens.
        packed: the same as tensors.
        logprobs: float32 [N], of the current policy.
        threshold: largest distance, in nats per token.

    Returns:
        The weights of the surrogate, float32 [N] (None = all 1), and the share of the sequences that are masked, without dimensions.
    """
    weights, sampled = batch.tokens.get("weights"), batch.tokens.get("sampler", batch.tokens.get("old"))
    if sampled is None:
        return weights, logprobs.new_zeros(())
    advantages = packed.per_token(batch.advantages).to(logprobs)
    loss_mask = packed.per_token(batch.loss_mask)
    kept = off_policy_sequence_mask(logprobs, sampled, advantages, loss_mask, threshold=threshold, cu_seqlens=packed.cu_seqlens)
    first = packed.cu_seqlens[:-1].long()  # every completion has at least one token
    return (kept if weights is None else weights * kept), 1 - kept[first].mean()
