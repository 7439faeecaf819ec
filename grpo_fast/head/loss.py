"""The GRPO loss from hidden states. For each chunk of tokens: compute the logits, overwrite them with their gradient, and compute the
gradients of hidden states and weight from it.

The gradient coefficients of a token follow from its log-probability, or from those of its sequence (a chunk then holds whole sequences). So
the logits are computed only once: 6 N D V operations with a trainable head, 4 N D V with a frozen one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_fast.head.chunking import Chunk, ChunkPlan
from grpo_fast.head.kept import KeptTokens, plan_rows
from grpo_fast.head.matrix_products import Head, HeadTensors
from grpo_fast.loss.inputs import LossInputs
from grpo_fast.loss.logprob_loss import policy_loss
from grpo_fast.loss.operator_arguments import loss_arguments
from grpo_fast.loss.token_rows import RowStatistics, TokenRows
from grpo_fast.ops.grpo_loss import METRICS
from grpo_fast.ops.library import call_below_autograd

__all__ = ["LINEAR_METRICS", "LinearLossResult", "linear_loss"]

LINEAR_METRICS = (*METRICS, "recomputed_fraction")


class LinearLossResult(NamedTuple):
    """The results of a call, and the gradients for an upstream gradient of 1."""

    loss: Tensor  # 0-d float32
    logprobs: Tensor  # float32 [1, N], 0 where not computed
    entropy: Tensor  # float32 [1, N]
    metrics: Tensor  # float32, in the order of LINEAR_METRICS
    gradients: HeadTensors


def linear_loss(
    make_head: Callable[[ChunkPlan], Head],
    rows: TokenRows,
    inputs: LossInputs,  # packed
    *,
    only_active: bool,
    with_gradient: bool,
    rows_per_chunk: int,
    tile: int | None = None,
) -> LinearLossResult:
    """Compute loss, metrics and gradients; autograd records nothing.

    Args:
        make_head: makes the head for a plan's chunks.
        only_active: do not compute unmasked tokens that cannot change the gradient.
        tile: of batch invariance, see plan_chunks.
    """
    active = inputs.active()
    computed = active if only_active else inputs.mask
    rows, token_level = rows._replace(mask=computed), inputs.token_level()
    with_grad = active if with_gradient else torch.zeros_like(active)
    sets_given = rows.sets is not None
    plan, rows, apart = plan_rows(rows, with_grad, rows_per_chunk, inputs.sequences if token_level is None else None, tile)
    # The two ways to the gradient differ in rounding. With batch invariance the sets of other tokens do not choose between them.
    without_sets = rows.sets is None if tile is None else not sets_given
    in_one_pass = token_level is not None and not inputs.needs_two_passes and rows.shard is None and without_sets
    head = make_head(plan)
    head.reserve(plan.max_rows)
    statistics = RowStatistics(*(torch.zeros_like(computed, dtype=torch.float32) for _ in range(3)))
    kept = None
    if apart is not None and plan.restricted.apart_with_grad:
        kept = KeptTokens(head, apart._replace(mask=apart.mask & with_grad))
        kept.statistics_into(statistics)
    if apart is not None and plan.restricted.apart_without_grad:
        KeptTokens(head, apart._replace(mask=apart.mask & ~with_grad)).statistics_into(statistics)
    g, h = (torch.zeros_like(x) for x in (statistics.logprobs, statistics.entropy))  # of the chunks' tokens, written by two_passes

    def compute_statistics(begin: int, end: int) -> Tensor:  # returns the logits
        tokens = plan.tokens(begin, end)
        logits = head.logits(tokens)
        for into, part in zip(statistics, rows.take(tokens).statistics(logits.unsqueeze(0)), strict=True):
            into[:, tokens] = part
        return logits

    def one_pass(begin: int, end: int) -> None:
        assert token_level is not None
        tokens = plan.tokens(begin, end)
        logits = head.logits(tokens)
        arguments = loss_arguments(rows.take(tokens), token_level.take(tokens))
        _, statistics.logprobs[:, tokens], statistics.entropy[:, tokens], _ = call_below_autograd(
            torch.ops.grpo_fast.grpo_loss_.default, logits.unsqueeze(0), *arguments, head.bfloat16_gradient
        )
        head.add_gradient(logits, tokens)

    def two_passes(chunk: Chunk) -> None:
        for begin, end in chunk.pieces:
            logits = compute_statistics(begin, end)
        # The coefficients of a token follow from its own log-probability, or from those of its sequence, kept sets included.
        tokens = plan.tokens(chunk.begin, chunk.end) if token_level is not None else chunk.sequence_span
        assert tokens is not None
        of_tokens = RowStatistics(*(x[:, tokens] for x in statistics))
        g[:, tokens], h[:, tokens] = _coefficients(of_tokens, (token_level or inputs).take(tokens), computed[:, tokens])
        for begin, end in chunk.pieces if plan.in_order else reversed(chunk.pieces):  # the logits of the last piece are still in memory
            tokens = plan.tokens(begin, end)
            if not plan.has_logits(chunk, end):
                logits = head.logits(tokens)
            of_piece = RowStatistics(*(x[:, tokens] for x in statistics))
            of_logits = (logits.unsqueeze(0), of_piece, g[:, tokens], h[:, tokens])
            rows.take(tokens).gradient_(*of_logits, bfloat16=head.bfloat16_gradient)
            head.add_gradient(logits, tokens)

    for chunk in plan.nograd_chunks:
        compute_statistics(chunk.begin, chunk.end)
    for chunk in plan.grad_chunks:
        if in_one_pass:
            one_pass(chunk.begin, chunk.end)
        else:
            two_passes(chunk)
    if kept is not None:
        kept.add_gradient(statistics, *_coefficients(statistics, token_level or inputs, computed))
    gradients = head.gradients()  # first, because it frees the memory of the logits
    loss, metrics = policy_loss(statistics.logprobs, statistics.entropy, inputs, computed)
    recomputed = torch.full_like(loss, plan.recomputed_tokens) / computed.sum().clamp(min=1)
    values = torch.stack([*(metrics[name] for name in METRICS), recomputed])
    return LinearLossResult(loss.float(), statistics.logprobs, statistics.entropy, values, gradients)


def _coefficients(statistics: RowStatistics, inputs: LossInputs, computed: Tensor) -> tuple[Tensor, Tensor]:
    """Return g = d loss / d logprob and h = d loss / d entropy of every token, by autograd through the loss over log-probabilities."""
    below_autograd = torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)
    with below_autograd, torch.enable_grad():  # autograd is off inside an operator's own implementation
        logprobs, entropy = (x.detach().requires_grad_() for x in statistics[:2])
        loss, _ = policy_loss(logprobs, entropy, inputs, computed)
        if not loss.requires_grad:
            return torch.zeros_like(logprobs), torch.zeros_like(entropy)
        g, h = torch.autograd.grad(loss, (logprobs, entropy), allow_unused=True, materialize_grads=True)
    return g, h
