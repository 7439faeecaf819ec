"""Collects the sets of tokens that truncated sampling keeps, step by step, for the samplers that run the model themselves."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from grpo_fast.loss.support import Support

__all__ = ["KeptSetRecorder"]


class KeptSetRecorder:
    """Records for each step and row which tokens truncation has kept, and the probability that they had before.

    The sets are moved to the CPU in compressed form; no scores [B, V] are kept.
    """

    def __init__(self) -> None:
        self._sets: list[Support] = []  # of each step
        self._masses: list[Tensor] = []
        self._first: dict[object, list[int]] = {}  # where the positions of each row are, over all steps
        self._count = 0

    def record(self, scores: Tensor, truncated: Tensor, rows: Sequence[object] | None = None) -> None:
        """Record a step.

        Args:
            scores: z / T, [B, V], before truncation.
            truncated: [B, V], -inf where a token is left out.
            rows: names of the rows; None: 0 ... B - 1.
        """
        kept = truncated > -torch.inf
        self._sets.append(Support.from_mask(kept).to("cpu"))
        self._masses.append((truncated.logsumexp(-1) - scores.logsumexp(-1)).exp().cpu())
        for index, row in enumerate(range(kept.shape[0]) if rows is None else rows):
            self._first.setdefault(row, []).append(self._count + index)
        self._count += kept.shape[0]

    def of_row(self, row: object, length: int) -> tuple[Support, list[float]]:
        """Return the sets and their probabilities of a row's first ``length`` tokens."""
        if len(self._sets) > 1:
            self._sets, self._masses = [Support.concatenate(self._sets)], [torch.cat(self._masses)]
        index = torch.tensor(self._first.get(row, [])[:length], dtype=torch.int64)
        if index.numel() == 0:
            return Support.unrestricted(0), []
        return self._sets[0].take(index), self._masses[0][index].tolist()
