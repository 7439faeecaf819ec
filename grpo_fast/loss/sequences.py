"""Which tokens belong to one sequence, and sums and means over sequences."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Sequences"]


class Sequences:
    """The sequences of a batch: the rows of a padded ``[B, T]`` batch, or consecutive slices of a packed ``[N]`` one.

    Args:
        token_ids: ``[B, T]``, or ``[N]`` or ``[1, N]`` for packed input.
        cu_seqlens: ``[S + 1]``, where the sequences of packed input begin, then N. None: every row is a sequence.
    """

    def __init__(self, token_ids: Tensor, cu_seqlens: Tensor | None = None):
        self.segment: Tensor | None = None  # packed input only: int64 [N], the index of each token's sequence, non-decreasing
        if cu_seqlens is None:
            self.count = token_ids.shape[0] if token_ids.dim() == 2 else 1
        else:
            self.count = cu_seqlens.shape[0] - 1
            position = torch.arange(token_ids.shape[-1], device=token_ids.device)
            self.segment = torch.searchsorted(cu_seqlens[1:].contiguous(), position, right=True)

    @classmethod
    def from_segments(cls, segment: Tensor, count: int) -> Sequences:
        """Construct from the sequence index of each packed token, non-decreasing ``[N]``, and the number of sequences."""
        sequences = cls(segment)
        sequences.segment, sequences.count = segment, count
        return sequences

    def total(self, x: Tensor) -> Tensor:
        """Return the sum of x over each token's sequence; shaped like the tokens (``[B, 1]`` for a padded batch).

        On a CPU it is added in float64 from the first token to the last, so that its bits do not depend on padding and packing.
        """
        exact = x.double() if x.device.type == "cpu" else x
        if self.segment is None:
            if x.device.type != "cpu" or x.shape[-1] == 0:
                return x.sum(-1, keepdim=True)
            return exact.cumsum(-1)[..., -1:].to(x.dtype)  # sum() adds in an order that depends on the shape
        # segment_reduce and not index_add: on a GPU the latter adds in an order that changes from run to run.
        offsets = torch.searchsorted(self.segment, torch.arange(self.count + 1, device=x.device))
        per_sequence = torch.segment_reduce(
            exact.expand(*x.shape[:-1], self.segment.shape[0]).reshape(-1), "sum", offsets=offsets, axis=0, unsafe=True
        )
        return per_sequence.to(x.dtype).index_select(0, self.segment).view(*x.shape[:-1], -1)

    def mean(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return the mean of x over the unmasked tokens of each token's sequence; 0 for a sequence without unmasked tokens."""
        return self.total(x * mask) / self.total(mask.to(x.dtype)).clamp(min=1)

    def largest(self, x: Tensor) -> Tensor:
        """Return the maximum of x over each token's sequence, shaped as by `total`; x ``[B, T]`` or ``[N]``."""
        if self.segment is None:
            return x.amax(-1, keepdim=True) if x.shape[-1] else x.new_zeros(*x.shape[:-1], 1)
        per_sequence = x.new_full((self.count,), -torch.inf).scatter_reduce(0, self.segment, x, "amax")
        return per_sequence.index_select(0, self.segment)

    def take(self, tokens: Tensor | slice) -> Sequences:
        """Select some tokens of packed input, in the given order."""
        assert self.segment is not None
        return Sequences.from_segments(self.segment[tokens], self.count)
