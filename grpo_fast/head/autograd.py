"""The head's autograd functions: the loss computes its gradients in the forward pass, log-probabilities compute theirs in backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from grpo_fast.head.chunking import ChunkPlan, ChunkSize
from grpo_fast.head.logprobs import linear_token_logprobs_bwd, linear_token_logprobs_fwd
from grpo_fast.head.loss import LinearLossResult
from grpo_fast.head.matrix_products import Head, HeadTensors, NeedsGrad, per_row
from grpo_fast.loss.token_rows import TokenRows
from grpo_fast.ops.scale import scaled

__all__ = ["AutogradContext", "LinearLogprobsFunction", "LinearLossFunction"]

SCALED_ROWS = 512

AutogradContext = Any  # has the attributes that forward sets, besides its own
MakeHead = Callable[[HeadTensors, NeedsGrad, ChunkPlan], Head]


class LinearLossFunction(torch.autograd.Function):
    """Loss, log-probabilities, entropy and metrics. Backward returns the gradients of the forward pass times its upstream gradient."""

    @staticmethod
    def forward(
        ctx: AutogradContext, run: Callable[[HeadTensors, NeedsGrad], LinearLossResult], *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        loss, logprobs, entropy, metrics, gradients = run(HeadTensors(*tensors), NeedsGrad(*ctx.needs_input_grad[1:]))
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(logprobs, entropy, metrics)
        ctx.save_for_backward(*gradients)
        return loss, logprobs, entropy, metrics

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: AutogradContext, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return None, *HeadTensors()
        inplace = not torch._C._autograd._get_current_graph_task_keep_graph()
        return None, *(None if x is None else scaled(x, grad_loss, inplace=inplace) for x in ctx.saved_tensors)


class LinearLogprobsFunction(torch.autograd.Function):
    """Log-probabilities and entropy, [1, N]. The logits that backward needs are kept or computed again: see logprobs.py."""

    @staticmethod
    def forward(
        ctx: AutogradContext, make_head: MakeHead, rows: TokenRows, chunks: ChunkSize, max_kept_tokens: int, *given: Tensor | None
    ) -> tuple[Tensor, ...]:
        tensors, needs_grad = HeadTensors(*given), NeedsGrad(*ctx.needs_input_grad[4:])
        with torch.autocast(rows.mask.device.type, enabled=False):
            ctx.state = linear_token_logprobs_fwd(
                lambda plan: make_head(tensors, needs_grad, plan),
                rows,
                rows_per_chunk=chunks.rows,
                tile=chunks.tile,
                max_kept_tokens=max_kept_tokens,
                with_derivative=needs_grad.frozen_head,
            )
        ctx.make_head, ctx.mask = make_head, rows.mask
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*given)
        return ctx.state.statistics.logprobs.clone(), ctx.state.statistics.entropy.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: AutogradContext, g: Tensor | None, h: Tensor | None) -> tuple[Tensor | None, ...]:
        not_tensors = (None,) * 4  # the arguments of forward before the tensors have no gradient
        given, state, keep_graph = ctx.saved_tensors, ctx.state, torch._C._autograd._get_current_graph_task_keep_graph()
        if not keep_graph:
            ctx.state = None
        if g is None and h is None:
            return *not_tensors, *HeadTensors()
        if state.dlogprob_dhidden is not None and h is None:
            assert g is not None
            g = torch.where(ctx.mask, g, 0)  # the derivative of a masked token is 0, and 0 * NaN is NaN
            derivatives = (None if x is None else x.clone() if keep_graph else x for x in state.dlogprob_dhidden)
            return *not_tensors, *(None if x is None else scale_rows_(x, g) for x in derivatives)
        state = state._replace(dlogprob_dhidden=None)  # frees the memory, unless the graph is retained
        zero = torch.zeros_like(state.statistics.logprobs)
        tensors, needs_grad = HeadTensors(*given), NeedsGrad(*ctx.needs_input_grad[4:])
        with torch.autocast(zero.device.type, enabled=False):
            gradients = linear_token_logprobs_bwd(
                lambda plan: ctx.make_head(tensors, needs_grad, plan),
                state,
                zero if g is None else g,
                zero if h is None else h,
                keep_graph=keep_graph,
            )
        return *not_tensors, *gradients

    @staticmethod
    @torch.no_grad()
    def without_gradient(make_head: MakeHead, rows: TokenRows, chunks: ChunkSize, tensors: HeadTensors) -> tuple[Tensor, Tensor]:
        """Compute the same log-probabilities and entropies without keeping anything for backward."""
        with torch.autocast(rows.mask.device.type, enabled=False):
            state = linear_token_logprobs_fwd(
                lambda plan: make_head(tensors, NeedsGrad(), plan),
                rows,
                rows_per_chunk=chunks.rows,
                tile=chunks.tile,
                max_kept_tokens=0,
                with_derivative=False,
            )
        return state.statistics.logprobs, state.statistics.entropy


def scale_rows_(x: Tensor, g: Tensor) -> Tensor:  # [B, T or T + 1, D], [1, B * T]
    """Multiply each row of x by its token's g, in place. Only SCALED_ROWS rows at a time need temporary memory in float32."""
    for rows, factors in zip(x.flatten(0, 1).split(SCALED_ROWS), per_row(g, x).flatten(0, 1).split(SCALED_ROWS), strict=True):
        rows.mul_(factors)
    return x
