"""The head of a transformers causal language model: its weight, the hidden states that it is called with, and the scale and soft cap that
the model applies to its logits. No other module of the package looks for a head or captures hidden states.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import torch
from torch import Tensor, nn

from grpo_fast.head.autograd import AutogradContext
from grpo_fast.head.weights import gathered, is_partitioned, is_quantised, unpartitioned
from grpo_fast.models.batch import ModelInputs
from grpo_fast.models.head_check import check_head, probe_values
from grpo_fast.models.unwrap import is_fsdp2, unwrap

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from transformers.utils import ModelOutput

__all__ = ["HeadArguments", "HiddenStates", "LoraAdapter", "ModelHead", "head_of", "hidden_states_of"]

_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # their names in configurations
# Names of a factor of the logits in configurations, and whether the logits are divided by it.
_SCALES = (("logit_scale", False), ("output_multiplier", False), ("lm_head_multiplier", False), ("logits_scaling", True))
_MULTIPLY_BY_LOGITS_SCALING = ("hyperclovax",)  # model types
_SCALE_NOT_OF_LOGITS = ("minicpm3", "mpt")  # model types that divide the hidden states instead, or ignore the setting

_verified: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # modules of heads that passed check_head


class HeadArguments(TypedDict):
    """The arguments of linear_grpo_loss and linear_token_logprobs that follow from the model's head."""

    weight: Tensor | Callable[[Tensor], Tensor]
    bias: Tensor | None
    softcap: float | None
    logit_scale: float
    adapter: tuple[Tensor, Tensor] | None


class LoraAdapter(NamedTuple):
    """Adds ``scale * dropout(hidden) @ a.T @ b.T`` to the logits."""

    dropout: nn.Module
    a: Tensor  # [R, D]
    b: Tensor  # [V, R]
    scale: float

    @property
    def is_random(self) -> bool:
        """Whether its dropout is active, so that its output is random."""
        return self.dropout.training and getattr(self.dropout, "p", 0) > 0


@dataclass(frozen=True)
class ModelHead:
    """How a model computes logits from its last hidden states: ``logits = f(hidden @ weight.T + bias)`` with f as in grpo_loss."""

    module: nn.Module  # called by the model with the hidden states
    weight: Tensor | nn.Module  # [V, D]; the module itself if it has no such matrix
    bias: Tensor | None  # [V]
    softcap: float | None
    logit_scale: float
    adapters: tuple[LoraAdapter, ...] = ()

    def arguments(self, hidden: Tensor) -> HeadArguments:
        """Return the arguments of linear_grpo_loss and linear_token_logprobs for these hidden states."""
        weight = unpartitioned(self.weight) if isinstance(self.weight, Tensor) else self.weight
        if isinstance(weight, Tensor) and type(weight) not in (Tensor, nn.Parameter):  # sharded: FSDP computes in the dtype of the states
            weight = weight.to(hidden.dtype)
        adapter: tuple[Tensor, Tensor] | None = None
        if self.adapters:
            adapted = [lora.dropout(hidden.to(lora.a.dtype)) @ _whole(lora.a).T * lora.scale for lora in self.adapters]
            adapter = torch.cat(adapted, -1), torch.cat([_whole(lora.b) for lora in self.adapters], -1)
        return {
            "weight": weight,
            "bias": None if self.bias is None else unpartitioned(self.bias),
            "softcap": self.softcap,
            "logit_scale": self.logit_scale,
            "adapter": adapter,
        }

    def plain_logits(self, hidden: Tensor, logits: Tensor) -> Tensor:
        """Compute ``hidden @ weight.T + bias`` with LoRA, in the dtype of ``logits``, the module's output for the same hidden states.
        Return ``logits`` unchanged if the module has no weight matrix, or if dropout makes its output random."""
        if not isinstance(self.weight, Tensor) or any(lora.is_random for lora in self.adapters):
            return logits
        bias = None if self.bias is None else _whole(self.bias).to(logits.dtype)
        out = nn.functional.linear(hidden.to(logits.dtype), _whole(self.weight).to(logits.dtype), bias)
        for lora in self.adapters:
            out = out + hidden.to(lora.a.dtype) @ _whole(lora.a).T @ _whole(lora.b).T * lora.scale
        return out


def check_model(model: object) -> None:
    """Raise a TypeError unless ``model`` is an nn.Module; a model's name is not."""
    if not isinstance(model, nn.Module):
        fix = f"Load it: AutoModelForCausalLM.from_pretrained({model!r})." if isinstance(model, str) else "Pass the model itself."
        shown = repr(model) if isinstance(model, str) else f"a {type(model).__name__}"
        raise TypeError(f"model is {shown}; expected a causal language model of transformers (an nn.Module). {fix}")


