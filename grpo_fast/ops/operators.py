"""The operators of grpo_fast, registered with torch.library: schema, fake and autograd in one place, devices by PyTorch's dispatcher.

The C++ kernels (csrc/) and the Triton kernels (kernels/fused) attach themselves to these schemas for their device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("grpo_fast", "DEF")

LIBRARY.define(
    "group_advantages(Tensor rewards, Tensor? group_offsets, int group_size, Tensor? reward_weights, int scale, bool leave_one_out, "
    "bool normalize_then_sum, float eps) -> (Tensor advantages, Tensor mean, Tensor std, Tensor degenerate)",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.register_fake("grpo_fast::group_advantages", lib=LIBRARY)
def _group_advantages_fake(
    rewards: Tensor,  # [B] or [B, R]
    group_offsets: Tensor | None,  # [G+1]
    group_size: int,
    reward_weights: Tensor | None,  # [R]
    scale: int,
    leave_one_out: bool,
    normalize_then_sum: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_groups = rewards.shape[0] // group_size if group_offsets is None else group_offsets.shape[0] - 1
    per_group = rewards.new_empty(num_groups, dtype=torch.float32)
    advantages = rewards.new_empty(rewards.shape[0], dtype=torch.float32)
    return advantages, per_group, torch.empty_like(per_group), torch.empty_like(per_group, dtype=torch.bool)


# Logits are [B, T, V], or [B, T + 1, V] whose last position is not a token; ids and mask are [B, T]; everything
# else is float32 and as it comes: strided, and broadcastable to [B, T] ([B, 1], [1, 1] or 0-d). Masked tokens are not looked at.
# softcap 0: none. temperatures [B, T] take the place of the number.
LIBRARY.define(
    "token_logprobs(Tensor logits, Tensor token_ids, Tensor mask, Tensor? temperatures, float temperature, float softcap, "
    "float logit_scale) -> (Tensor logprobs, Tensor entropy, Tensor lse)",
    tags=torch.Tag.pt2_compliant_tag,
)
_BACKWARD = (
    "(Tensor grad_logprobs, Tensor grad_entropy, {logits}, Tensor token_ids, Tensor mask, Tensor? temperatures, float temperature, "
    "float softcap, float logit_scale, Tensor logprobs, Tensor entropy, Tensor lse) -> {result}"
)
LIBRARY.define("token_logprobs_backward" + _BACKWARD.format(logits="Tensor logits", result="Tensor"), tags=torch.Tag.pt2_compliant_tag)
LIBRARY.define("token_logprobs_backward_" + _BACKWARD.format(logits="Tensor(a!) logits", result="()"), tags=torch.Tag.pt2_compliant_tag)

# The whole loss of token-level ratios in one pass, and its gradient with respect to the logits (for an upstream gradient of 1) while
# it is at it. The second form writes the gradient over the logits.
_LOSS = (
    "({logits}, Tensor token_ids, Tensor mask, Tensor advantages, Tensor weights, Tensor? entropy_weights, Tensor? old_logprobs, "
    "Tensor? ref_logprobs, Tensor? rollout_weights, Tensor? temperatures, float temperature, float softcap, float logit_scale, "
    "float loss_scale, float[] settings, bool only_active{last}) "
    "-> (Tensor loss, Tensor logprobs, Tensor entropy, Tensor metrics{gradient})"
)
LIBRARY.define(
    "grpo_loss" + _LOSS.format(logits="Tensor logits", last=", bool want_gradient", gradient=", Tensor gradient"),
    tags=torch.Tag.pt2_compliant_tag,
)
LIBRARY.define("grpo_loss_" + _LOSS.format(logits="Tensor(a!) logits", last="", gradient=""), tags=torch.Tag.pt2_compliant_tag)
# The same by thread-block clusters (csrc/cuda/grpo_loss_cluster.cu), and the longest row, in bytes, that a device's clusters hold.
LIBRARY.define(
    "grpo_loss_cluster" + _LOSS.format(logits="Tensor logits", last=", bool want_gradient", gradient=", Tensor gradient"),
    tags=torch.Tag.pt2_compliant_tag,
)
LIBRARY.define("grpo_loss_cluster_" + _LOSS.format(logits="Tensor(a!) logits", last="", gradient=""), tags=torch.Tag.pt2_compliant_tag)
LIBRARY.define("cluster_row_bytes(int device) -> int")
LIBRARY.define("cpu_isa() -> int")

METRICS = ("kl", "entropy", "ratio_mean", "ratio_max", "clip_low", "clip_high", "clip_region", "active_fraction")


def scaled(gradient: Tensor, upstream: Tensor, *, inplace: bool) -> Tensor:
    """gradient * upstream, for nothing where upstream is 1: read on the CPU, or by the GPU where nobody waits for it.

    On a GPU the gradient is scaled where it lies, unless the graph is retained and it will be asked for again.
    """
    if type(upstream) is Tensor:  # not while torch.compile traces
        if upstream.device.type == "cpu" and upstream.item() == 1:
            return gradient
        if upstream.device.type in ("cuda", "xpu") and not torch._C._autograd._get_current_graph_task_keep_graph():
            from grpo_fast.ops.triton_registration import scaled_  # here: only a GPU needs Triton

            return scaled_(gradient, upstream)
    return gradient.mul_(upstream) if inplace else gradient * upstream


# grpo_loss ----------------------------------------------------------------------------------------------------------------------


@torch.library.register_fake("grpo_fast::grpo_loss", lib=LIBRARY)
@torch.library.register_fake("grpo_fast::grpo_loss_cluster", lib=LIBRARY)
def _grpo_loss_fake(logits: Tensor, token_ids: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    gradient = torch.empty_like(logits, memory_format=torch.contiguous_format) if rest[-1] else logits.new_empty(0)
    loss, logprobs, entropy, metrics = _grpo_loss_inplace_fake(logits, token_ids, *rest[:-1])
    return loss, logprobs, entropy, metrics, gradient


@torch.library.register_fake("grpo_fast::grpo_loss_", lib=LIBRARY)
@torch.library.register_fake("grpo_fast::grpo_loss_cluster_", lib=LIBRARY)
def _grpo_loss_inplace_fake(logits: Tensor, token_ids: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    logprobs = torch.empty_like(token_ids, dtype=torch.float32, memory_format=torch.contiguous_format)
    scalar = logits.new_empty((), dtype=torch.float32)
    return scalar, logprobs, torch.empty_like(logprobs), scalar.new_empty(len(METRICS))


def _grpo_loss_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, logprobs, entropy, metrics, gradient = output
    ctx.set_materialize_grads(False)  # else autograd would make a [B, T, V] of zeros for the gradient's own gradient
    ctx.mark_non_differentiable(logprobs, entropy, metrics, gradient)
    ctx.save_for_backward(gradient)


def _grpo_loss_backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    (gradient,) = ctx.saved_tensors
    return (None if grad_loss is None else scaled(gradient, grad_loss, inplace=False), *[None] * 16)


for _name in ("grpo_fast::grpo_loss", "grpo_fast::grpo_loss_cluster"):
    torch.library.register_autograd(_name, _grpo_loss_backward, setup_context=_grpo_loss_setup_context, lib=LIBRARY)


def call_below_autograd(operator: Any, *arguments: Any) -> Any:
    """An operator's kernel without the Python that registered autograd runs in front of it on every call: a third of the overhead."""
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)


