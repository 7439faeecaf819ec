"""The public functions from hidden states: linear_grpo_loss, and linear_token_logprobs for losses of one's own.

``logits = hidden @ weight.T`` are never all there at once: grpo_fast/head/ makes them for a chunk of tokens at a time.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from grpo_fast.head.autograd import LinearLogprobsFunction, LinearLossFunction
from grpo_fast.head.chunking import Plan, chunk_rows, free_bytes
from grpo_fast.head.loss import LINEAR_METRICS, linear_loss
from grpo_fast.head.operators import compiled_logprobs, compiled_loss
from grpo_fast.head.products import DenseHead, Head, HeadTensors, ModuleHead, Wants
from grpo_fast.head.weights import gathered, is_quantised
from grpo_fast.loss import checks
from grpo_fast.loss.api import GRPOOutput, TokenLogprobs, by_reference, grpo_loss, scoring, token_logprobs
from grpo_fast.loss.config import LossConfig
from grpo_fast.loss.token_inputs import ANY_VOCABULARY, TokenInputs, check_ids, token_inputs
from grpo_fast.loss.token_rows import TokenRows
from grpo_fast.loss.validation import validated_loss_inputs
from grpo_fast.loss.vocab_parallel import Shard, all_reduce_min, gather_vocab_shards

__all__ = ["linear_grpo_loss", "linear_token_logprobs"]

KEPT_SHARE = 4  # logits kept for backward take at most this part of the memory that is free

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
    loss_scale: float = 1.0,
    metrics_on: str = "active",
    chunk_bytes: int | None = None,
    adapter: tuple[Tensor, Tensor] | None = None,  # like hidden with R in place of D, and [V, R]
    process_group: ProcessGroup | None = None,
) -> GRPOOutput:
    """grpo_loss of ``logits = hidden @ weight.T + bias``, without the logits: values and gradients are the same, and with
    ``metrics_on="all"`` the metrics (here ``"active"`` unless said otherwise); ``recomputed_fraction`` is added.

    Tokens are taken a chunk at a time; a chunk's logits become their gradient in the same memory and are multiplied out at once. A
    trainable head costs 6 N D V operations and a frozen one 4, N being the tokens that can change the gradient (with
    ``metrics_on="active"``; the others cost 2 D V each with ``"all"``). Masked tokens cost nothing. A ratio of whole sequences keeps a
    sequence in one chunk; one longer than a chunk is computed twice, unless there are no ``old_logprobs``:
    ``metrics["recomputed_fraction"]`` says for which share of the tokens. On a GPU the number of active tokens is read, which is the
    call's one synchronisation; while a CUDA graph is captured nothing is read and every token is computed.

    Args:
        hidden: what the model feeds to its head. ``[B, T + 1, D]``: the last position is ignored, nothing is copied.
        weight: of the head. A DTensor is gathered. A frozen head that has no such matrix (a quantised one) is given as the callable itself.
        bias: of the head.
        chunk_bytes: memory for the logits of one chunk. None: for 512 tokens on a CPU and 8192 elsewhere, or as many as a quarter of the
            free memory takes. Beside it a call holds the gradients that are asked for, those of the weights in float32 (rounded to their
            type when the last chunk is gone), and under autocast the weight in its type. A callable has its own logits beside the chunk.
        adapter: ``(adapted, adapter_weight)`` adds ``adapted @ adapter_weight.T`` to the logits: LoRA with
            ``adapted = scale * hidden @ A.T`` and ``adapter_weight = B``, whose merged matrix is never made.
        process_group: each process holds a part of the vocabulary, ``weight`` (and bias) [V of the part, D], one after the other in
            the order of the ranks; everything else is the same in all of them, and so are results and the gradient of ``hidden``.

    The other arguments are those of grpo_loss.

    Returns:
        GRPOOutput(loss, logprobs, entropy, active, metrics), as of grpo_loss.

    Raises:
        TypeError, ValueError: names the argument, what it was, what was expected and the cure, before anything is written.

    Example:
        >>> hidden = torch.randn(4, 8, 16, requires_grad=True)
        >>> weight = torch.randn(100, 16, requires_grad=True)
        >>> token_ids = torch.randint(100, (4, 8))
        >>> out = linear_grpo_loss(hidden, weight, token_ids, advantages=torch.tensor([1.0, -1.0, 0.5, -0.5]), temperature=0.7)
        >>> out.loss.backward()
    """
    call = _checked(
        hidden,
        weight,
        token_ids,
        bias=bias,
        mask=mask,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        chunk_bytes=chunk_bytes,
        adapter=adapter,
        process_group=process_group,
    )
    of_policy: dict[str, Any] = {
        "config": config,
        "old_logprobs": old_logprobs,
        "ref_logprobs": ref_logprobs,
        "rollout_weights": rollout_weights,
        "cu_seqlens": cu_seqlens,
        "num_items": num_items,
        "loss_scale": loss_scale,
        "metrics_on": metrics_on,
    }
    policy = validated_loss_inputs(call.inputs, advantages, **of_policy)
    if call.by_reference:
        out = grpo_loss(call.full_logits(), token_ids, advantages, mask=mask, **call.scoring_as_given, **of_policy)
        return out._replace(metrics={**out.metrics, LINEAR_METRICS[-1]: torch.zeros_like(out.loss.detach()).float()})

    packed, rows, only_active = policy.packed(), call.rows(), metrics_on == "active"
    length = call.inputs.token_ids.shape[1]

    def run(tensors: HeadTensors, wants: Wants) -> Any:
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            return linear_loss(
                lambda plan: call.head(tensors, wants, plan),
                rows,
                packed,
                only_active=only_active,
                want_gradient=any(wants),
                limit=call.limit,
            )

    if call.compiled:
        loss, logprobs, entropy, metrics = compiled_loss(
            call.tensors, rows, packed, only_active=only_active, dtype=call.dtype, length=length, chunk_bytes=chunk_bytes
        )
    elif call.wants_gradient:
        loss, logprobs, entropy, metrics = LinearLossFunction.apply(run, *call.tensors)
    else:
        loss, logprobs, entropy, metrics, _ = run(call.tensors, Wants(False))
    return GRPOOutput(
        loss,
        logprobs.view(call.inputs.shape),
        entropy.view(call.inputs.shape),
        call.inputs.like_given(policy.active() if only_active else policy.mask),
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
    chunk_bytes: int | None = None,
    keep_bytes: int | None = None,
    adapter: tuple[Tensor, Tensor] | None = None,  # like hidden with R in place of D, and [V, R]
    process_group: ProcessGroup | None = None,
) -> TokenLogprobs:
    """token_logprobs of ``logits = hidden @ weight.T + bias``, without the logits; both results differentiable.

    Without a gradient 2 N D V operations, N the unmasked tokens. With a frozen head 4: d logprob / d hidden is made while the
    logits are there, and backward scales its rows (a gradient of the entropy computes the logits again: 8). With a trainable head 6 for
    the tokens whose logits fit into ``keep_bytes``, and 8 for the others.

    Args:
        keep_bytes: memory for logits kept from forward to backward, trainable heads only. None: a quarter of what is free. Where
            torch.compile traces the call nothing is kept.

    The other arguments are those of linear_grpo_loss.

    Returns:
        TokenLogprobs(logprobs, entropy), float32 and shaped like token_ids, 0 under the mask's zeros.

    Raises:
        TypeError, ValueError: names the argument, what it was, what was expected and the cure, before anything is written.

    Example:
        >>> out = linear_token_logprobs(torch.zeros(1, 3, 4), torch.zeros(8, 4), torch.tensor([[1, 2, 3]]))
        >>> out.entropy.exp()
        tensor([[8., 8., 8.]])
    """
    call = _checked(
        hidden,
        weight,
        token_ids,
        bias=bias,
        mask=mask,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        chunk_bytes=chunk_bytes,
        adapter=adapter,
        process_group=process_group,
    )
    keep_bytes = _checked_bytes("keep_bytes", keep_bytes, least=0)
    if call.by_reference:
        return token_logprobs(call.full_logits(), token_ids, mask=mask, **call.scoring_as_given)
    rows = call.rows()
    if call.compiled:
        length = call.inputs.token_ids.shape[1]
        logprobs, entropy = compiled_logprobs(call.tensors, rows, dtype=call.dtype, length=length, chunk_bytes=chunk_bytes)
    elif call.wants_gradient:
        free = free_bytes(hidden.device) // KEPT_SHARE if keep_bytes is None else keep_bytes
        logprobs, entropy = LinearLogprobsFunction.apply(call.head, rows, call.limit, free // call.row_bytes, *call.tensors)
    else:
        logprobs, entropy = LinearLogprobsFunction.without_gradient(call.head, rows, call.limit, call.tensors)
    return TokenLogprobs(logprobs.view(call.inputs.shape), entropy.view(call.inputs.shape))


class _Call(NamedTuple):
    """A checked call of either function."""

    inputs: TokenInputs
    tensors: HeadTensors
    module: Callable[[Tensor], Tensor] | None
    vocabulary: int
    dtype: torch.dtype  # of the products and the logits
    chunk_bytes: int | None
    group: ProcessGroup | None
    temperature: float | Tensor  # as given
    autocast: torch.dtype | None  # in force when the call was made

    @property
    def row_bytes(self) -> int:
        return self.vocabulary * self.dtype.itemsize

    @property
    def limit(self) -> int:
        """Tokens per chunk; processes that divide the vocabulary among them take the same chunks."""
        rows = chunk_rows(self.chunk_bytes, self.row_bytes, self.inputs.scored.device)
        return rows if self.group is None else all_reduce_min(rows, self.group, self.inputs.scored.device)

    @property
    def compiled(self) -> bool:
        """Whether torch.compile traces this call, and an operator takes the place of what follows."""
        return torch.compiler.is_compiling() and self.module is None and self.group is None

    @property
    def by_reference(self) -> bool:
        assert self.tensors.hidden is not None
        return self.group is None and (self.dtype == torch.float64 or by_reference(self.tensors.hidden))

    @property
    def wants_gradient(self) -> bool:
        return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in self.tensors)

    @property
    def scoring_as_given(self) -> dict[str, Any]:
        return {"temperature": self.temperature, "softcap": self.inputs.softcap, "logit_scale": self.inputs.logit_scale}

    def rows(self) -> TokenRows:
        """Tokens and how they are scored, [1, N]."""
        inputs = self.inputs
        temperatures, temperature, softcap, logit_scale = scoring(inputs)
        if temperatures is not None:
            temperatures = temperatures.expand(inputs.token_ids.shape).reshape(1, -1)
        shard: Shard | None = None
        if self.group is not None:
            shard = gather_vocab_shards(self.vocabulary, self.group, inputs.scored.device)
            check_ids(inputs, shard.total)
        return TokenRows(
            inputs.token_ids.reshape(1, -1), inputs.mask.reshape(1, -1), temperatures, temperature, softcap, logit_scale, shard
        )

    def head(self, tensors: HeadTensors, wants: Wants, plan: Plan) -> Head:
        """The head for a plan's chunks; made of other tensors where autograd hands them over."""
        length = self.inputs.token_ids.shape[1]
        if self.module is not None:
            assert tensors.hidden is not None
            return ModuleHead(self.module, tensors.hidden, wants, self.vocabulary, length, self.autocast)
        return DenseHead(tensors, wants, self.dtype, length, plan, group=self.group)

    def full_logits(self) -> Tensor:
        """All of them, recorded by autograd, shaped like the hidden states as given."""
        positions = self.inputs.scored.shape[1]
        counts = torch.nn.functional.pad(self.inputs.mask, (0, positions - self.inputs.mask.shape[1])).unsqueeze(-1)

        def select(x: Tensor | None) -> Tensor | None:  # 0 * nan would be the weight's gradient
            return None if x is None else torch.where(counts, x, 0)

        tensors = self.tensors._replace(hidden=select(self.tensors.hidden), adapted=select(self.tensors.adapted))
        hidden, weight, bias, adapted, adapter_weight = (None if x is None else x.to(self.dtype) for x in tensors)
        assert hidden is not None
        if self.module is not None:
            logits = self.module(hidden)
        else:
            assert weight is not None
            logits = torch.nn.functional.linear(hidden, weight, bias)
        if adapted is not None and adapter_weight is not None:
            logits = logits + adapted @ adapter_weight.T
        return logits.squeeze(0) if self.inputs.packed else logits


