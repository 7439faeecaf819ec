"""Log-probability and entropy from hidden states, both differentiable, for any loss on top.

The forward pass does not know the loss, so the logits that backward needs are either used at once, kept, or computed again:

    frozen head      d logprob / d hidden is computed in the forward pass, while the logits exist; backward scales its rows  4 N D V
                     a gradient of the entropy computes the logits again                                                   8
    trainable head   logits that fit into keep_bytes are kept, and overwritten with their gradient                         6
                     the others are computed again                                                                         8
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_fast.head.chunking import Chunk, ChunkPlan
from grpo_fast.head.kept import KeptTokens, PlannedRows, plan_rows
from grpo_fast.head.matrix_products import Head, HeadTensors
from grpo_fast.loss.token_rows import RowStatistics, TokenRows

__all__ = ["LogprobsState", "linear_token_logprobs_bwd", "linear_token_logprobs_fwd"]


class LogprobsState(NamedTuple):
    """The state that the forward pass saves for backward."""

    statistics: RowStatistics  # float32 [1, N]
    planned: PlannedRows
    dlogprob_dhidden: HeadTensors | None  # of a frozen head: the derivatives with respect to hidden and adapted
    kept_logits: list[Tensor]  # of the first chunks
    kept_tokens: KeptTokens | None = None  # tokens with kept sets, and the logits of the sets


def linear_token_logprobs_fwd(
    make_head: Callable[[ChunkPlan], Head],
    rows: TokenRows,
    *,
    rows_per_chunk: int,
    max_kept_tokens: int,
    with_derivative: bool,
    tile: int | None = None,
) -> LogprobsState:
    """Compute log-probability, entropy and log-sum-exp; autograd records nothing.

    Args:
        make_head: makes the head for a plan's chunks.
        max_kept_tokens: tokens whose logits may be kept.
        with_derivative: also compute d logprob / d hidden.
        tile: of batch invariance, see plan_chunks.
    """
    planned = plan_rows(rows, rows.mask, rows_per_chunk, tile=tile)
    plan, rows, apart = planned
    head = make_head(plan)
    statistics = RowStatistics(*(torch.zeros_like(rows.mask, dtype=torch.float32) for _ in range(3)))
    kept_chunks = 0 if with_derivative else plan.chunks_within(max_kept_tokens)
    if kept_chunks < len(plan.grad_chunks):
        head.reserve(plan.max_rows)
    kept_tokens = None
    if apart is not None:
        kept_tokens = KeptTokens(head, apart)
        kept_tokens.statistics_into(statistics)
        if with_derivative:
            kept_tokens.add_gradient(statistics, torch.ones_like(statistics.logprobs), torch.zeros_like(statistics.logprobs))
    kept: list[Tensor] = []
    for chunk in plan.grad_chunks:
        tokens = plan.tokens(chunk.begin, chunk.end)
        chunk_of_rows, keep = rows.take(tokens), len(kept) < kept_chunks
        logits = head.logits(tokens, keep=keep)
        found = chunk_of_rows.statistics(logits.unsqueeze(0))
        for into, part in zip(statistics, found, strict=True):
            into[:, tokens] = part
        if keep:
            kept.append(logits)
        elif with_derivative:
            one, zero = torch.ones_like(found.logprobs), torch.zeros_like(found.logprobs)
            chunk_of_rows.gradient_(logits.unsqueeze(0), found, one, zero, bfloat16=head.bfloat16_gradient)
            head.add_gradient(logits, tokens)
    return LogprobsState(statistics, planned, head.gradients() if with_derivative else None, kept, kept_tokens)


def linear_token_logprobs_bwd(
    make_head: Callable[[ChunkPlan], Head], state: LogprobsState, g: Tensor, h: Tensor, *, keep_graph: bool
) -> HeadTensors:
    """Compute the gradients of the head's tensors from those of log-probabilities (g) and entropies (h), ``[1, N]`` each.

    Args:
        keep_graph: whether a second backward pass may follow, so that kept logits may not be overwritten.
    """
    (plan, rows, apart), kept = state.planned, state.kept_logits
    head = make_head(plan)
    if apart is not None:
        (state.kept_tokens or KeptTokens(head, apart)).add_gradient(state.statistics, g, h, head=head)
    if len(kept) < len(plan.grad_chunks) or keep_graph:
        head.reserve(plan.max_rows)

    def add_chunk(i: int, chunk: Chunk) -> None:
        tokens = plan.tokens(chunk.begin, chunk.end)
        logits = head.logits(tokens) if i >= len(kept) or keep_graph else kept[i]
        statistics = RowStatistics(*(x[:, tokens] for x in state.statistics))
        of_logits = (logits.unsqueeze(0), statistics, g[:, tokens], h[:, tokens])
        rows.take(tokens).gradient_(*of_logits, bfloat16=head.bfloat16_gradient)
        head.add_gradient(logits, tokens)
        if i < len(kept) and not keep_graph:
            kept[i] = logits.new_empty(0)  # frees the memory for the products of the next chunk

    for i, chunk in enumerate(plan.grad_chunks):
        add_chunk(i, chunk)
    return head.gradients()
