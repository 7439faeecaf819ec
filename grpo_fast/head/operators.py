"""The operators of the head for torch.compile: each of the eager computations becomes one node of the graph, with autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_fast.head.autograd import AutogradContext
from grpo_fast.head.kept import plan_rows
from grpo_fast.head.logprobs import LogprobsState, linear_token_logprobs_bwd, linear_token_logprobs_fwd
from grpo_fast.head.loss import LINEAR_METRICS, linear_loss
from grpo_fast.head.matrix_products import HeadTensors, NeedsGrad, per_row
from grpo_fast.head.operator_arguments import (
    Argument,
    BackwardArguments,
    HeadOptions,
    LogprobsArguments,
    LossArguments,
    LossTensors,
    RowArguments,
)
from grpo_fast.head.precision import Precision
from grpo_fast.loss.inputs import LossInputs
from grpo_fast.loss.token_rows import RowStatistics, TokenRows
from grpo_fast.ops.library import LIBRARY, define
from grpo_fast.ops.scale import scaled

__all__ = ["compiled_logprobs", "compiled_loss"]

# An operator returns tensors only: an empty one stands for a gradient that is not needed.
_GRADIENTS = "Tensor d_hidden, Tensor d_weight, Tensor d_bias, Tensor d_adapted, Tensor d_adapter_weight"
define(f"linear_grpo_loss({LossArguments.schema()}) -> (Tensor loss, Tensor logprobs, Tensor entropy, Tensor metrics, {_GRADIENTS})")
define(
    f"linear_token_logprobs({LogprobsArguments.schema()}) "
    "-> (Tensor logprobs, Tensor entropy, Tensor lse, Tensor dlogprob_dhidden, Tensor dlogprob_dadapted)"
)
define(f"linear_token_logprobs_backward(Tensor g, Tensor h, {BackwardArguments.schema()}) -> ({_GRADIENTS})")


def compiled_loss(
    tensors: HeadTensors,
    rows: TokenRows,
    inputs: LossInputs,
    *,
    only_active: bool,
    precision: Precision,
    length: int,
    chunk_bytes: int | None,
) -> tuple[Tensor, ...]:
    """Call linear_loss as one operator; return loss, logprobs, entropy and metrics."""
    options = HeadOptions(*precision, length, chunk_bytes or 0, _needs_grad(tensors))
    arguments = LossArguments(tensors, RowArguments.of(rows), LossTensors.of(inputs, only_active), options)
    return torch.ops.grpo_fast.linear_grpo_loss.default(*arguments.flat())[:4]


def compiled_logprobs(
    tensors: HeadTensors, rows: TokenRows, *, precision: Precision, length: int, chunk_bytes: int | None
) -> tuple[Tensor, Tensor]:
    """Compute log-probabilities and entropy by one operator.

    Backward scales d logprob / d hidden if the head is frozen, else it computes the logits again: the memory available for keeping them is
    not known when the graph is traced.
    """
    options = HeadOptions(*precision, length, chunk_bytes or 0, _needs_grad(tensors))
    arguments = LogprobsArguments(tensors, RowArguments.of(rows), options)
    return torch.ops.grpo_fast.linear_token_logprobs.default(*arguments.flat())[:2]


def _needs_grad(tensors: HeadTensors) -> list[bool]:
    return [torch.is_grad_enabled() and x is not None and x.requires_grad for x in tensors]


def _tensors_only(gradients: tuple[Tensor | None, ...], like: Tensor) -> list[Tensor]:
    return [like.new_empty(0) if x is None else x for x in gradients]


def _fake_gradients(tensors: HeadTensors, needs_grad: NeedsGrad) -> HeadTensors:
    assert tensors.hidden is not None
    empty = tensors.hidden.new_empty
    return HeadTensors(
        *(
            empty(0, dtype=torch.float32) if x is None or not needed else torch.empty_like(x, memory_format=torch.contiguous_format)
            for x, needed in zip(tensors, needs_grad, strict=True)
        )
    )


# linear_grpo_loss ---------------------------------------------------------------------------------------------------------------


def _linear_grpo_loss(*flat: Argument) -> tuple[Tensor, ...]:
    tensors, rows, loss, options = LossArguments.from_flat(flat)
    chunks = options.chunks(tensors)
    *out, gradients = linear_loss(
        lambda plan: options.head(tensors, plan),
        rows.rows(),
        loss.inputs(rows.mask),
        only_active=loss.only_active,
        with_gradient=any(options.needs_grad),
        rows_per_chunk=chunks.rows,
        tile=chunks.tile,
    )
    return *out, *_tensors_only(gradients, out[0])


LIBRARY.impl("linear_grpo_loss", _linear_grpo_loss, "CompositeExplicitAutograd")


@torch.library.register_fake("grpo_fast::linear_grpo_loss", lib=LIBRARY)
def _linear_grpo_loss_fake(*flat: Argument) -> tuple[Tensor | None, ...]:
    tensors, rows, _, options = LossArguments.from_flat(flat)
    logprobs = torch.empty_like(rows.token_ids, dtype=torch.float32, memory_format=torch.contiguous_format)
    loss, metrics = logprobs.new_empty(()), logprobs.new_empty(len(LINEAR_METRICS))
    return loss, logprobs, torch.empty_like(logprobs), metrics, *_fake_gradients(tensors, NeedsGrad(*options.needs_grad))


def _linear_grpo_loss_setup_context(ctx: AutogradContext, inputs: tuple[Argument, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.needs_grad = LossArguments.from_flat(inputs).options.needs_grad
    ctx.save_for_backward(*output[4:])


def _linear_grpo_loss_backward(ctx: AutogradContext, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    gradients = zip(ctx.saved_tensors, ctx.needs_grad, strict=True)
    return LossArguments.gradients(
        scaled(x, grad_loss, inplace=False) if needed and grad_loss is not None else None for x, needed in gradients
    )


torch.library.register_autograd(
    "grpo_fast::linear_grpo_loss", _linear_grpo_loss_backward, setup_context=_linear_grpo_loss_setup_context, lib=LIBRARY
)


# linear_token_logprobs ----------------------------------------------------------------------------------------------------------


def _linear_token_logprobs(*flat: Argument) -> tuple[Tensor, ...]:
    tensors, rows, options = LogprobsArguments.from_flat(flat)
    needs_grad = NeedsGrad(*options.needs_grad)
    chunks = options.chunks(tensors)
    state = linear_token_logprobs_fwd(
        lambda plan: options.head(tensors, plan, needs_grad if needs_grad.frozen_head else NeedsGrad()),
        rows.rows(),
        rows_per_chunk=chunks.rows,
        tile=chunks.tile,
        max_kept_tokens=0,
        with_derivative=needs_grad.frozen_head,
    )
    derivatives = state.dlogprob_dhidden or HeadTensors()
    return *state.statistics, *_tensors_only((derivatives.hidden, derivatives.adapted), state.statistics.logprobs)


LIBRARY.impl("linear_token_logprobs", _linear_token_logprobs, "CompositeExplicitAutograd")


@torch.library.register_fake("grpo_fast::linear_token_logprobs", lib=LIBRARY)
def _linear_token_logprobs_fake(*flat: Argument) -> tuple[Tensor | None, ...]:
    tensors, rows, options = LogprobsArguments.from_flat(flat)
    needs_grad = NeedsGrad(*options.needs_grad)
    logprobs = torch.empty_like(rows.token_ids, dtype=torch.float32, memory_format=torch.contiguous_format)
    derivatives = _fake_gradients(tensors, needs_grad if needs_grad.frozen_head else NeedsGrad())
    return logprobs, torch.empty_like(logprobs), torch.empty_like(logprobs), derivatives.hidden, derivatives.adapted


def _linear_token_logprobs_backward(g: Tensor, h: Tensor, *flat: Argument) -> tuple[Tensor, ...]:
    (tensors, rows, options), statistics = BackwardArguments.from_flat(flat)
    chunks = options.chunks(tensors)
    planned = plan_rows(rows.rows(), rows.mask, chunks.rows, tile=chunks.tile)
    state = LogprobsState(statistics, planned, None, [])
    gradients = linear_token_logprobs_bwd(lambda plan: options.head(tensors, plan), state, g, h, keep_graph=False)
    return tuple(_tensors_only(gradients, g))


LIBRARY.impl("linear_token_logprobs_backward", _linear_token_logprobs_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("grpo_fast::linear_token_logprobs_backward", lib=LIBRARY)
def _linear_token_logprobs_backward_fake(g: Tensor, h: Tensor, *flat: Argument) -> tuple[Tensor | None, ...]:
    tensors, _, options = BackwardArguments.from_flat(flat).forward
    return tuple(_fake_gradients(tensors, NeedsGrad(*options.needs_grad)))


def _logprobs_setup_context(ctx: AutogradContext, inputs: tuple[Argument, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:])
    tensors, rows, ctx.options = LogprobsArguments.from_flat(inputs)
    token_ids, mask, set_ids, set_offsets, temperatures, *ctx.scoring_numbers = rows
    ctx.save_for_backward(*tensors, token_ids, mask, set_ids, set_offsets, temperatures, *output)


def _logprobs_backward(ctx: AutogradContext, g: Tensor | None, h: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    *given, token_ids, mask, set_ids, set_offsets, temperatures, logprobs, entropy, lse, dlogprob_dhidden, dlogprob_dadapted = (
        ctx.saved_tensors
    )
    needs_grad = NeedsGrad(*ctx.options.needs_grad)
    if needs_grad.frozen_head and h is None and g is not None:
        g = torch.where(mask, g, 0)  # the derivative of a masked token is 0, and 0 * NaN is NaN
        gradients = HeadTensors(hidden=_scaled_rows(dlogprob_dhidden, g), adapted=_scaled_rows(dlogprob_dadapted, g))
    else:
        zero, rows = torch.zeros_like(logprobs), RowArguments(token_ids, mask, set_ids, set_offsets, temperatures, *ctx.scoring_numbers)
        forward = LogprobsArguments(HeadTensors(*given), rows, ctx.options)
        arguments = BackwardArguments(forward, RowStatistics(logprobs, entropy, lse))
        gradients = HeadTensors(
            *torch.ops.grpo_fast.linear_token_logprobs_backward.default(
                zero if g is None else g, zero if h is None else h, *arguments.flat()
            )
        )
    return LogprobsArguments.gradients(x if needed else None for x, needed in zip(gradients, needs_grad, strict=True))


def _scaled_rows(derivative: Tensor, g: Tensor) -> Tensor | None:
    if derivative.dim() == 1:  # [0]: not needed
        return None
    return (derivative * per_row(g, derivative)).to(derivative.dtype)


torch.library.register_autograd("grpo_fast::linear_token_logprobs", _logprobs_backward, setup_context=_logprobs_setup_context, lib=LIBRARY)
