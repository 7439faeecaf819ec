"""The public functions from hidden states: linear_grpo_loss, and linear_token_logprobs for other losses.

The full ``logits = hidden @ weight.T`` are never in memory: they are computed for a chunk of tokens at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from grpo_fast.head.autograd import LinearLogprobsFunction, LinearLossFunction
from grpo_fast.head.call import validated_call
from grpo_fast.head.loss import LINEAR_METRICS, LinearLossResult, linear_loss
from grpo_fast.head.matrix_products import HeadTensors, NeedsGrad
from grpo_fast.head.memory import free_bytes
from grpo_fast.head.operators import compiled_logprobs, compiled_loss
from grpo_fast.head.validation import validated_bytes
from grpo_fast.loss.api import GRPOOutput, TokenLogprobs, grpo_loss, token_logprobs
from grpo_fast.loss.config import LossConfig
from grpo_fast.loss.support import Support
from grpo_fast.loss.validation import validated_loss_inputs

__all__ = ["linear_grpo_loss", "linear_token_logprobs"]

KEPT_SHARE = 4  # logits kept for backward take at most 1 / KEPT_SHARE of the free memory

_DEFAULT_CONFIG = LossConfig()


def linear_grpo_loss(
    hidden: Tensor,  # [B, T, D], [B, T + 1, D] or packed [N, D]
    weight: Tensor | Callable[[Tensor], Tensor],  # [V, D]
    token_ids: Tensor,  # int64 [B, T] or [N]
    advantages: Tensor,  # [B], [B, T] or [N]
    *,
    bias: Tensor | None = None,  # [V]
    config: LossConfig = _DEFAULT_CONFIG,
    old_logprobs: Tensor | None = None,  # like token_ids
    ref_logprobs: Tensor | None = None,  # like token_ids
    mask: Tensor | None = None,  # like token_ids
    rollout_weights: Tensor | None = None,  # [B, T], [B, 1] or [N]
    temperature: float | Tensor = 1.0,  # number, 0-d, [B], [B, 1], [B, T] or [N]
    cu_seqlens: Tensor | None = None,  # int32 [S + 1]
    num_items: int | float | Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    support: Support | None = None,  # of B * T or N positions
    surrogate_inputs: Mapping[str, Tensor] | None = None,  # each [B], [B, 1], [B, T] or [N]
    loss_scale: float = 1.0,
    metrics_on: str = "active",
    chunk_bytes: int | None = None,
    adapter: tuple[Tensor, Tensor] | None = None,  # like hidden with R in place of D, and [V, R]
    process_group: ProcessGroup | None = None,
    logits_dtype: str = "float32",
) -> GRPOOutput:
    """Compute grpo_loss of ``logits = hidden @ weight.T + bias`` without the full logits in memory.

    Loss and gradients are those of grpo_loss, and so are the metrics with ``metrics_on="all"`` (the default here is ``"active"``), to which
    ``recomputed_fraction`` is added.

    The logits of a chunk of tokens are overwritten with their gradient, from which the gradients of ``hidden`` and ``weight`` are computed
    before the next chunk. A trainable head
    costs 6 N D V operations and a frozen one 4, with N the number of tokens that can change the gradient; with ``metrics_on="all"`` every
    other unmasked token costs 2 D V. Masked tokens cost nothing. With a sequence-level ratio a chunk holds whole sequences; the logits of a
    sequence longer than a chunk are computed twice, unless ``old_logprobs`` is None. ``metrics["recomputed_fraction"]`` is the share of
    tokens whose logits were computed twice. On a GPU the call synchronises once, to read the number of active tokens; while a CUDA graph is
    captured nothing is read and every token is computed.

    Args:
        hidden: the input of the model's LM head. ``[B, T + 1, D]``: the last position is ignored without a copy.
        weight: the weight of the head. A DTensor is gathered. For a frozen head without such a matrix (a quantised one), pass the callable.
        bias: the bias of the head.
        support: the kept sets, as in grpo_loss. A token with a set of K ids, up to V / 32, costs D K operations where another costs D V:
            its logits are products with single rows of the weight. The logits of larger sets are computed over the whole vocabulary.
        chunk_bytes: memory for the logits of one chunk. None: for 512 tokens on a CPU and 8192 elsewhere, or as many as fit into a quarter
            of the free memory. A call also needs memory for the gradients (those of weights in float32 until the last chunk), for the
            weight in autocast's dtype if autocast is on, and for the logits that a callable allocates for the chunk.
        adapter: ``(adapted, adapter_weight)`` adds ``adapted @ adapter_weight.T`` to the logits: LoRA with
            ``adapted = scale * hidden @ A.T`` and ``adapter_weight = B``; the merged weight is never computed.
        process_group: the processes that share the vocabulary. Each passes its own shard of ``weight`` (and bias), [V of the shard, D];
            the shards follow one another in the order of the ranks. All other arguments must be equal in all processes, and so are the
            results and the gradient of ``hidden``. What the processes computed is added in the order of the ranks.
        logits_dtype: ``"float32"``: the logits are not rounded to the dtype of hidden states and weight, in which only the operands of the
            products are. A chunk takes 4 bytes a logit. The gradient of the logits is rounded to bfloat16 for its products if the operands
            are bfloat16; on a GPU also to float16. Of a callable's logits, whose dtype is its own, the gradient is exact. ``"input"``:
            logits are rounded to the operands' dtype, as the model's own head does. docs/numerics.md states errors and costs.

    The other arguments are those of grpo_loss.

    Returns:
        GRPOOutput(loss, logprobs, entropy, active, metrics), as in grpo_loss.

    Raises:
        TypeError, ValueError: names the argument, what it was, what was expected and the fix, before anything is written.

    Example:
        >>> hidden = torch.randn(4, 8, 16, requires_grad=True)
        >>> weight = torch.randn(100, 16, requires_grad=True)
        >>> token_ids = torch.randint(100, (4, 8))
        >>> out = linear_grpo_loss(hidden, weight, token_ids, advantages=torch.tensor([1.0, -1.0, 0.5, -0.5]), temperature=0.7)
        >>> out.loss.backward()
    """
    call = validated_call(
        hidden,
        weight,
        token_ids,
        bias=bias,
        mask=mask,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        support=support,
        chunk_bytes=chunk_bytes,
        adapter=adapter,
        process_group=process_group,
        logits_dtype=logits_dtype,
    )
    loss_options: dict[str, Any] = {
        "config": config,
        "old_logprobs": old_logprobs,
        "ref_logprobs": ref_logprobs,
        "rollout_weights": rollout_weights,
        "surrogate_inputs": surrogate_inputs,
        "cu_seqlens": cu_seqlens,
        "num_items": num_items,
        "loss_scale": loss_scale,
        "metrics_on": metrics_on,
    }
    inputs = validated_loss_inputs(call.tokens, advantages, **loss_options)
    if call.by_reference:
        out = grpo_loss(call.full_logits(), token_ids, advantages, mask=mask, **call.scoring_options, **loss_options)
        return out._replace(metrics={**out.metrics, LINEAR_METRICS[-1]: torch.zeros_like(out.loss.detach()).float()})

    packed, rows, only_active = inputs.packed(), call.rows(), metrics_on == "active"
    length = call.tokens.token_ids.shape[1]

    def run(tensors: HeadTensors, needs_grad: NeedsGrad) -> LinearLossResult:
        chunks = call.chunks
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            return linear_loss(
                lambda plan: call.head(tensors, needs_grad, plan),
                rows,
                packed,
                only_active=only_active,
                with_gradient=any(needs_grad),
                rows_per_chunk=chunks.rows,
                tile=chunks.tile,
            )

    if call.compiled:
        loss, logprobs, entropy, metrics = compiled_loss(
            call.tensors, rows, packed, only_active=only_active, precision=call.precision, length=length, chunk_bytes=chunk_bytes
        )
    elif call.wants_gradient:
        loss, logprobs, entropy, metrics = LinearLossFunction.apply(run, *call.tensors)
    else:
        loss, logprobs, entropy, metrics, _ = run(call.tensors, NeedsGrad())
    return GRPOOutput(
        loss,
        logprobs.view(call.tokens.shape),
        entropy.view(call.tokens.shape),
        call.tokens.like_given(inputs.active() if only_active else inputs.mask),
        dict(zip(LINEAR_METRICS, metrics.unbind(), strict=True)),
    )


def linear_token_logprobs(
    hidden: Tensor,  # [B, T, D], [B, T + 1, D] or packed [N, D]
    weight: Tensor | Callable[[Tensor], Tensor],  # [V, D]
    token_ids: Tensor,  # int64 [B, T] or [N]
    *,
    bias: Tensor | None = None,  # [V]
    mask: Tensor | None = None,  # like token_ids
    temperature: float | Tensor = 1.0,  # number, 0-d, [B], [B, 1], [B, T] or [N]
    softcap: float | None = None,
    logit_scale: float = 1.0,
    support: Support | None = None,  # of B * T or N positions
    chunk_bytes: int | None = None,
    keep_bytes: int | None = None,
    adapter: tuple[Tensor, Tensor] | None = None,  # like hidden with R in place of D, and [V, R]
    process_group: ProcessGroup | None = None,
    logits_dtype: str = "float32",
) -> TokenLogprobs:
    """Compute token_logprobs of ``logits = hidden @ weight.T + bias`` without the full logits in memory; both results are differentiable.

    For N unmasked tokens it costs 2 N D V operations without a gradient. With a frozen head it costs 4 N D V: d logprob / d hidden is
    computed in the forward pass, and backward scales its rows (for a gradient of the entropy the logits are computed again: 8 N D V). With
    a trainable head it costs 6 D V for each token whose logits fit into ``keep_bytes``, and 8 D V for each of the others.

    Args:
        keep_bytes: memory for logits kept from forward to backward, trainable heads only. None: a quarter of the free memory. Under
            torch.compile nothing is kept.

    The other arguments are those of linear_grpo_loss.

    Returns:
        TokenLogprobs(logprobs, entropy), float32 and shaped like token_ids, 0 where masked.

    Raises:
        TypeError, ValueError: names the argument, what it was, what was expected and the fix, before anything is written.

    Example:
        >>> out = linear_token_logprobs(torch.zeros(1, 3, 4), torch.zeros(8, 4), torch.tensor([[1, 2, 3]]))
        >>> out.entropy.exp()
        tensor([[8., 8., 8.]])
    """
    call = validated_call(
        hidden,
        weight,
        token_ids,
        bias=bias,
        mask=mask,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        support=support,
        chunk_bytes=chunk_bytes,
        adapter=adapter,
        process_group=process_group,
        logits_dtype=logits_dtype,
    )
    keep_bytes = validated_bytes("keep_bytes", keep_bytes, least=0)
    if call.by_reference:
        return token_logprobs(call.full_logits(), token_ids, mask=mask, **call.scoring_options)
    rows = call.rows()
    if call.compiled:
        length = call.tokens.token_ids.shape[1]
        logprobs, entropy = compiled_logprobs(call.tensors, rows, precision=call.precision, length=length, chunk_bytes=chunk_bytes)
    elif call.wants_gradient:
        free = free_bytes(hidden.device) // KEPT_SHARE if keep_bytes is None else keep_bytes
        logprobs, entropy = LinearLogprobsFunction.apply(call.head, rows, call.chunks, free // call.row_bytes, *call.tensors)
    else:
        logprobs, entropy = LinearLogprobsFunction.without_gradient(call.head, rows, call.chunks, call.tensors)
    return TokenLogprobs(logprobs.view(call.tokens.shape), entropy.view(call.tokens.shape))
