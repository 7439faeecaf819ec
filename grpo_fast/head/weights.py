"""Weights as sharded training leaves them, made whole for the head."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = ["gathered", "is_partitioned", "is_quantised", "unpartitioned"]


def gathered(x: Tensor) -> Tensor:
    """A DTensor (FSDP2, tensor parallelism) as one tensor. Its gradient goes back to the shards as the mean over the processes: what FSDP
    does where each has other data, and the same number where all have the same.

    Raises:
        ValueError: a parameter that DeepSpeed's third stage has partitioned: its gradient would have nowhere to go.
    """
    if is_partitioned(x):
        raise ValueError(
            "weight is partitioned by DeepSpeed's third stage; expected it whole. Call linear_loss_from, which runs the model and finds "
            "its weight, or keep it whole until backward is done: with deepspeed.zero.GatheredParameters([weight])."
        )
    if type(x) in (Tensor, torch.nn.Parameter):
        return x
    from torch.distributed.tensor import DTensor, Partial  # here: a second of imports

    if not isinstance(x, DTensor):
        return x
    whole = x.full_tensor(grad_placements=[Partial()] * x.device_mesh.ndim)
    if whole.requires_grad and torch.is_grad_enabled():
        processes = math.prod(x.device_mesh.shape)
        whole.register_hook(lambda gradient: gradient / processes)
    return whole


def is_partitioned(x: object) -> bool:
    """Whether x is a parameter of which DeepSpeed's third stage has left this process a part."""
    return hasattr(x, "ds_id") and isinstance(x, Tensor) and x.numel() == 0


def is_quantised(x: object) -> bool:
    """Whether x keeps its numbers in tensors of other types, as torchao's weights do: a matrix for its module's forward alone."""
    return type(x) not in (Tensor, torch.nn.Parameter) and is_traceable_wrapper_subclass(x) and not hasattr(x, "device_mesh")


def unpartitioned(x: Tensor) -> Tensor:
    """Such a parameter whole, for a model that uses it itself in the same backward: then DeepSpeed has gathered it once more when its
    gradient arrives, of which it takes the mean over the processes. Other tensors as they are."""
    if not is_partitioned(x):
        return x
    import deepspeed

    with deepspeed.zero.GatheredParameters([x]):
        return x.view_as(x)  # which keeps the memory for as long as somebody uses it
