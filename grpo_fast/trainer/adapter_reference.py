"""The reference policy of a PEFT model: the weights that training starts from, put in place of the trained ones while it is used.

A PEFT model without its adapter is the policy that training starts from only if the adapter is new and changes nothing yet. An adapter that
was trained before (by supervised fine-tuning, say) is a part of that policy.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from grpo_fast.models.unwrap import is_fsdp2, is_sharded

__all__ = ["StartingAdapter", "changes_nothing"]

_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")  # torch.compile and activation checkpointing put them into names


@torch.no_grad()
def changes_nothing(model: Any) -> bool:
    """Whether a PEFT model computes exactly what it computes with its adapters disabled.

    This is known of LoRA with a factor that is 0, as in a new adapter, with trained copies (modules_to_save) that equal their originals.
    Of any other adapter it is not known, and the answer is False.

    Args:
        model: a PEFT model, not wrapped.
    """
    if any(str(getattr(config.peft_type, "value", config.peft_type)) != "LORA" for config in model.peft_config.values()):
        return False
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if ".lora_B." in name:
            if _local(parameter).count_nonzero():
                return False
        elif ".lora_embedding_B." in name:
            first = parameters[name.replace(".lora_embedding_B.", ".lora_embedding_A.")]  # the factor of a new adapter that is 0
            if _local(parameter).count_nonzero() and _local(first).count_nonzero():
                return False
        elif ".modules_to_save." in name:
            head, tail = name.split(".modules_to_save.")
            original = parameters.get(f"{head}.original_module.{tail.partition('.')[2]}")
            if original is None or not torch.equal(_local(parameter), _local(original)):
                return False
        elif parameter.requires_grad and ".lora_A." not in name and ".lora_embedding_A." not in name:
            return False  # a bias, or the magnitude of DoRA
    return True


def _local(parameter: Tensor) -> Tensor:
    """The values of this process, of which DeepSpeed's third stage leaves none in the parameter itself."""
    return getattr(parameter, "ds_tensor", parameter)


class StartingAdapter:
    """The values that the trainable parameters of a PEFT model have before training.

    Args:
        model: the PEFT model before training, not wrapped.
        device: where to keep the values.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.values = {name: p.detach().to(device, copy=True) for name, p in _trainable(model).items()}

    @contextmanager
    def in_place(self, model: nn.Module, unwrapped: nn.Module) -> Iterator[None]:
        """Give the model these values inside the context, and its own again afterwards. Every process must enter it.

        Args:
            model: as it is called, wrapped or not.
            unwrapped: without wrappers.

        Raises:
            ValueError: the parameters are sharded in a way in which they cannot be set.
        """
        _check_sharding(model)
        parameters = _trainable(unwrapped)
        own = {name: p.detach().clone() for name, p in parameters.items()}
        try:
            _assign(model, parameters, self.values)
            yield
        finally:
            _assign(model, parameters, own)

    @torch.no_grad()
    def follow(self, model: nn.Module, unwrapped: nn.Module, alpha: float) -> None:
        """Set these values to alpha times the model's own plus (1 - alpha) times themselves."""
        _check_sharding(model)
        for name, parameter in _trainable(unwrapped).items():
            value = parameter.detach()
            whole = value.full_tensor() if hasattr(value, "full_tensor") else value
            self.values[name].lerp_(whole.to(self.values[name]), alpha)

    def load(self, values: dict[str, Tensor]) -> None:
        """Take values that were saved.

        Raises:
            ValueError: they do not belong to this model.
        """
        expected = {name: tuple(value.shape) for name, value in self.values.items()}
        found = {name: tuple(value.shape) for name, value in values.items()}
        if found != expected:
            different = sorted(set(found.items()) ^ set(expected.items()))[:2]
            raise ValueError(f"the saved reference policy has other parameters than this model's adapter ({different}); expected the same.")
        for name, value in values.items():
            self.values[name].copy_(value)


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            for wrapper in _WRAPPERS:
                name = name.replace(wrapper, "")
            found[name] = parameter
    return found


def _check_sharding(model: nn.Module) -> None:
    if is_sharded(model) and not any(is_fsdp2(module) for module in model.modules()):
        raise ValueError(
            f"beta is not 0, or a reward reads ref_logprobs, with a trained adapter in a model under {type(model).__name__}; expected "
            "FSDP2 (fsdp_version: 2), DDP, or a new adapter. Fix: merge the adapter into the model (merge_and_unload) and train a new one."
        )


@torch.no_grad()
def _assign(model: nn.Module, parameters: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        value = values[name]
        if hasattr(parameter, "device_mesh") and not hasattr(value, "device_mesh"):  # FSDP2's shards
            from torch.distributed.tensor import DTensor, distribute_tensor

            assert isinstance(parameter, DTensor)
            value = distribute_tensor(value.to(parameter.dtype), parameter.device_mesh, parameter.placements)
        parameter.copy_(value)
    for module in model.modules():
        if is_fsdp2(module):
            module.reshard()  # type: ignore[operator]  # else the next forward pass would use the values that it has gathered before