def head_of(model: nn.Module) -> ModelHead:
    """Find the head of a causal language model of transformers, bare or wrapped by PEFT, data parallelism or torch.compile.

    Soft cap and scale are read from the model's configuration (Gemma 2: ``final_logit_softcapping``; Cohere: ``logit_scale``; Granite:
    ``logits_scaling``; Falcon-H1: ``lm_head_multiplier``). LoRA on the head (PEFT) is applied separately, without a merged weight.

    Raises:
        ValueError: the model has no head, or its head is not a single matrix with bias and LoRA.

    Example:
        >>> head = head_of(model)  # doctest: +SKIP
        >>> head.softcap, head.logit_scale, tuple(head.weight.shape)  # doctest: +SKIP
        (30.0, 1.0, (256000, 2304))
    """
    check_model(model)
    base = unwrap(model)
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
    if not isinstance(weight, Tensor) or not _is_matrix(weight):  # quantised: only its forward can be used
        if adapters:
            raise ValueError(
                f"the head is a {type(inner).__name__} (quantised) with LoRA on top; expected a floating-point weight under LoRA. Leave "
                "the head out of target_modules, or do not quantise it."
            )
        return ModelHead(module, inner, None, softcap, logit_scale)
    return ModelHead(module, weight, getattr(inner, "bias", None), softcap, logit_scale, adapters)


class HiddenStates(NamedTuple):
    """The hidden states that a model's forward pass gives to its head."""

    hidden: Tensor  # [B, L, D]
    head: ModelHead
    output: ModelOutput  # of the model, with the logits of the last position only


def hidden_states_of(model: nn.Module, model_inputs: ModelInputs, *, forward: Callable[..., ModelOutput] | None = None) -> HiddenStates:
    """Run the model, and return the hidden states that it passes to its head, and the head. During the forward pass the model's own head
    computes the logits of the last position only.

    Args:
        model: bare or wrapped. Its own forward is called, so that wrappers (DistributedDataParallel, FSDP, PEFT, hooks) take effect.
        forward: called in place of the model, by code that is itself part of the wrapped model's forward. The caller is then responsible
            for the check below, because it reads values.

    Raises:
        ValueError: the model's logits do not follow from its hidden states by the head's weight, bias, soft cap and scale. This is checked
            once per head: see `check_head`.
    """
    head = head_of(model)
    unchecked = forward is None and head.module not in _verified
    with _captured_calls(head.module, probe=unchecked) as calls:
        output = (model if forward is None else forward)(**model_inputs)
    if len(calls) != 1:
        raise ValueError(
            f"{type(unwrap(model)).__name__} called its output embeddings {len(calls)} times; expected one call. Pass its logits to "
            "grpo_loss."
        )
    hidden, last = calls[0]
    if isinstance(head.weight, Tensor) and not head.weight.is_meta:
        hidden = hidden.to(head.weight.device)  # of a model that is split across devices
    if unchecked:
        with torch.no_grad():
            plain = head.plain_logits(hidden[:, -1:], last)
        check_head(type(unwrap(model)).__name__, plain, last, output.logits, softcap=head.softcap, logit_scale=head.logit_scale)
        _verified.add(head.module)
    if forward is None and (any(is_fsdp2(x) for x in (model, unwrap(model))) or is_partitioned(head.weight)):
        hidden = _BackwardByOutput.apply(hidden, output.logits)
    return HiddenStates(hidden, head, output)


@contextmanager
def _captured_calls(module: nn.Module, *, probe: bool) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Collect the module's input, and its output for the last position, the only one that it computes. The model continues with that
    output, or with `probe_values` in its place."""
    calls: list[tuple[Tensor, Tensor]] = []
    forward, of_instance = module.forward, vars(module).get("forward")  # accelerate's hooks are an attribute of the instance

    def capture(hidden: Tensor, *args: object, **kwargs: object) -> Tensor:
        if hidden.dim() != 3:
            raise ValueError(f"the head was called with a tensor of shape {list(hidden.shape)}; expected hidden states [B, L, D].")
        last = forward(hidden[:, -1:], *args, **kwargs)
        calls.append((hidden, last))
        return torch.where(torch.ones_like(last, dtype=torch.bool), probe_values(last), last) if probe else last

    module.forward = capture
    try:
        yield calls
    finally:
        del module.forward
        if of_instance is not None:
            module.forward = of_instance


class _BackwardByOutput(torch.autograd.Function):
    """The identity on the hidden states, whose backward also sends a gradient of 0 to the model's output. By that gradient FSDP2 and
    DeepSpeed detect that backward begins, and gather the parameters that they freed after the forward pass."""

    @staticmethod
    def forward(ctx: AutogradContext, hidden: Tensor, output: Tensor) -> Tensor:
        ctx.output = output.shape, output.dtype, output.device
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: AutogradContext, gradient: Tensor) -> tuple[Tensor, Tensor]:
        shape, dtype, device = ctx.output
        return gradient, torch.zeros(shape, dtype=dtype, device=device)


def _whole(x: Tensor) -> Tensor:
    return gathered(unpartitioned(x))


def _is_matrix(weight: Tensor) -> bool:
    return is_partitioned(weight) or (weight.is_floating_point() and weight.dim() == 2 and not is_quantised(weight))


def _softcap_and_scale(config: PretrainedConfig) -> tuple[float | None, float]:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    softcap = next((value for name in _SOFTCAPS if (value := getattr(text, name, None)) is not None), None)
    for name, divided in () if text.model_type in _SCALE_NOT_OF_LOGITS else _SCALES:
        value = getattr(text, name, None)
        if value is not None:
            divided = divided and text.model_type not in _MULTIPLY_BY_LOGITS_SCALING
            return softcap, 1 / value if divided else float(value)
    return softcap, 1.0


def _without_lora(module: Any) -> tuple[nn.Module, tuple[LoraAdapter, ...]]:
    """Return the base layer of a head, and the active LoRA adapters of PEFT on it."""
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
        LoraAdapter(module.lora_dropout[name], module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name])
        for name in names
    )
