"""Log-probability and entropy from hidden states, both differentiable, for any loss on top.

Nothing is known of that loss in the forward pass, so what backward will need is kept or made again:

    frozen head      d logprob / d hidden is made at once, while the logits are there; backward scales its rows            4 N D V
                     a gradient of the entropy computes the logits again                                                   8
    trainable head   logits that fit into keep_bytes are kept, and become their gradient in place                          6
                     the others are computed again                                                                         8
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_fast.head.chunking import Chunk, Plan, plan_of
from grpo_fast.head.products import Head, HeadTensors
from grpo_fast.loss.token_rows import RowStatistics, TokenRows

__all__ = ["Forward", "linear_token_logprobs_bwd", "linear_token_logprobs_fwd"]


class Forward(NamedTuple):
    """What the forward pass leaves for backward."""

    statistics: RowStatistics  # float32 [1, N]
    order: Plan
    slopes: HeadTensors | None  # d logprob / d of the hidden states, for a frozen head
    kept: list[Tensor]  # logits of the first chunks


def linear_token_logprobs_fwd(
    make_head: Callable[[Plan], Head],
    rows: TokenRows,
    *,
    limit: int,  # tokens per chunk
    keep: int,  # tokens whose logits may be kept
    want_slopes: bool,
) -> Forward:
    """Log-probability, entropy and log-sum-exp, nothing recorded by autograd."""
    order = plan_of(rows.mask[0], rows.mask[0], limit, None)
    head = make_head(order)
    statistics = RowStatistics(*(torch.zeros_like(rows.mask, dtype=torch.float32) for _ in range(3)))
    if want_slopes or order.kept_chunks(keep) < len(order.chunks):
        head.reserve(order.largest)
    kept: list[Tensor] = []
    for chunk in order.chunks:
        tokens = order.tokens(chunk.begin, chunk.end)
        some, keeps = rows.take(tokens), not want_slopes and len(kept) < order.kept_chunks(keep)
        logits = head.logits(tokens, keep=keeps)
        found = some.statistics(logits.unsqueeze(0))
        for into, part in zip(statistics, found, strict=True):
            into[:, tokens] = part
        if keeps:
            kept.append(logits)
        elif want_slopes:
            some.gradient_(logits.unsqueeze(0), found, torch.ones_like(found.logprobs), torch.zeros_like(found.logprobs))
            head.add_gradient(logits, tokens)
    return Forward(statistics, order, head.gradients() if want_slopes else None, kept)


def linear_token_logprobs_bwd(
    make_head: Callable[[Plan], Head], rows: TokenRows, forward: Forward, g: Tensor, h: Tensor, *, keep_graph: bool
) -> HeadTensors:
    """The gradients of the head's tensors from those of log-probabilities and entropies, [1, N]."""
    statistics, order, _, kept = forward
    head = make_head(order)
    if len(kept) < len(order.chunks) or keep_graph:
        head.reserve(order.largest)

    def gradient_of(i: int, chunk: Chunk) -> None:
        tokens = order.tokens(chunk.begin, chunk.end)
        logits = head.logits(tokens) if i >= len(kept) or keep_graph else kept[i]  # a graph that stays needs its logits again
        piece = RowStatistics(*(x[:, tokens] for x in statistics))
        rows.take(tokens).gradient_(logits.unsqueeze(0), piece, g[:, tokens], h[:, tokens])
        head.add_gradient(logits, tokens)
        if i < len(kept) and not keep_graph:
            kept[i] = logits.new_empty(0)  # its memory is free for the next chunk's products

    for i, chunk in enumerate(order.chunks):
        gradient_of(i, chunk)
    return head.gradients()
