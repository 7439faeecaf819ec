"""The operator ``token_logprobs`` and its two backward operators: schemas, fake implementations, autograd.

Logits are ``[B, T, V]``, or ``[B, T + 1, V]`` whose last position is ignored; token_ids (int64) and mask (bool) are ``[B, T]``; every other
tensor is float32, of any strides, and broadcastable to ``[B, T]`` (``[B, 1]``, ``[1, 1]`` or 0-d). Nothing is read where the mask is
False. softcap 0 means no soft cap; ``temperatures``, if given, replaces the number ``temperature``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_fast.ops.library import LIBRARY, call_below_autograd, define

__all__ = ["RowStatistics", "TokenLogprobsArguments", "TokenLogprobsFunction"]


class TokenLogprobsArguments(NamedTuple):
    """The arguments of ``token_logprobs`` after the logits, in the order of the schema."""

    token_ids: Tensor
    mask: Tensor
    temperatures: Tensor | None
    temperature: float
    softcap: float
    logit_scale: float


class RowStatistics(NamedTuple):
    """What ``token_logprobs`` returns for each token: float32 ``[B, T]``, 0 where the token is masked out."""

    logprobs: Tensor
    entropy: Tensor
    lse: Tensor  # log-sum-exp of the scaled logits


_ROWS = "Tensor token_ids, Tensor mask, Tensor? temperatures, float temperature, float softcap, float logit_scale"
_BACKWARD = (
    "(Tensor grad_logprobs, Tensor grad_entropy, {logits}, " + _ROWS + ", Tensor logprobs, Tensor entropy, Tensor lse{last}) -> {result}"
)  # fmt: skip
define(f"token_logprobs(Tensor logits, {_ROWS}) -> (Tensor logprobs, Tensor entropy, Tensor lse)")
define("token_logprobs_backward" + _BACKWARD.format(logits="Tensor logits", last="", result="Tensor"))
# Overwrites the logits with the gradient; with bfloat16_gradient float32 logits with the gradient rounded to bfloat16, which then is the
# first half of each row, see ops/rounding.py.
_LAST = ", bool bfloat16_gradient=False"
define("token_logprobs_backward_" + _BACKWARD.format(logits="Tensor(a!) logits", last=_LAST, result="()"))


@torch.library.register_fake("grpo_fast::token_logprobs", lib=LIBRARY)
def _fake(
    logits: Tensor,
    token_ids: Tensor,
    mask: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    softcap: float,
    logit_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    logprobs = torch.empty_like(token_ids, dtype=torch.float32, memory_format=torch.contiguous_format)
    return logprobs, torch.empty_like(logprobs), torch.empty_like(logprobs)


@torch.library.register_fake("grpo_fast::token_logprobs_backward", lib=LIBRARY)
def _backward_fake(
    grad_logprobs: Tensor,
    grad_entropy: Tensor,
    logits: Tensor,
    token_ids: Tensor,
    mask: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    softcap: float,
    logit_scale: float,
    logprobs: Tensor,
    entropy: Tensor,
    lse: Tensor,
) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@torch.library.register_fake("grpo_fast::token_logprobs_backward_", lib=LIBRARY)
def _backward_inplace_fake(
    grad_logprobs: Tensor,
    grad_entropy: Tensor,
    logits: Tensor,
    token_ids: Tensor,
    mask: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    softcap: float,
    logit_scale: float,
    logprobs: Tensor,
    entropy: Tensor,
    lse: Tensor,
    bfloat16_gradient: bool = False,
) -> None:
    return None


def _setup_context(
    ctx: Any,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor | None, float, float, float],  # logits, then TokenLogprobsArguments
    output: tuple[Tensor, Tensor, Tensor],
) -> None:
    logits, arguments = inputs[0], TokenLogprobsArguments(*inputs[1:])
    ctx.numbers = (arguments.temperature, arguments.softcap, arguments.logit_scale)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(logits, arguments.token_ids, arguments.mask, arguments.temperatures, *output)


def _gradient(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, *, inplace: bool) -> Tensor | None:
    if grad_logprobs is None and grad_entropy is None:
        return None
    logits, token_ids, mask, temperatures, *statistics = ctx.saved_tensors
    zeros = torch.zeros_like(statistics[0]) if grad_logprobs is None or grad_entropy is None else None
    g, h = zeros if grad_logprobs is None else grad_logprobs, zeros if grad_entropy is None else grad_entropy
    arguments = TokenLogprobsArguments(token_ids, mask, temperatures, *ctx.numbers)
    if not inplace:
        return torch.ops.grpo_fast.token_logprobs_backward.default(g, h, logits, *arguments, *statistics)
    torch.ops.grpo_fast.token_logprobs_backward_.default(g, h, logits, *arguments, *statistics)
    torch.autograd.graph.increment_version(logits)  # so that autograd rejects a graph that saved these logits
    return logits.detach()


def _backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    gradient = _gradient(ctx, grad_logprobs, grad_entropy, inplace=False)
    return gradient, *[None] * len(TokenLogprobsArguments._fields)


torch.library.register_autograd("grpo_fast::token_logprobs", _backward, setup_context=_setup_context, lib=LIBRARY)


class TokenLogprobsFunction(torch.autograd.Function):
    """The autograd function of ``token_logprobs`` outside of torch.compile.

    Call it as ``TokenLogprobsFunction.apply(inplace, logits, *arguments)`` with TokenLogprobsArguments; with ``inplace`` the backward pass
    overwrites the logits with their gradient.
    """

    @staticmethod
    def forward(ctx: Any, inplace: bool, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        output = call_below_autograd(torch.ops.grpo_fast.token_logprobs.default, *inputs)
        ctx.inplace = inplace
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        gradient = _gradient(ctx, grad_logprobs, grad_entropy, inplace=ctx.inplace)
        return None, gradient, *[None] * len(TokenLogprobsArguments._fields)
