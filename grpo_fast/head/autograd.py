"""Where the head meets autograd: the gradients of the loss are there before backward begins, those of log-probabilities are made in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from grpo_fast.head.chunking import Plan
from grpo_fast.head.logprobs import linear_token_logprobs_bwd, linear_token_logprobs_fwd
from grpo_fast.head.loss import LinearLoss
from grpo_fast.head.products import Head, HeadTensors, Wants, per_row
from grpo_fast.loss.token_rows import TokenRows
from grpo_fast.ops.scale import scaled

__all__ = ["LinearLogprobsFunction", "LinearLossFunction"]

SCALED_ROWS = 512

MakeHead = Callable[[HeadTensors, Wants, Plan], Head]


class LinearLossFunction(torch.autograd.Function):
    """Loss, log-probabilities, entropy and metrics; backward hands out the gradients, times its upstream gradient unless that is 1."""

    @staticmethod
    def forward(ctx: Any, run: Callable[[HeadTensors, Wants], LinearLoss], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        loss, logprobs, entropy, metrics, gradients = run(HeadTensors(*tensors), Wants(*ctx.needs_input_grad[1:]))
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(logprobs, entropy, metrics)
        ctx.save_for_backward(*gradients)
        return loss, logprobs, entropy, metrics

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * 6
        inplace = not torch._C._autograd._get_current_graph_task_keep_graph()
        return None, *(None if x is None else scaled(x, grad_loss, inplace=inplace) for x in ctx.saved_tensors)


class LinearLogprobsFunction(torch.autograd.Function):
    """Log-probabilities and entropy, [1, N]; what backward needs is kept or made again (see logprobs.py)."""

    @staticmethod
    def forward(ctx: Any, make_head: MakeHead, rows: TokenRows, limit: int, keep: int, *given: Tensor | None) -> tuple[Tensor, ...]:
        tensors, wants = HeadTensors(*given), Wants(*ctx.needs_input_grad[4:])
        with torch.autocast(rows.mask.device.type, enabled=False):
            ctx.left = linear_token_logprobs_fwd(
                lambda plan: make_head(tensors, wants, plan), rows, limit=limit, keep=keep, want_slopes=wants.states_alone
            )
        ctx.make_head, ctx.rows = make_head, rows
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*given)
        return ctx.left.statistics.logprobs.clone(), ctx.left.statistics.entropy.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor | None, h: Tensor | None) -> tuple[Tensor | None, ...]:
        nothing = (None,) * 4
        given, left, keep_graph = ctx.saved_tensors, ctx.left, torch._C._autograd._get_current_graph_task_keep_graph()
        if not keep_graph:
            ctx.left = None
        if g is None and h is None:
            return *nothing, *HeadTensors(None, None)
        if left.slopes is not None and h is None:
            assert g is not None
            g = torch.where(ctx.rows.mask, g, 0)  # under the mask's zeros the slopes are 0, which NaN and Inf would survive
            slopes = (None if x is None else x.clone() if keep_graph else x for x in left.slopes)
            return *nothing, *(None if x is None else scale_rows_(x, g) for x in slopes)
        left = left._replace(slopes=None)  # of no use here: their memory is free unless the graph stays
        zero = torch.zeros_like(left.statistics.logprobs)
        tensors, wants = HeadTensors(*given), Wants(*ctx.needs_input_grad[4:])
        with torch.autocast(zero.device.type, enabled=False):
            gradients = linear_token_logprobs_bwd(
                lambda plan: ctx.make_head(tensors, wants, plan),
                ctx.rows,
                left,
                zero if g is None else g,
                zero if h is None else h,
                keep_graph=keep_graph,
            )
        return *nothing, *gradients

    @staticmethod
    @torch.no_grad()
    def without_gradient(make_head: MakeHead, rows: TokenRows, limit: int, tensors: HeadTensors) -> tuple[Tensor, Tensor]:
        """The same values, nothing kept."""
        with torch.autocast(rows.mask.device.type, enabled=False):
            left = linear_token_logprobs_fwd(
                lambda plan: make_head(tensors, Wants(False), plan), rows, limit=limit, keep=0, want_slopes=False
            )
        return left.statistics.logprobs, left.statistics.entropy


def scale_rows_(x: Tensor, g: Tensor) -> Tensor:  # [B, T or T + 1, D], [1, B * T]
    """x with each row times its token's g, in the memory of x; at most so many rows at a time are there in float32."""
    for rows, factors in zip(x.flatten(0, 1).split(SCALED_ROWS), per_row(g, x).flatten(0, 1).split(SCALED_ROWS), strict=True):
        rows.mul_(factors)
    return x
