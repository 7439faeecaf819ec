"""The operator ``grpo_loss``: the whole loss of token-level ratios in one pass over the logits, and its gradient in the same pass.

Shapes and types are those of token_logprobs.py. The gradient is that of the logits for an upstream gradient of 1. Forms:

    grpo_loss            returns the gradient in new memory; with ``want_gradient=False`` an empty tensor
    grpo_loss_           overwrites the logits with the gradient; with ``bfloat16_gradient`` float32 logits with the gradient rounded to
                         bfloat16, which then is the first half of each row, see ops/rounding.py
    grpo_loss_cluster    the same two by thread-block clusters, csrc/cuda/grpo_loss_cluster.cu
    grpo_loss_cluster_
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_fast.ops.library import LIBRARY, call_below_autograd, define
from grpo_fast.ops.scale import scaled

__all__ = ["METRICS", "GrpoLossArguments", "GrpoLossFunction"]

# The order in which the operators return their metrics, also in csrc/ and kernels/.
METRICS = ("kl", "entropy", "ratio_mean", "ratio_max", "clip_low", "clip_high", "clip_region", "active_fraction")


class GrpoLossArguments(NamedTuple):
    """The arguments of the operators after the logits, in the order of their schema; ``grpo_loss`` takes ``want_gradient`` after them."""

    token_ids: Tensor  # int64 [B, T]
    mask: Tensor  # bool [B, T]: the tokens that are computed
    advantages: Tensor
    weights: Tensor  # of each token in the loss
    entropy_weights: Tensor | None  # of each token in the entropy bonus; None: no bonus
    old_logprobs: Tensor | None  # None: on-policy
    ref_logprobs: Tensor | None
    rollout_weights: Tensor | None
    temperatures: Tensor | None  # None: ``temperature`` holds for all tokens
    temperature: float
    softcap: float  # 0: none
    logit_scale: float
    loss_scale: float
    settings: list[float]  # loss.kernel_settings.loss_settings
    only_active: bool  # do not compute tokens with advantage 0, if no KL or entropy term applies to them


_SCHEMA = (
    "({logits}, Tensor token_ids, Tensor mask, Tensor advantages, Tensor weights, Tensor? entropy_weights, Tensor? old_logprobs, "
    "Tensor? ref_logprobs, Tensor? rollout_weights, Tensor? temperatures, float temperature, float softcap, float logit_scale, "
    "float loss_scale, float[] settings, bool only_active{last}) "
    "-> (Tensor loss, Tensor logprobs, Tensor entropy, Tensor metrics{gradient})"
)
for _name in ("grpo_loss", "grpo_loss_cluster"):
    define(_name + _SCHEMA.format(logits="Tensor logits", last=", bool want_gradient", gradient=", Tensor gradient"))
    last = ", bool bfloat16_gradient=False" if _name == "grpo_loss" else ""
    define(f"{_name}_" + _SCHEMA.format(logits="Tensor(a!) logits", last=last, gradient=""))
LIBRARY.define("cluster_row_bytes(int device) -> int")  # the longest row that the clusters of a GPU can hold


@torch.library.register_fake("grpo_fast::grpo_loss", lib=LIBRARY)
@torch.library.register_fake("grpo_fast::grpo_loss_cluster", lib=LIBRARY)
def _fake(
    logits: Tensor,
    token_ids: Tensor,
    mask: Tensor,
    advantages: Tensor,
    weights: Tensor,
    entropy_weights: Tensor | None,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    rollout_weights: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    softcap: float,
    logit_scale: float,
    loss_scale: float,
    settings: list[float],
    only_active: bool,
    want_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    gradient = torch.empty_like(logits, memory_format=torch.contiguous_format) if want_gradient else logits.new_empty(0)
    return *_outputs_fake(logits, token_ids), gradient


@torch.library.register_fake("grpo_fast::grpo_loss_", lib=LIBRARY)
@torch.library.register_fake("grpo_fast::grpo_loss_cluster_", lib=LIBRARY)
def _inplace_fake(
    logits: Tensor,
    token_ids: Tensor,
    mask: Tensor,
    advantages: Tensor,
    weights: Tensor,
    entropy_weights: Tensor | None,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    rollout_weights: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    softcap: float,
    logit_scale: float,
    loss_scale: float,
    settings: list[float],
    only_active: bool,
    bfloat16_gradient: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _outputs_fake(logits, token_ids)


def _outputs_fake(logits: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logprobs = torch.empty_like(token_ids, dtype=torch.float32, memory_format=torch.contiguous_format)
    loss = logits.new_empty((), dtype=torch.float32)
    return loss, logprobs, torch.empty_like(logprobs), loss.new_empty(len(METRICS))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]) -> None:
    _, logprobs, entropy, metrics, gradient = output
    ctx.set_materialize_grads(False)  # else autograd would allocate a [B, T, V] of zeros for the gradient's own gradient
    ctx.mark_non_differentiable(logprobs, entropy, metrics, gradient)
    ctx.save_for_backward(gradient)


def _backward(ctx: Any, grad_loss: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    (gradient,) = ctx.saved_tensors
    grad_logits = None if grad_loss is None else scaled(gradient, grad_loss, inplace=False)
    return grad_logits, *[None] * len(GrpoLossArguments._fields), None  # the last is want_gradient


for _name in ("grpo_fast::grpo_loss", "grpo_fast::grpo_loss_cluster"):
    torch.library.register_autograd(_name, _backward, setup_context=_setup_context, lib=LIBRARY)


class GrpoLossFunction(torch.autograd.Function):
    """The autograd function of ``grpo_loss``, or of ``grpo_loss_`` with ``inplace``, outside of torch.compile.

    The arguments are passed as one tuple: autograd spends time on each argument, and none of them has a gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, inplace: bool, arguments: GrpoLossArguments, cluster: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        operators = torch.ops.grpo_fast
        if inplace:
            operator = operators.grpo_loss_cluster_ if cluster else operators.grpo_loss_
            loss, logprobs, entropy, metrics = call_below_autograd(operator.default, logits, *arguments)
            gradient = logits.detach()
            torch.autograd.graph.increment_version(logits)  # so that autograd rejects a graph that saved these logits
        else:
            operator = operators.grpo_loss_cluster if cluster else operators.grpo_loss
            loss, logprobs, entropy, metrics, gradient = call_below_autograd(operator.default, logits, *arguments, True)
        ctx.inplace = inplace
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(logprobs, entropy, metrics)
        ctx.save_for_backward(gradient)
        return loss, logprobs, entropy, metrics

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return None if grad_loss is None else scaled(gradient, grad_loss, inplace=ctx.inplace), None, None, None