def _checked(
    hidden: Tensor,
    weight: Tensor | Callable[[Tensor], Tensor],
    token_ids: Tensor,
    *,
    bias: Tensor | None,
    mask: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float,
    chunk_bytes: int | None,
    adapter: tuple[Tensor, Tensor] | None,
    process_group: ProcessGroup | None,
) -> _Call:
    if not isinstance(hidden, Tensor):
        raise TypeError(
            f"hidden is a {type(hidden).__name__}; expected a floating-point torch.Tensor. It is what a model feeds to its head."
        )
    module: Callable[[Tensor], Tensor] | None = None
    matrix: Tensor | None = None
    if isinstance(weight, Tensor):
        matrix, bias = gathered(weight), None if bias is None else gathered(bias)
        _check_weight(hidden, matrix, bias, adapter)
        vocabulary = matrix.shape[0]
    else:
        module = _checked_module(weight, bias, adapter, process_group)
        vocabulary = _vocabulary_of(module, hidden)
    inputs = token_inputs(
        hidden,
        token_ids,
        mask=mask,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        name="hidden",
        vocabulary=vocabulary if process_group is None else ANY_VOCABULARY,
    )
    chunk_bytes = _checked_bytes("chunk_bytes", chunk_bytes, least=1)
    adapted, adapter_weight = (None, None) if adapter is None else adapter
    if adapted is not None and inputs.packed:
        adapted = adapted.unsqueeze(0)
    tensors = HeadTensors(inputs.scored, matrix, bias, adapted, adapter_weight)
    autocast = torch.get_autocast_dtype(hidden.device.type) if torch.is_autocast_enabled(hidden.device.type) else None
    dtype = _product_dtype(hidden, matrix, autocast)
    if process_group is not None and dtype == torch.float64:
        raise ValueError(
            "process_group was given with float64 hidden states or weight; expected float32, bfloat16 or float16: float64 is computed by "
            "the reference, which wants the whole vocabulary. Convert them: hidden.float(), weight.float()."
        )
    return _Call(inputs, tensors, module, vocabulary, dtype, chunk_bytes, process_group, temperature, autocast)


