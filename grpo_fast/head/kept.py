"""The tokens of a head call that have kept sets: their logits are computed at the ids of their sets only.

For a set of K ids a token costs 2 D K operations for its logits and 2 D K each for the gradients of hidden states and weight, in place of
2 D V. All logits of kept sets are in memory at once, 4 bytes an id (and the ids themselves), since they are few.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from grpo_fast.head.chunking import ChunkPlan, Restricted, plan_chunks
from grpo_fast.head.matrix_products import DenseHead, Head
from grpo_fast.head.memory import is_capturing
from grpo_fast.loss.sequences import Sequences
from grpo_fast.loss.token_rows import RowStatistics, TokenRows
from grpo_fast.loss.vocab_parallel import combine_over_shards
from grpo_fast.ops.kept_logprobs import KeptRows, capped

__all__ = ["KeptTokens", "PlannedRows", "largest_kept_set", "plan_rows"]

# Sets of more than 1 / share of the vocabulary are computed over the whole vocabulary: measured on a CPU with AMX, whose products of 16-bit
# operands are several times as fast as those of float32 (docs/kept-sets.md). On a GPU, where it is not measured, OTHER_SHARE holds.
LARGEST_SHARES = {torch.float32: 16, torch.bfloat16: 32, torch.float16: 32}
OTHER_SHARE = 32


def largest_kept_set(vocabulary: int, dtype: torch.dtype, device: torch.device) -> int:
    """Return the size of a set up to which its logits are computed by themselves; beyond it the product over the vocabulary is faster.

    Args:
        dtype: of the operands of the product.
    """
    return vocabulary // (LARGEST_SHARES[dtype] if device.type == "cpu" else OTHER_SHARE)


class PlannedRows(NamedTuple):
    """The tokens of a call: those that are computed over the whole vocabulary in chunks, and those at the ids of their sets only."""

    plan: ChunkPlan  # of the former
    in_chunks: TokenRows  # of the whole call; the mask selects them. With sets only if one of them has a (large) set
    apart: TokenRows | None  # the same of the latter; None if there are none


def plan_rows(
    rows: TokenRows, with_grad: Tensor, rows_per_chunk: int, sequences: Sequences | None = None, tile: int | None = None
) -> PlannedRows:
    """Separate the tokens with small sets from the others, and divide the others into chunks.

    Args:
        rows: of the whole call; the mask selects the tokens that are computed.
        with_grad: bool ``[1, N]``, those of them that get a gradient.
        rows_per_chunk, sequences, tile: see plan_chunks.

    Raises:
        RuntimeError: there are sets, and a CUDA graph is being captured.
    """
    if rows.sets is None:
        plan = plan_chunks(rows.mask[0], with_grad[0], rows_per_chunk, sequences, tile)
        return PlannedRows(plan, rows, None)
    if is_capturing(rows.mask.device):
        raise RuntimeError(
            "support was given while a CUDA graph is captured; expected no capture, since the sizes of the sets are read from the device. "
            "Fix: call the loss outside of the graph."
        )
    sizes = rows.sets.offsets.diff().unsqueeze(0)
    apart = rows.mask & (sizes > 0) & (sizes <= rows.largest_kept_set)
    others = rows.mask & ~apart
    restricted = Restricted(apart[0], (others & (sizes != 0))[0])
    plan = plan_chunks(others[0], with_grad[0], rows_per_chunk, sequences, tile, restricted)
    some_apart = plan.restricted.apart_with_grad + plan.restricted.apart_without_grad > 0
    return PlannedRows(
        plan,
        rows._replace(mask=others, sets=rows.sets if plan.restricted.in_chunks else None),
        rows._replace(mask=apart) if some_apart else None,
    )


class KeptTokens:
    """Some tokens of a call with the logits of their sets."""

    def __init__(self, head: Head, rows: TokenRows):
        """Compute the logits.

        Args:
            rows: of the whole call, with sets; the mask selects the tokens.
        """
        assert isinstance(head, DenseHead)  # of a module largest_kept_set is 0
        self.head, self.rows, self.arguments = head, rows, rows.kept
        self._groups: list[tuple[KeptRows, Tensor, Tensor | float]] = []
        for found in self.arguments.rows(head.vocabulary):
            s, derivative = capped(head.kept_logits(found.positions, found.columns), rows.softcap, rows.logit_scale)
            self._groups.append((found, torch.where(found.valid, s, -torch.inf), derivative))

    def statistics_into(self, statistics: RowStatistics) -> None:
        """Write log-probability, entropy and log-sum-exp of these tokens into those of all tokens, float32 [1, N]."""
        own = RowStatistics(*(torch.zeros_like(x) for x in statistics))
        for found, s, _ in self._groups:
            for into, part in zip(own, self.arguments.statistics(s, found), strict=True):
                into[:, found.positions] = part
        if self.rows.shard is not None:
            own = combine_over_shards(own, self.rows.own_ids >= 0, self.rows.mask, self.rows.shard.group)
        for into, part in zip(statistics, own, strict=True):
            into.copy_(torch.where(self.rows.mask, part, into))

    def add_gradient(self, statistics: RowStatistics, g: Tensor, h: Tensor, *, head: Head | None = None) -> None:
        """Add these tokens' contribution to the gradients of the head's tensors.

        Args:
            statistics: of all tokens, [1, N].
            g, h: d loss / d logprob and d loss / d entropy of all tokens, [1, N].
            head: which collects the gradients; None: the one that computed the logits.
        """
        collector = self.head if head is None else head
        assert isinstance(collector, DenseHead)
        for found, s, derivative in self._groups:
            gradient = s.clone()
            self.arguments.gradient_(gradient, found, statistics, g, h)
            gradient = torch.where(found.valid, gradient * derivative, 0)
            collector.add_kept_gradient(gradient, found.positions, found.columns)
