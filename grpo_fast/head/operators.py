"""The head as operators, for torch.compile: what eager calls do (linear.py) behind one node of the graph each, with its autograd."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from grpo_fast.head.chunking import Plan, chunk_rows, plan_of
from grpo_fast.head.logprobs import Forward, linear_token_logprobs_bwd, linear_token_logprobs_fwd
from grpo_fast.head.loss import LINEAR_METRICS, linear_loss
from grpo_fast.head.products import DenseHead, HeadTensors, Wants, per_row
from grpo_fast.loss.config import AGGREGATIONS, ENTROPY_AGGREGATIONS, KL_ESTIMATORS, LEVELS, LOSS_TYPES, LossConfig
from grpo_fast.loss.inputs import LossInputs
from grpo_fast.loss.sequences import Sequences
from grpo_fast.loss.token_rows import RowStatistics, TokenRows
from grpo_fast.ops.library import LIBRARY
from grpo_fast.ops.scale import scaled

__all__ = ["compiled_logprobs", "compiled_loss"]

# The head's tensors, and the tokens as in rows.py: [1, N] each. chunk_bytes 0: chosen by the free memory.
_HEAD = "Tensor hidden, Tensor weight, Tensor? bias, Tensor? adapted, Tensor? adapter_weight, "
_ROWS = "Tensor token_ids, Tensor mask, Tensor? temperatures, float temperature, float softcap, float logit_scale, "
_HOW = "ScalarType dtype, SymInt length, SymInt chunk_bytes, bool[] wants"
_GRADIENTS = "Tensor d_hidden, Tensor d_weight, Tensor d_bias, Tensor d_adapted, Tensor d_adapter_weight"

LIBRARY.define(
    f"linear_grpo_loss({_HEAD}{_ROWS}Tensor advantages, Tensor weights, Tensor entropy_weights, Tensor? old_logprobs, "
    "Tensor? ref_logprobs, Tensor? rollout_weights, Tensor segment, SymInt sequences, bool rollout_per_sequence, float loss_scale, "
    f"float[] config, bool only_active, {_HOW}) -> (Tensor loss, Tensor logprobs, Tensor entropy, Tensor metrics, {_GRADIENTS})",
    tags=torch.Tag.pt2_compliant_tag,
)
LIBRARY.define(
    f"linear_token_logprobs({_HEAD}{_ROWS}{_HOW}) "
    "-> (Tensor logprobs, Tensor entropy, Tensor lse, Tensor hidden_slopes, Tensor adapted_slopes)",
    tags=torch.Tag.pt2_compliant_tag,
)
LIBRARY.define(
    f"linear_token_logprobs_backward(Tensor g, Tensor h, {_HEAD}{_ROWS}{_HOW}, Tensor logprobs, Tensor entropy, Tensor lse) "
    f"-> ({_GRADIENTS})",
    tags=torch.Tag.pt2_compliant_tag,
)

_NAMES: dict[str, tuple[str, ...]] = {
    "loss_type": tuple(LOSS_TYPES),
    "kl_estimator": KL_ESTIMATORS,
    "entropy_aggregation": ENTROPY_AGGREGATIONS,
    "importance_sampling_level": LEVELS,
    "aggregation": AGGREGATIONS,
}
_FIELDS = tuple(LossConfig.__dataclass_fields__)


def config_numbers(config: LossConfig) -> list[float]:
    """A LossConfig as an operator takes it; None is NaN."""
    numbers = []
    for name in _FIELDS:
        value = getattr(config, name)
        if value is None:
            numbers.append(math.nan)
        elif name in _NAMES:
            numbers.append(float(_NAMES[name].index(value)))
        else:
            numbers.append(float(value))
    return numbers


def config_of(numbers: list[float]) -> LossConfig:
    """The LossConfig that config_numbers was given."""
    return _config_of(tuple("none" if math.isnan(x) else x for x in numbers))


@functools.cache
def _config_of(numbers: tuple[float | str, ...]) -> LossConfig:
    settings: dict[str, Any] = {}
    for name, value in zip(_FIELDS, numbers, strict=True):
        kind = LossConfig.__dataclass_fields__[name].type
        if isinstance(value, str):
            settings[name] = None
        elif name in _NAMES:
            settings[name] = _NAMES[name][int(value)]
        else:
            settings[name] = bool(value) if kind == "bool" else int(value) if kind == "int | None" else value
    return LossConfig(**settings)


def compiled_loss(
    tensors: HeadTensors,
    rows: TokenRows,
    policy: LossInputs,
    *,
    only_active: bool,
    dtype: torch.dtype,
    length: int,
    chunk_bytes: int | None,
) -> tuple[Tensor, ...]:
    """linear_loss as one node: loss, logprobs, entropy, metrics."""
    assert policy.sequences.segment is not None
    weights, entropy_weights = (x.expand(policy.mask.shape) for x in (policy.weights, policy.entropy_weights))
    return torch.ops.grpo_fast.linear_grpo_loss.default(
        *tensors,
        *_row_arguments(rows),
        policy.advantages,
        weights,
        entropy_weights,
        policy.old_logprobs,
        policy.ref_logprobs,
        policy.rollout_weights,
        policy.sequences.segment,
        policy.sequences.count,
        policy.rollout_per_sequence,
        policy.loss_scale,
        config_numbers(policy.config),
        only_active,
        dtype,
        length,
        chunk_bytes or 0,
        _wants(tensors),
    )[:4]


def compiled_logprobs(
    tensors: HeadTensors, rows: TokenRows, *, dtype: torch.dtype, length: int, chunk_bytes: int | None
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropy as one node. Its backward scales slopes where the head is frozen, else it computes the logits again:
    how many could be kept is not known when a graph is made."""
    arguments = (*tensors, *_row_arguments(rows), dtype, length, chunk_bytes or 0, _wants(tensors))
    return torch.ops.grpo_fast.linear_token_logprobs.default(*arguments)[:2]