class GrpoLossFunction(torch.autograd.Function):
    """grpo_loss or grpo_loss_ outside of torch.compile, by the same formulas as above. What needs no gradient comes as one tuple."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, inplace: bool, rest: tuple[Any, ...], cluster: bool = False) -> tuple[Tensor, ...]:
        operators = torch.ops.grpo_fast
        if inplace:
            operator = operators.grpo_loss_cluster_ if cluster else operators.grpo_loss_
            out, gradient = call_below_autograd(operator.default, logits, *rest), logits.detach()
            torch.autograd.graph.increment_version(logits)  # whoever else had saved these logits for backward is told
        else:
            operator = operators.grpo_loss_cluster if cluster else operators.grpo_loss
            *out, gradient = call_below_autograd(operator.default, logits, *rest, True)
        ctx.inplace = inplace
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*out[1:])
        ctx.save_for_backward(gradient)
        return tuple(out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return None if grad_loss is None else scaled(gradient, grad_loss, inplace=ctx.inplace), None, None, None


# token_logprobs -----------------------------------------------------------------------------------------------------------------


@torch.library.register_fake("grpo_fast::token_logprobs", lib=LIBRARY)
def _token_logprobs_fake(logits: Tensor, token_ids: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    logprobs = torch.empty_like(token_ids, dtype=torch.float32, memory_format=torch.contiguous_format)
    return logprobs, torch.empty_like(logprobs), torch.empty_like(logprobs)


@torch.library.register_fake("grpo_fast::token_logprobs_backward", lib=LIBRARY)
def _token_logprobs_backward_fake(grad_logprobs: Tensor, grad_entropy: Tensor, logits: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@torch.library.register_fake("grpo_fast::token_logprobs_backward_", lib=LIBRARY)
def _token_logprobs_backward_inplace_fake(*args: Any) -> None:
    return None


def _token_logprobs_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, token_ids, mask, temperatures, *ctx.numbers = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(logits, token_ids, mask, temperatures, *output)


def _token_logprobs_gradient(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, *, inplace: bool) -> Tensor | None:
    if grad_logprobs is None and grad_entropy is None:
        return None
    logits, token_ids, mask, temperatures, logprobs, entropy, lse = ctx.saved_tensors
    none = torch.zeros_like(logprobs) if grad_logprobs is None or grad_entropy is None else None
    g, h = none if grad_logprobs is None else grad_logprobs, none if grad_entropy is None else grad_entropy
    arguments = (g, h, logits, token_ids, mask, temperatures, *ctx.numbers, logprobs, entropy, lse)
    if not inplace:
        return torch.ops.grpo_fast.token_logprobs_backward.default(*arguments)
    torch.ops.grpo_fast.token_logprobs_backward_.default(*arguments)
    torch.autograd.graph.increment_version(logits)
    return logits.detach()


def _token_logprobs_backward(
    ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    return (_token_logprobs_gradient(ctx, grad_logprobs, grad_entropy, inplace=False), *[None] * 6)


torch.library.register_autograd(
    "grpo_fast::token_logprobs", _token_logprobs_backward, setup_context=_token_logprobs_setup_context, lib=LIBRARY
)


class TokenLogprobsFunction(torch.autograd.Function):
    """token_logprobs outside of torch.compile; with inplace, backward writes the gradient over the logits."""

    @staticmethod
    def forward(ctx: Any, inplace: bool, *arguments: Any) -> tuple[Tensor, ...]:
        out = call_below_autograd(torch.ops.grpo_fast.token_logprobs.default, *arguments)
        ctx.inplace = inplace
        _token_logprobs_setup_context(ctx, arguments, out)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None, _token_logprobs_gradient(ctx, grad_logprobs, grad_entropy, inplace=ctx.inplace), *[None] * 6)
