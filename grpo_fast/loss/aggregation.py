"""Aggregation: one weight per token, so that ``loss = sum_n weight_n * loss_n`` for every member of the family."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_fast.loss.sequences import Sequences

__all__ = ["aggregation_weights"]


def aggregation_weights(
    aggregation: str,
    mask: Tensor,  # bool, [B, T] or [1, N]
    sequences: Sequences,
    num_items: int | float | Tensor | None = None,
    max_completion_length: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the weight of each token, broadcastable to the mask.

    ``|o|`` is the number of unmasked tokens of the token's sequence, S the number of sequences, fully masked ones included::

        sequence_mean            1 / (S |o|)
        token_mean               1 / sum |o|
        global_token_mean        1 / num_items; token_mean where num_items is None
        fixed_length             1 / (S max_completion_length)
        sequence_sum             1 / S
        nonempty_sequence_mean   sequence_mean with S the number of sequences that have an unmasked token (verl, OpenRLHF)
        nonempty_sequence_sum    sequence_sum with the same S
    """
    if aggregation.startswith("nonempty_"):
        per_length = sequences.total(mask.to(dtype)).clamp(min=1).reciprocal()
        nonempty = (mask * per_length).sum().round().clamp(min=1)
        return per_length / nonempty if aggregation == "nonempty_sequence_mean" else nonempty.reciprocal()
    count = max(sequences.count, 1)
    if aggregation == "sequence_mean":
        return (count * sequences.total(mask.to(dtype)).clamp(min=1)).reciprocal()
    if aggregation == "fixed_length":
        assert max_completion_length is not None  # LossConfig checks it
        return torch.full((), 1 / (count * max_completion_length), dtype=dtype, device=mask.device)
    if aggregation == "sequence_sum":
        return torch.full((), 1 / count, dtype=dtype, device=mask.device)
    if aggregation == "global_token_mean" and num_items is not None:
        if not isinstance(num_items, Tensor):  # full() fills on the device; copying a number there would synchronise
            num_items = torch.full((), num_items, dtype=dtype, device=mask.device)
        return num_items.to(mask.device, dtype).clamp(min=1).reciprocal()
    return mask.sum().to(dtype).clamp(min=1).reciprocal()