def _row_arguments(rows: TokenRows) -> tuple[Any, ...]:
    return rows.token_ids, rows.mask, *rows.scoring


def _wants(tensors: HeadTensors) -> list[bool]:
    return [torch.is_grad_enabled() and x is not None and x.requires_grad for x in tensors]


def _limit(tensors: HeadTensors, dtype: torch.dtype, chunk_bytes: int) -> int:
    assert tensors.hidden is not None and tensors.weight is not None
    return chunk_rows(chunk_bytes or None, tensors.weight.shape[0] * dtype.itemsize, tensors.hidden.device)


def _head(tensors: HeadTensors, wants: list[bool], dtype: torch.dtype, length: int, plan: Plan) -> DenseHead:
    return DenseHead(tensors, Wants(*wants), dtype, length, plan)


def _given(gradients: tuple[Tensor | None, ...], like: Tensor) -> list[Tensor]:
    """An operator returns tensors: an empty one where no gradient was wanted."""
    return [like.new_empty(0) if x is None else x for x in gradients]


# linear_grpo_loss ---------------------------------------------------------------------------------------------------------------


def _linear_grpo_loss(*arguments: Any) -> tuple[Tensor, ...]:
    tensors, rows = HeadTensors(*arguments[:5]), TokenRows(*arguments[5:11])
    advantages, weights, entropy_weights, old_logprobs, ref_logprobs, rollout_weights, segment, count = arguments[11:19]
    rollout_per_sequence, loss_scale, config, only_active, dtype, length, chunk_bytes, wants = arguments[19:]
    policy = LossInputs(
        config=config_of(config),
        mask=rows.mask,
        sequences=Sequences.from_segments(segment, count),
        advantages=advantages,
        weights=weights,
        entropy_weights=entropy_weights,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        rollout_weights=rollout_weights,
        rollout_per_sequence=rollout_per_sequence,
        loss_scale=loss_scale,
    )
    *out, gradients = linear_loss(
        lambda plan: _head(tensors, wants, dtype, length, plan),
        rows,
        policy,
        only_active=only_active,
        want_gradient=any(wants),
        limit=_limit(tensors, dtype, chunk_bytes),
    )
    return *out, *_given(gradients, out[0])


LIBRARY.impl("linear_grpo_loss", _linear_grpo_loss, "CompositeExplicitAutograd")


@torch.library.register_fake("grpo_fast::linear_grpo_loss", lib=LIBRARY)
def _linear_grpo_loss_fake(*arguments: Any) -> tuple[Tensor, ...]:
    token_ids, wants = arguments[5], arguments[-1]
    logprobs = torch.empty_like(token_ids, dtype=torch.float32, memory_format=torch.contiguous_format)
    scalar = logprobs.new_empty(())
    return scalar, logprobs, torch.empty_like(logprobs), logprobs.new_empty(len(LINEAR_METRICS)), *_gradients_fake(arguments[:5], wants)


def _gradients_fake(tensors: tuple[Tensor | None, ...], wants: list[bool]) -> list[Tensor]:
    some = tensors[0]
    assert some is not None
    return [
        torch.empty_like(x, memory_format=torch.contiguous_format) if wanted and x is not None else some.new_empty(0, dtype=torch.float32)
        for x, wanted in zip(tensors, wants, strict=True)
    ]


