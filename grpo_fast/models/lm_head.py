"""The head of a transformers causal language model: where its hidden states come from, and what it does to them."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from grpo_fast.head.api import linear_grpo_loss, linear_token_logprobs
from grpo_fast.head.weights import gathered, is_partitioned, is_quantised, unpartitioned
from grpo_fast.loss import checks
from grpo_fast.loss.api import GRPOOutput, TokenLogprobs

__all__ = ["ModelHead", "head_of", "hidden_states_of", "linear_logprobs_from", "linear_loss_from"]

_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # their names in configurations
# Names under which configurations keep a factor of the logits, and whether they are divided by it. A number that stands for none is None.
_SCALES = (("logit_scale", False), ("output_multiplier", False), ("lm_head_multiplier", False), ("logits_scaling", True))
_MULTIPLIED_ALL_THE_SAME = ("hyperclovax",)  # model types that multiply by logits_scaling
_NOT_THE_LOGITS = ("minicpm3", "mpt")  # model types that divide the hidden states instead, or do nothing

# Largest difference between a model's own logits and ours: of the product relative to the largest logit, of what follows it relative to
# each logit.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 4e-2, torch.float16: 1e-2}
_LARGEST_PROBE = 1000.0

_verified: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@dataclass(frozen=True)
class ModelHead:
    """What a model does to its last hidden states: ``logits = f(hidden @ weight.T + bias)`` with f as in grpo_loss."""

    module: nn.Module  # called by the model with the hidden states
    weight: Tensor | nn.Module  # [V, D]; the module itself where it has no such matrix
    bias: Tensor | None  # [V]
    softcap: float | None
    logit_scale: float
    adapters: tuple[tuple[nn.Module, Tensor, Tensor, float], ...] = ()  # LoRA: dropout, A [R, D], B [V, R], scale

    def arguments(self, hidden: Tensor) -> dict[str, Any]:
        """Of linear_grpo_loss and linear_token_logprobs, for these hidden states."""
        weight = unpartitioned(self.weight) if isinstance(self.weight, Tensor) else self.weight
        if isinstance(weight, Tensor) and type(weight) not in (Tensor, nn.Parameter):  # sharded: FSDP computes in the type of the states
            weight = weight.to(hidden.dtype)
        bias = None if self.bias is None else unpartitioned(self.bias)
        out: dict[str, Any] = {"weight": weight, "bias": bias, "softcap": self.softcap, "logit_scale": self.logit_scale}
        if self.adapters:
            adapted = [dropout(hidden.to(a.dtype)) @ _whole(a).T * scale for dropout, a, _, scale in self.adapters]
            out["adapter"] = (torch.cat(adapted, -1), torch.cat([_whole(b) for _, _, b, _ in self.adapters], -1))
        return out


def head_of(model: nn.Module) -> ModelHead:
    """Find the head of a causal language model of transformers, bare or wrapped by PEFT, DistributedDataParallel or torch.compile.

    Soft cap and scale are read from the model's configuration (Gemma 2: ``final_logit_softcapping``; Cohere: ``logit_scale``; Granite:
    ``logits_scaling``; Falcon-H1: ``lm_head_multiplier``). LoRA on the head (PEFT) is taken apart, so that its merged weight is never made.

    Raises:
        ValueError: the model has no head, or one that is more than a matrix.

    Example:
        >>> head = head_of(model)  # doctest: +SKIP
        >>> head.softcap, head.logit_scale, tuple(head.weight.shape)  # doctest: +SKIP
        (30.0, 1.0, (256000, 2304))
    """
    base = _unwrapped(model)
    get = getattr(base, "get_output_embeddings", None)
    module = get() if callable(get) else None
    if module is None:
        raise ValueError(
            f"model is a {type(base).__name__} without output embeddings; expected a causal language model of transformers. Pass its "
            "logits to grpo_loss, or hidden states and weight to linear_grpo_loss."
        )
    inner, adapters = _without_lora(module)
    softcap, logit_scale = _softcap_and_scale(base.config)
    weight: Tensor | nn.Module = getattr(inner, "weight", inner)
    if not isinstance(weight, Tensor) or not _is_matrix(weight):  # quantised: its forward is all it offers
        if adapters:
            raise ValueError(
                f"the head is a {type(inner).__name__} (quantised) with LoRA on top; expected a floating-point weight under LoRA. Leave "
                "the head out of target_modules, or do not quantise it."
            )
        return ModelHead(module, inner, None, softcap, logit_scale)
    return ModelHead(module, weight, getattr(inner, "bias", None), softcap, logit_scale, adapters)


def hidden_states_of(model: nn.Module, model_inputs: dict[str, Any]) -> tuple[Tensor, ModelHead]:
    """What the model feeds to its head for these inputs, [B, L, D], and the head. The model's own forward is called, so that whatever
    wraps it (DistributedDataParallel, FSDP, PEFT, hooks) does its work; only the head inside passes its input out, and makes logits of the
    last position alone.

    Raises:
        ValueError: the model's logits are not what its head's weight, bias, soft cap and scale make of the hidden states. That is looked at
            once per model: the product at one position of each row, and what follows it on numbers from -1000 to 1000 in place of logits,
            since those of a model at the beginning of its training are too small to show a soft cap.
    """
    head = head_of(model)
    known = head.module in _verified
    with _passing_out(head.module, probing=not known) as caught:
        output = model(**model_inputs)
    if len(caught) != 1:
        raise ValueError(
            f"{type(_unwrapped(model)).__name__} called its output embeddings {len(caught)} times; expected one call. Pass its logits to "
            "grpo_loss."
        )
    hidden, last = caught[0]
    if not known:
        _verify(model, head, hidden[:, -1:], last, output.logits)
        _verified.add(head.module)
    if any(_is_fsdp(x) for x in (model, _unwrapped(model))) or is_partitioned(head.weight):
        hidden = _BackwardByOutput.apply(hidden, output.logits)
    return hidden, head


def linear_loss_from(
    model: nn.Module,
    model_inputs: Mapping[str, Any],
    token_ids: Tensor,  # int64 [B, T] or [L]
    advantages: Tensor,  # [B], [B, T] or [L]
    **options: Any,
) -> GRPOOutput:
    """linear_grpo_loss of a transformers causal language model: runs it up to its head, and the head by chunks.

    Args:
        model: bare or wrapped (PEFT, DistributedDataParallel, FSDP2, DeepSpeed, whose ``engine.backward(out.loss)`` then takes the loss).
        model_inputs: what the model is called with: ``input_ids`` [B, P + T], ``attention_mask`` and whatever else it wants. Positions
            follow the attention mask unless ``position_ids`` are given, so that padding on the left does not shift them.
        token_ids: [B, T]: the last T tokens of ``input_ids``, each scored by the position before it. [L], with packed ``input_ids`` [1, L]:
            ``token_ids[i]`` is scored by position i, so shift them yourself and mask what is not to be scored.
        advantages: one per sequence or per token.
        options: as of linear_grpo_loss, but for softcap, logit_scale, bias and adapter, which are the model's.

    Returns:
        GRPOOutput(loss, logprobs, entropy, active, metrics), as of grpo_loss.

    Raises:
        TypeError, ValueError: names the argument, what it was, what was expected and the cure; or the model has no head that is known here.

    Example:
        >>> out = linear_loss_from(model, {"input_ids": ids, "attention_mask": mask}, ids[:, -8:], advantages)  # doctest: +SKIP
        >>> out.loss.backward()  # doctest: +SKIP
    """
    hidden, arguments = _scored(model, model_inputs, token_ids, options)
    weight = arguments.pop("weight")
    return linear_grpo_loss(hidden, weight, token_ids, advantages, **arguments, **options)


def linear_logprobs_from(
    model: nn.Module,
    model_inputs: Mapping[str, Any],
    token_ids: Tensor,  # int64 [B, T] or [L]
    **options: Any,
) -> TokenLogprobs:
    """linear_token_logprobs of a transformers causal language model.

    Args:
        model, model_inputs, token_ids: as of linear_loss_from.
        options: as of linear_token_logprobs, but for softcap, logit_scale, bias and adapter, which are the model's.

    Returns:
        TokenLogprobs(logprobs, entropy), as of token_logprobs.

    Raises:
        TypeError, ValueError: as of linear_loss_from.
    """
    hidden, arguments = _scored(model, model_inputs, token_ids, options)
    weight = arguments.pop("weight")
    return linear_token_logprobs(hidden, weight, token_ids, **arguments, **options)


def _scored(model: nn.Module, model_inputs: Mapping[str, Any], token_ids: Tensor, options: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    checks.tensor("token_ids", token_ids, like=None, floating=False)
    if token_ids.dim() not in (1, 2):
        raise ValueError(f"token_ids has shape {list(token_ids.shape)}; expected [B, T], or [L] with packed input_ids [1, L].")
    if not isinstance(model_inputs, Mapping):
        raise TypeError(
            f"model_inputs is a {type(model_inputs).__name__}; expected a dict of what the model is called with: "
            "{'input_ids': input_ids, 'attention_mask': attention_mask}."
        )
    if "labels" in model_inputs:
        raise ValueError("model_inputs has labels; expected none: the model's own loss would want all logits. Leave them out.")
    for name in ("softcap", "logit_scale", "bias", "adapter"):
        if name in options:
            raise ValueError(f"{name} was given; expected it to be left out: it is read from the model. Or call linear_grpo_loss yourself.")
    packed = token_ids.dim() == 1
    inputs = _completed(model, model_inputs, None if packed else token_ids.shape[1] + 1)
    hidden, head = hidden_states_of(model, inputs)
    length = hidden.shape[1]
    if packed:
        if hidden.shape[0] != 1 or length != token_ids.shape[0]:
            raise ValueError(
                f"token_ids has shape {list(token_ids.shape)} and the model gave hidden states {list(hidden.shape)}; expected packed "
                "input_ids [1, L] with token_ids [L]."
            )
        hidden = hidden.squeeze(0)
    elif length < token_ids.shape[1] + 1:
        raise ValueError(
            f"token_ids has {token_ids.shape[1]} tokens a row and input_ids {length}; expected at least one more in input_ids, since the "
            "first token is scored by the position before it. Put the prompt, or a begin token, in front."
        )
    else:
        hidden = hidden[:, length - token_ids.shape[1] - 1 :]
    return hidden, head.arguments(hidden)


def _completed(model: nn.Module, model_inputs: Mapping[str, Any], keep: int | None) -> dict[str, Any]:
    """What the caller need not think of: no cache, positions by the attention mask, no more hidden states than are scored."""
    base = _unwrapped(model)
    known = inspect.signature(base.forward).parameters
    embeddings = getattr(getattr(base, "base_model", None), "embeddings", None)
    own_positions = hasattr(embeddings, "create_position_ids_from_input_ids")  # RoBERTa's, which begin behind the padding's
    inputs = {"use_cache": False, **model_inputs} if "use_cache" in known else dict(model_inputs)
    mask = inputs.get("attention_mask")
    if "position_ids" in known and "position_ids" not in inputs and isinstance(mask, Tensor) and mask.dim() == 2 and not own_positions:
        inputs["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)
    if keep is not None and "logits_to_keep" in known:
        inputs.setdefault("logits_to_keep", keep)
    return inputs


def _unwrapped(model: nn.Module) -> Any:
    """The transformers model inside DistributedDataParallel, torch.compile and PEFT."""
    while True:
        inner = getattr(model, "_orig_mod", getattr(model, "module", None))
        if isinstance(inner, nn.Module):
            model = inner
        elif hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            model = model.get_base_model()  # type: ignore[operator]
        else:
            return model


@contextmanager
def _passing_out(module: nn.Module, *, probing: bool) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Inside the ``with``, calling the module collects its input and its output for the last position, which is all it computes. The model
    goes on with that output, or when probing with known numbers in its place."""
    caught: list[tuple[Tensor, Tensor]] = []
    forward, of_instance = module.forward, vars(module).get("forward")  # accelerate's hooks put one there

    def collect(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if hidden.dim() != 3:
            raise ValueError(f"the head was called with a tensor of shape {list(hidden.shape)}; expected hidden states [B, L, D].")
        last = forward(hidden[:, -1:], *args, **kwargs)
        caught.append((hidden, last))
        return torch.where(torch.ones_like(last, dtype=torch.bool), _probe(last), last) if probing else last

    module.forward = collect
    try:
        yield caught
    finally:
        del module.forward
        if of_instance is not None:
            module.forward = of_instance


class _BackwardByOutput(torch.autograd.Function):
    """The hidden states as they are. Their gradient comes with a 0 for the model's output, from which FSDP2 and DeepSpeed learn that
    backward begins: what they have freed after forward would else be read as it is, which is no memory at all."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, output: Tensor) -> Tensor:
        ctx.output = output.shape, output.dtype, output.device
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        shape, dtype, device = ctx.output
        return gradient, torch.zeros(shape, dtype=dtype, device=device)


def _is_fsdp(module: object) -> bool:
    return hasattr(module, "set_requires_gradient_sync") and hasattr(module, "unshard")  # FSDPModule, without a second of imports


def _probe(last: Tensor) -> Tensor:  # [B, 1, V] -> [V]
    """Numbers small and large, of both signs."""
    return torch.linspace(-1, 1, last.shape[-1], device=last.device).pow(3).mul(_LARGEST_PROBE).to(last.dtype)


@torch.no_grad()
def _verify(model: nn.Module, head: ModelHead, hidden: Tensor, last: Tensor, logits: Tensor) -> None:
    """hidden: at the last position; last: what the head made of it; logits: what the model made of the probe."""
    what = _other_product(head, hidden, last) or _other_function(head, last, logits)
    if what:
        raise ValueError(
            f"the logits of {type(_unwrapped(model)).__name__} are not f(hidden @ weight.T + bias) with f a scale and a soft cap: {what}. "
            "Its head does something that is not known here: pass its logits to grpo_loss, or hidden states, weight, softcap and "
            "logit_scale to linear_grpo_loss."
        )


def _other_product(head: ModelHead, hidden: Tensor, last: Tensor) -> str | None:
    """How what the head made differs from the product with its weight, if it does."""
    plain, tolerance = _plain_logits(head, hidden, last).float(), _TOLERANCE.get(last.dtype, 1e-3)
    difference, size = (plain - last).abs().max().item(), last.abs().max().item()
    if difference <= tolerance * size < float("inf"):
        return None
    return f"its head differs from hidden @ weight.T + bias by up to {difference:.3g} of {size:.3g}"


def _other_function(head: ModelHead, last: Tensor, logits: Tensor) -> str | None:
    """How what the model made of the probe differs from scale and soft cap, if it does."""
    if logits.shape != last.shape:
        return f"from {list(last.shape)} of its head it made {list(logits.shape)}"
    probe, logits, tolerance = _probe(last).float(), logits.float(), _TOLERANCE.get(last.dtype, 1e-3)
    expected = probe * head.logit_scale
    if head.softcap is not None:
        expected = head.softcap * torch.tanh(expected / head.softcap)
    excess = ((logits - expected).abs() - tolerance * expected.abs()).nan_to_num(float("inf")).flatten()
    worst = int(excess.argmax())
    if excess[worst] <= 0:
        return None
    entry = worst % probe.shape[0]
    return (
        f"with softcap={head.softcap} and logit_scale={head.logit_scale:g} its head's {probe[entry]:.4g} should become "
        f"{expected[entry]:.4g}, and became {logits.flatten()[worst]:.4g}"
    )


def _plain_logits(head: ModelHead, hidden: Tensor, last: Tensor) -> Tensor:
    """``hidden @ weight.T + bias`` with LoRA; what the module itself made of it where it is all there is, or where dropout is random."""
    if not isinstance(head.weight, Tensor) or any(dropout.training and getattr(dropout, "p", 0) > 0 for dropout, *_ in head.adapters):
        return last
    bias = None if head.bias is None else _whole(head.bias).to(last.dtype)
    out = nn.functional.linear(hidden.to(last.dtype), _whole(head.weight).to(last.dtype), bias)
    for _, a, b, scale in head.adapters:
        out = out + hidden.to(a.dtype) @ _whole(a).T @ _whole(b).T * scale
    return out


def _whole(x: Tensor) -> Tensor:
    return gathered(unpartitioned(x))


def _is_matrix(weight: Tensor) -> bool:
    return is_partitioned(weight) or (weight.is_floating_point() and weight.dim() == 2 and not is_quantised(weight))


def _softcap_and_scale(config: Any) -> tuple[float | None, float]:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    softcap = next((value for name in _SOFTCAPS if (value := getattr(text, name, None)) is not None), None)
    for name, divided in () if text.model_type in _NOT_THE_LOGITS else _SCALES:
        value = getattr(text, name, None)
        if value is not None:
            divided = divided and text.model_type not in _MULTIPLIED_ALL_THE_SAME
            return softcap, 1 / value if divided else float(value)
    return softcap, 1.0


def _without_lora(module: Any) -> tuple[Any, tuple[tuple[nn.Module, Tensor, Tensor, float], ...]]:
    """A head's layer and the LoRA adapters that PEFT has put around it and that are in force."""
    saved = getattr(module, "modules_to_save", None)
    if isinstance(saved, nn.ModuleDict):  # a copy that is trained whole
        active = [name for name in module.active_adapters if name in saved]
        return (module.original_module if getattr(module, "disable_adapters", False) or not active else saved[active[0]]), ()
    if not hasattr(module, "base_layer"):
        return module, ()
    if not hasattr(module, "lora_A"):
        raise ValueError(f"the head is wrapped in a {type(module).__name__}; expected LoRA or none. Leave the head out of target_modules.")
    if module.disable_adapters or module.merged:
        return module.base_layer, ()
    names = [name for name in module.active_adapters if name in module.lora_A]
    special = [name for name in names if name in getattr(module, "lora_variant", {})]
    if special or any(getattr(module, "lora_bias", {}).get(name) for name in names):
        raise ValueError("the head has DoRA or another variant of LoRA; expected plain LoRA. Leave the head out of target_modules.")
    return module.base_layer, tuple(
        (module.lora_dropout[name], module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name]) for name in names
    )
