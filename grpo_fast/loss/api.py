"""The public loss over logits: grpo_loss, and token_logprobs for custom losses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from grpo_fast.loss import reference
from grpo_fast.loss.config import LossConfig
from grpo_fast.loss.inputs import LossInputs
from grpo_fast.loss.logprob_loss import policy_loss
from grpo_fast.loss.operator_arguments import loss_arguments
from grpo_fast.loss.support import Support
from grpo_fast.loss.token_inputs import ANY_VOCABULARY, TokenInputs, check_ids, token_inputs
from grpo_fast.loss.token_rows import RowLogprobsFunction, TokenRows
from grpo_fast.loss.validation import validated_loss_inputs
from grpo_fast.loss.vocab_parallel import gather_vocab_shards
from grpo_fast.ops.backends import select
from grpo_fast.ops.grpo_loss import METRICS, GrpoLossFunction
from grpo_fast.ops.impl_checks import check_impl
from grpo_fast.ops.kept_logprobs import KeptSets
from grpo_fast.ops.token_logprobs import TokenLogprobsFunction

__all__ = ["GRPOOutput", "TokenLogprobs", "grpo_loss", "token_logprobs"]

_DEFAULT_CONFIG = LossConfig()


class GRPOOutput(NamedTuple):
    """The result of grpo_loss. All tensors are on the device of the logits; computing them does not synchronise a GPU.

    Metrics are means over the computed tokens, 0-d float32: ``kl`` (the estimate; 0 without ref_logprobs), ``entropy`` (nats, at the call's
    temperature), ``ratio_mean`` and ``ratio_max`` of the importance ratio, ``clip_low`` (share of tokens with A < 0 whose ratio is below
    the clip range), ``clip_high`` (share with A > 0 and a ratio above it), ``clip_region`` (the sum of both), and ``active_fraction``: the
    share of the unmasked tokens that can change the gradient.
    """

    loss: Tensor  # 0-d float32 (float64 for float64 logits), differentiable
    logprobs: Tensor  # float32, like token_ids, detached; 0 where not computed
    entropy: Tensor  # float32, like token_ids, detached; 0 where not computed
    active: Tensor  # bool, like token_ids: the tokens that were computed
    metrics: dict[str, Tensor]


class TokenLogprobs(NamedTuple):
    """The result of token_logprobs: float32 (float64 for float64 logits), shaped like token_ids, differentiable, 0 where masked."""

    logprobs: Tensor
    entropy: Tensor


def grpo_loss(
    logits: Tensor,  # [B, T, V], [B, T + 1, V] or packed [N, V]
    token_ids: Tensor,  # int64 [B, T] or [N]
    advantages: Tensor,  # [B], [B, T] or [N]
    *,
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
    metrics_on: str = "all",
    inplace: bool = False,
    process_group: ProcessGroup | None = None,
    impl: str | None = None,
) -> GRPOOutput:
    """Compute the loss of Group Relative Policy Optimization (arXiv:2402.03300) or one of its variants from logits, in one pass.

    ``loss = loss_scale * sum_n w_n * l_n``, where the config's loss type sets the per-token objective l and the weights w;
    grpo_fast/loss/reference.py is the specification. Statistics are float32 or better for every dtype of the logits, and the result
    is bitwise the same from run to run. The forward pass computes the gradient of the logits together with the loss, and the backward pass
    returns it unchanged if its upstream gradient is 1: scale with ``loss_scale`` rather than by multiplying the loss.

    Args:
        logits: float32, bfloat16 or float16 (float64: computed by the reference). ``[B, T + 1, V]`` is what a Hugging Face model
            returns for T tokens and their prefix; the last position is ignored without a copy of the logits.
        token_ids: int64, the sampled tokens; ``token_ids[b, t]`` is scored by ``logits[b, t]``.
        advantages: one per sequence or per token.
        config: the loss type and its settings.
        old_logprobs: log-probabilities under the policy that sampled, in nats; None = on-policy (the ratio is 1 and its gradient flows).
        ref_logprobs: log-probabilities under the reference policy; required when ``config.beta != 0``.
        mask: bool or 0/1; masked tokens may hold any value in every argument. None = no token is masked.
        rollout_weights: correction for a sampler that differs from the trainer; multiplies the surrogate, not the KL penalty.
        temperature: at which the tokens were sampled; the policy is ``softmax(f(logits) / temperature)``.
        cu_seqlens: with packed input, where sequences begin, ``0 ... N``; required for settings that depend on sequence boundaries.
        num_items: the number of unmasked tokens of the whole optimiser step, for ``global_token_mean`` (ignored by the other aggregations);
            None = that of this call.
        softcap: ``c * tanh(logits / c)`` before the temperature (Gemma 2); None = no soft cap.
        logit_scale: multiplies the logits before soft cap and temperature (Cohere, Granite).
        support: for every position the set of tokens that the sampler could have drawn (top-k, top-p, min-p), an empty one for the whole
            vocabulary. Log-probability, entropy and gradient are then those of the softmax over the set, so that the policy is the one
            that sampled (arXiv:2512.02556); logits outside of it are not read, and get a gradient of 0. old_logprobs must be of the
            same sets; ref_logprobs are taken as given: for a KL penalty between truncated policies compute them over the same sets.
            None = no restriction.
        surrogate_inputs: with ``loss_type="custom"``, numbers per token or per sequence (bool, integer or floating-point) that the
            parameters of the surrogate name; they get no gradient.
        loss_scale: multiplies the loss and its gradient at no cost, for example 1 / gradient-accumulation steps.
        metrics_on: ``"all"``: compute log-probability, entropy and metrics of every unmasked token; ``"active"``: only of the tokens that
            can change the gradient. The loss is the same.
        inplace: allow the gradient to overwrite the storage of the logits, which must not be used afterwards. Under torch.compile and with
            the reference backend the argument has no effect.
        process_group: the processes that share the vocabulary. Each passes the logits of its shard, [B, T, V of the shard]; the shards
            follow one another in the order of the ranks. All other arguments must be equal in all processes, and so are the results.
        impl: the GPU kernels to use: ``"triton"``, or ``"cluster"``: CUDA kernels that read the logits once and write the gradient once
            (compute capability 9.0 or newer, losses of token-level ratios, rows of up to 456,704 logits in bfloat16 with 227 KiB
            of shared memory per block), which are used only on request. None = the default kernels of the backend.

    Returns:
        GRPOOutput(loss, logprobs, entropy, active, metrics).

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape, device or value is wrong. The message names the argument, its value, what was expected and the fix; nothing
            has been written. Values of tensors (ids, mask, temperatures; advantages and log-probabilities of unmasked tokens) are checked
            on the CPU, and on every device with ``debug_checks``; elsewhere a bad value makes the loss NaN.
        RuntimeError: ``impl`` names kernels that cannot compute on this machine or for these logits.

    Example:
        >>> logits = torch.randn(4, 8, 100, requires_grad=True)
        >>> token_ids = torch.randint(100, (4, 8))
        >>> out = grpo_loss(logits, token_ids, advantages=torch.tensor([1.0, -1.0, 0.5, -0.5]), temperature=0.7)
        >>> out.loss.backward()
    """
    vocabulary = None if process_group is None else ANY_VOCABULARY
    tokens = token_inputs(
        logits,
        token_ids,
        mask=mask,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        support=support,
        vocabulary=vocabulary,
    )
    _check_inplace(inplace)
    inputs = validated_loss_inputs(
        tokens,
        advantages,
        config=config,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        rollout_weights=rollout_weights,
        surrogate_inputs=surrogate_inputs,
        cu_seqlens=cu_seqlens,
        num_items=num_items,
        loss_scale=loss_scale,
        metrics_on=metrics_on,
    )
    one_pass = process_group is None and support is None and not inputs.needs_two_passes and inputs.token_level() is not None
    if impl is not None:
        check_impl(impl, logits, select(logits.device), one_pass=one_pass)
    inplace = inplace and _can_write_over(logits)
    if process_group is None and by_reference(logits):
        with torch.autocast(logits.device.type, enabled=False):
            specified = reference.grpo_loss(
                logits,
                token_ids,
                advantages,
                config,
                old_logprobs=old_logprobs,
                ref_logprobs=ref_logprobs,
                mask=mask,
                rollout_weights=rollout_weights,
                temperature=temperature,
                cu_seqlens=cu_seqlens,
                num_items=num_items,
                softcap=softcap,
                logit_scale=logit_scale,
                support=_sets(tokens),
                surrogate_inputs=dict(surrogate_inputs or {}),
                loss_scale=inputs.loss_scale,
                metrics_on=metrics_on,
            )
        return GRPOOutput(specified.loss, specified.logprobs.detach(), specified.entropy.detach(), specified.active, specified.metrics)
    computed = tokens.mask if metrics_on == "all" else inputs.active()
    if one_pass and (token_level := inputs.token_level()) is not None:
        loss, logprobs, entropy, metrics = _one_pass_loss(tokens, inputs, token_level, computed, inplace, cluster=impl == "cluster")
    else:  # a ratio needs the whole sequence, a row its kept set, or the surrogate is a function: the logits' gradient comes in backward
        logprobs, entropy = _statistics(tokens, computed, inplace, process_group)
        with torch.autocast(logits.device.type, enabled=False):
            loss, metrics = policy_loss(logprobs, entropy, inputs, computed)
        logprobs, entropy = logprobs.detach(), entropy.detach()
    return GRPOOutput(loss, tokens.like_given(logprobs), tokens.like_given(entropy), tokens.like_given(computed), metrics)


def token_logprobs(
    logits: Tensor,  # [B, T, V], [B, T + 1, V] or packed [N, V]
    token_ids: Tensor,  # int64 [B, T] or [N]
    *,
    mask: Tensor | None = None,  # like token_ids
    temperature: float | Tensor = 1.0,  # number, 0-d, [B], [B, 1], [B, T] or [N]
    softcap: float | None = None,
    logit_scale: float = 1.0,
    support: Support | None = None,  # of B * T or N positions
    process_group: ProcessGroup | None = None,
) -> TokenLogprobs:
    """Return the log-probability of each token under ``softmax(f(logits) / temperature)`` and the entropy of that distribution, in nats.

    Both are computed in one pass over the logits and are differentiable. They are exact also for almost certain tokens, where ``s_y - lse``
    rounds to 0.

    Args:
        logits: float32, bfloat16 or float16 (float64: computed by the reference). ``[B, T + 1, V]``: the last position is ignored without
            a copy of the logits.
        token_ids: int64; ``token_ids[b, t]`` is scored by ``logits[b, t]``.
        mask: bool or 0/1; masked tokens may hold any value in every argument. None = no token is masked.
        temperature: the policy is ``softmax(f(logits) / temperature)``.
        softcap: ``c * tanh(logits / c)`` before the temperature (Gemma 2); None = no soft cap.
        logit_scale: multiplies the logits before soft cap and temperature (Cohere, Granite).
        support: for every position the set of tokens that the sampler could have drawn (top-k, top-p, min-p), an empty one for the whole
            vocabulary. Log-probability, entropy and gradient are then those of the softmax over the set, so that the policy is the one
            that sampled (arXiv:2512.02556). None = no restriction.
        process_group: the processes that share the vocabulary, as in grpo_loss.

    Returns:
        TokenLogprobs(logprobs, entropy), float32 and shaped like token_ids, 0 where masked.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape, device or value is wrong; checked as in grpo_loss.

    Example:
        >>> out = token_logprobs(torch.zeros(1, 3, 8), torch.tensor([[1, 2, 3]]))
        >>> out.entropy.exp()
        tensor([[8., 8., 8.]])
    """
    vocabulary = None if process_group is None else ANY_VOCABULARY
    tokens = token_inputs(
        logits,
        token_ids,
        mask=mask,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        support=support,
        vocabulary=vocabulary,
    )
    if process_group is None and by_reference(logits):
        with torch.autocast(logits.device.type, enabled=False):
            return TokenLogprobs(*reference.token_logprobs(logits, token_ids, mask, temperature, softcap, logit_scale, _sets(tokens)))
    logprobs, entropy = _statistics(tokens, tokens.mask, inplace=False, group=process_group)
    return TokenLogprobs(tokens.like_given(logprobs), tokens.like_given(entropy))


def _sets(tokens: TokenInputs) -> KeptSets | None:
    return None if tokens.support is None else tokens.support.kept_sets


def _check_inplace(inplace: bool) -> None:
    if not isinstance(inplace, bool):
        raise TypeError(f"inplace is {inplace!r} ({type(inplace).__name__}); expected True or False.")


def by_reference(logits: Tensor) -> bool:
    """Return whether the reference backend computes a call with these logits or hidden states."""
    return logits.dtype == torch.float64 or select(logits.device) == "reference"


def _wants_gradient(logits: Tensor) -> bool:
    return torch.is_grad_enabled() and logits.requires_grad


def _can_write_over(logits: Tensor) -> bool:
    """Return whether the gradient may overwrite these logits.

    Raises:
        ValueError: overwriting them would change values that are still needed.
    """
    if torch.compiler.is_compiling() or not _wants_gradient(logits):
        return False
    if logits.is_leaf or (logits._base is not None and logits._base.is_leaf):
        raise ValueError(
            "inplace=True with logits that are a leaf (a parameter) or a view of one; expected the output of a model. Leave inplace off."
        )
    reach = 0  # largest offset within the dimensions of smaller strides; a stride up to it makes two elements share memory
    for stride, size in sorted((stride, size) for stride, size in zip(logits.stride(), logits.shape, strict=True) if size > 1):
        if stride <= reach:
            raise ValueError(
                f"inplace=True with logits that overlap or are expanded (strides {logits.stride()}); expected memory without overlap. "
                "Leave inplace off."
            )
        reach += (size - 1) * stride
    return logits.stride(-1) == 1


def scoring(tokens: TokenInputs) -> tuple[Tensor | None, float, float, float]:
    """Return ``(temperatures, temperature, softcap, logit_scale)`` as the operators take them."""
    temperatures = None if tokens.temperatures is None else tokens.temperatures.float()
    temperature = tokens.temperature
    if temperatures is None and torch.compiler.is_compiling():  # a float would be a constant of the graph: each new value would recompile
        temperatures, temperature = torch.ones(1, 1, device=tokens.scored.device) * temperature, 1.0
    return temperatures, temperature, tokens.softcap or 0.0, tokens.logit_scale


def _statistics(tokens: TokenInputs, computed: Tensor, inplace: bool, group: ProcessGroup | None) -> tuple[Tensor, Tensor]:
    rows = TokenRows(tokens.token_ids, computed, *scoring(tokens), sets=_sets(tokens))
    if group is not None:
        shard = gather_vocab_shards(tokens.scored.shape[-1], group, tokens.scored.device)
        check_ids(tokens, shard.total)
        rows, inplace = rows._replace(shard=shard), False
    if group is not None or (rows.sets is not None and not torch.compiler.is_compiling()):
        return RowLogprobsFunction.apply(tokens.scored, rows, inplace)
    if rows.sets is not None:
        logprobs, entropy, _ = torch.ops.grpo_fast.kept_token_logprobs.default(tokens.scored, *rows.kept)
        return logprobs, entropy
    arguments = (tokens.scored, tokens.token_ids, computed, *rows.scoring)
    if _wants_gradient(tokens.scored) and not torch.compiler.is_compiling():
        logprobs, entropy, _ = TokenLogprobsFunction.apply(inplace, *arguments)
    else:
        logprobs, entropy, _ = torch.ops.grpo_fast.token_logprobs.default(*arguments)
    return logprobs, entropy


def _one_pass_loss(
    tokens: TokenInputs, inputs: LossInputs, token_level: LossInputs, computed: Tensor, inplace: bool, *, cluster: bool
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Compute the loss with the one-pass operator.

    Args:
        token_level: ``inputs``, or inputs with token-level ratios and the same gradient (see LossInputs.token_level).
    """
    logits, arguments = tokens.scored, loss_arguments(TokenRows(tokens.token_ids, computed, *scoring(tokens)), token_level)
    wants_gradient = _wants_gradient(logits)
    if wants_gradient and not torch.compiler.is_compiling():
        loss, logprobs, entropy, metrics = GrpoLossFunction.apply(logits, inplace, arguments, cluster)
    else:
        operator = torch.ops.grpo_fast.grpo_loss_cluster if cluster else torch.ops.grpo_fast.grpo_loss
        loss, logprobs, entropy, metrics, _ = operator.default(logits, *arguments, wants_gradient)
    named = dict(zip(METRICS, metrics.unbind(), strict=True))
    named["active_fraction"] = inputs.active_fraction()
    return loss, logprobs, entropy, named