def _linear_grpo_loss_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.wants = inputs[-1]
    ctx.save_for_backward(*output[4:])


def _linear_grpo_loss_backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    gradients = zip(ctx.saved_tensors, ctx.wants, strict=True)
    of_tensors = (scaled(x, grad_loss, inplace=False) if wanted and grad_loss is not None else None for x, wanted in gradients)
    return *of_tensors, *[None] * 22


torch.library.register_autograd(
    "grpo_fast::linear_grpo_loss", _linear_grpo_loss_backward, setup_context=_linear_grpo_loss_setup_context, lib=LIBRARY
)


# linear_token_logprobs ----------------------------------------------------------------------------------------------------------


def _linear_token_logprobs(*arguments: Any) -> tuple[Tensor, ...]:
    tensors, rows, (dtype, length, chunk_bytes, wants) = HeadTensors(*arguments[:5]), TokenRows(*arguments[5:11]), arguments[11:]
    want_slopes = Wants(*wants).states_alone
    forward = linear_token_logprobs_fwd(
        lambda plan: _head(tensors, wants if want_slopes else [False] * 5, dtype, length, plan),
        rows,
        limit=_limit(tensors, dtype, chunk_bytes),
        keep=0,
        want_slopes=want_slopes,
    )
    slopes = forward.slopes or HeadTensors(None, None)
    return *forward.statistics, *_given((slopes.hidden, slopes.adapted), forward.statistics.logprobs)


LIBRARY.impl("linear_token_logprobs", _linear_token_logprobs, "CompositeExplicitAutograd")


@torch.library.register_fake("grpo_fast::linear_token_logprobs", lib=LIBRARY)
def _linear_token_logprobs_fake(*arguments: Any) -> tuple[Tensor, ...]:
    logprobs, wants = torch.empty_like(arguments[5], dtype=torch.float32, memory_format=torch.contiguous_format), Wants(*arguments[14])
    hidden_slopes, _, _, adapted_slopes, _ = _gradients_fake(arguments[:5], arguments[14] if wants.states_alone else [False] * 5)
    return logprobs, torch.empty_like(logprobs), torch.empty_like(logprobs), hidden_slopes, adapted_slopes


def _linear_token_logprobs_backward(g: Tensor, h: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    tensors, rows, (dtype, length, chunk_bytes, wants) = HeadTensors(*arguments[:5]), TokenRows(*arguments[5:11]), arguments[11:15]
    order = plan_of(rows.mask[0], rows.mask[0], _limit(tensors, dtype, chunk_bytes), None)
    gradients = linear_token_logprobs_bwd(
        lambda plan: _head(tensors, wants, dtype, length, plan),
        rows,
        Forward(RowStatistics(*arguments[15:]), order, None, []),
        g,
        h,
        keep_graph=False,
    )
    return tuple(_given(gradients, g))


LIBRARY.impl("linear_token_logprobs_backward", _linear_token_logprobs_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("grpo_fast::linear_token_logprobs_backward", lib=LIBRARY)
def _linear_token_logprobs_backward_fake(g: Tensor, h: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return tuple(_gradients_fake(arguments[:5], arguments[14]))


def _logprobs_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:])
    ctx.others = tuple(inputs[8:])
    ctx.save_for_backward(*inputs[:8], *output)


def _logprobs_backward(ctx: Any, g: Tensor | None, h: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    *given, logprobs, entropy, lse, hidden_slopes, adapted_slopes = ctx.saved_tensors
    wants, mask = Wants(*ctx.others[-1]), given[6]
    if wants.states_alone and h is None and g is not None:
        g = torch.where(mask, g, 0)  # as in autograd.py
        gradients = HeadTensors(_scaled_rows(hidden_slopes, g), None, None, _scaled_rows(adapted_slopes, g))
    else:
        zero = torch.zeros_like(logprobs)
        gradients = HeadTensors(
            *torch.ops.grpo_fast.linear_token_logprobs_backward.default(
                zero if g is None else g, zero if h is None else h, *given, *ctx.others, logprobs, entropy, lse
            )
        )
    return *(x if wanted else None for x, wanted in zip(gradients, wants, strict=True)), *[None] * 10


def _scaled_rows(slopes: Tensor, g: Tensor) -> Tensor | None:
    return None if slopes.dim() == 1 else (slopes * per_row(g, slopes)).to(slopes.dtype)  # [0]: not wanted


torch.library.register_autograd("grpo_fast::linear_token_logprobs", _logprobs_backward, setup_context=_logprobs_setup_context, lib=LIBRARY)