def _product_dtype(hidden: Tensor, weight: Tensor | None, autocast: torch.dtype | None) -> torch.dtype:
    """That which holds both, or the autocast's where one is in force, which leaves float64 alone."""
    together = hidden.dtype if weight is None else torch.promote_types(hidden.dtype, weight.dtype)
    return together if autocast is None or together == torch.float64 else autocast


def _check_weight(hidden: Tensor, weight: Tensor, bias: Tensor | None, adapter: tuple[Tensor, Tensor] | None) -> None:
    checks.tensor("weight", weight, like=hidden, like_name="hidden")
    if not torch.compiler.is_compiling() and is_quantised(weight):
        raise TypeError(
            f"weight is a {type(weight).__name__} (quantised); expected a plain tensor. Pass the frozen head itself, weight=model.lm_head."
        )
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight has shape {list(weight.shape)}; expected [V, D] = [V, {hidden.shape[-1]}], D being the last dimension of hidden "
            f"{list(hidden.shape)}. It is the weight of the head's torch.nn.Linear."
        )
    if weight.shape[0] < 2:
        raise ValueError(f"weight has a vocabulary of {weight.shape[0]}; expected at least 2 rows.")
    if bias is not None:
        checks.tensor("bias", bias, like=hidden, like_name="hidden")
        checks.shape("bias", bias, ((weight.shape[0],), "[V]"), source="weight")
    if adapter is None:
        return
    if not isinstance(adapter, tuple) or len(adapter) != 2:
        raise TypeError(f"adapter is {type(adapter).__name__}; expected a pair of tensors (adapted, adapter_weight).")
    adapted, adapter_weight = adapter
    checks.tensor("adapter[0]", adapted, like=hidden, like_name="hidden")
    checks.tensor("adapter[1]", adapter_weight, like=hidden, like_name="hidden")
    if adapter_weight.dim() != 2:
        raise ValueError(f"adapter[1] has shape {list(adapter_weight.shape)}; expected [V, R] = [{weight.shape[0]}, R]. It is LoRA's B.")
    rank = adapter_weight.shape[1]
    checks.shape("adapter[0]", adapted, ((*hidden.shape[:-1], rank), "the shape of hidden with R in place of D"), source="hidden")
    checks.shape("adapter[1]", adapter_weight, ((weight.shape[0], rank), "[V, R]"), source="weight")


