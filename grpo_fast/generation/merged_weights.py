"""The weights of a wrapped model as a checkpoint of the inner model has them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from grpo_fast.models.unwrap import is_peft, is_sharded, without_wrappers

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

__all__ = ["merged_state_dict"]

_PREFIX = "base_model.model."  # PEFT puts it in front of the base model's names


@torch.no_grad()
def merged_state_dict(model: PreTrainedModel | nn.Module) -> dict[str, Tensor]:
    """The weights under the names of the inner model, with sharded weights gathered and a LoRA adapter merged.

    The model is not changed: merging in place and undoing it would add a rounding error in every step.

    Args:
        model: the model that is trained, wrapped (DDP, FSDP, PEFT, torch.compile) or not. Every process must call this if it is sharded.

    Returns:
        name -> weight; empty in all processes but the first if the model is sharded.

    Raises:
        ValueError: the model is under DeepSpeed, or its adapter is not LoRA.
    """
    if type(model).__name__ == "DeepSpeedEngine":
        raise ValueError(
            "model is a DeepSpeedEngine; its weights can be gathered under DDP or FSDP only. Fix: FSDP, or DeepSpeed stage 2 and below."
        )
    inner = without_wrappers(model)
    state: dict[str, Any]
    if is_sharded(model):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        state = dict(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)))
    else:
        state = dict(inner.state_dict())
    return _merge_adapter(inner, state) if is_peft(inner) else state


def _merge_adapter(model: PeftModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a PEFT model under the base model's names: W plus the active adapters' deltas, and trained copies (modules_to_save) in
    place of their originals.
    """
    deltas = _adapter_deltas(model)
    merged: dict[str, Tensor] = {}
    for key, value in state.items():
        short = key.removeprefix(_PREFIX)
        if "original_module." in short or any(f".{part}" in f".{short}" for part in ("lora_", "modules_to_save.")):
            continue
        owner, _, leaf = key.rpartition(".base_layer.")
        if owner and leaf == "weight" and owner in deltas:
            value = (value.float() + deltas[owner].to(value.device).float()).to(value.dtype)
        merged[short.replace(".base_layer.", ".")] = value
    for key, value in state.items():  # last, so that trained copies replace the originals
        short = key.removeprefix(_PREFIX)
        for adapter in model.active_adapters:
            if f".modules_to_save.{adapter}." in f".{short}":
                merged[short.replace(f"modules_to_save.{adapter}.", "")] = value
    return merged


def _adapter_deltas(model: PeftModel) -> dict[str, Tensor]:
    """Name of each adapted module -> the sum of what its active LoRA adapters add to its weight."""
    deltas: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if not hasattr(module, "get_delta_weight") or not hasattr(module, "base_layer") or module.merged:
            continue
        for adapter in module.active_adapters:
            if adapter in getattr(module, "lora_A", {}) or adapter in getattr(module, "lora_embedding_A", {}):
                delta = module.get_delta_weight(adapter)
                deltas[name] = deltas[name] + delta if name in deltas else delta
            elif not hasattr(module, "lora_A"):
                raise ValueError(f"{name} has an adapter of type {type(module).__name__}; expected LoRA, which can be merged.")
    return deltas