def _checked_module(
    module: object, bias: Tensor | None, adapter: tuple[Tensor, Tensor] | None, group: ProcessGroup | None
) -> Callable[[Tensor], Tensor]:
    if not callable(module):
        raise TypeError(f"weight is a {type(module).__name__}; expected a torch.Tensor [V, D], or a callable from hidden states to logits.")
    for name, x in (("bias", bias), ("adapter", adapter), ("process_group", group)):
        if x is not None:
            raise ValueError(
                f"{name} was given with a callable in place of the weight; expected None. The callable makes the logits whole."
            )
    trained = [name for name, p in module.named_parameters() if p.requires_grad] if isinstance(module, torch.nn.Module) else []
    if trained:
        raise ValueError(
            f"weight is a module with trainable parameters ({', '.join(trained[:3])}); expected a frozen one. Pass the weight itself, "
            "weight=module.weight, or freeze the module: module.requires_grad_(False)."
        )
    return module


def _vocabulary_of(module: Callable[[Tensor], Tensor], hidden: Tensor) -> int:
    size = getattr(module, "out_features", None)
    if isinstance(size, int):
        return size
    with torch.no_grad():
        logits = module(hidden.detach().reshape(-1, hidden.shape[-1])[:1])
    if not isinstance(logits, Tensor) or logits.dim() == 0:
        made = "a number" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise ValueError(
            f"weight is a callable that made {made} of hidden states [1, {hidden.shape[-1]}]; expected logits [1, V]. Pass the forward of "
            "the model's head."
        )
    return logits.shape[-1]


def _checked_bytes(name: str, value: int | None, *, least: int) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, numbers.Integral)):
        raise TypeError(f"{name} is {value!r} ({type(value).__name__}); expected an int, a number of bytes, or None.")
    if value < least:
        raise ValueError(f"{name} is {value}; expected at least {least}. Leave it out to have it chosen by the free memory.")
    return int(value)
