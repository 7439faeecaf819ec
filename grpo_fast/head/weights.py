"""Weights of sharded training, gathered for the head."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = ["gathered", "is_partitioned", "is_quantised", "unpartitioned"]


def gathered(x: Tensor) -> Tensor:
    """Gather a DTensor (FSDP2, tensor parallelism) into one tensor. The shards receive the mean of the processes' gradients, as FSDP does
    it; where all processes have the same data, that is the gradient itself.

    Raises:
        ValueError: DeepSpeed's ZeRO-3 has partitioned the parameter, so that its gradient could not be assigned.
    """
    if is_partitioned(x):
        raise ValueError(
            "weight is partitioned by DeepSpeed's third stage; expected it whole. Fix: call linear_loss_from, which runs the model and "
            "finds its weight, or gather it until backward is done: with deepspeed.zero.GatheredParameters([weight])."
        )
    if type(x) in (Tensor, torch.nn.Parameter):
        return x
    from torch.distributed.tensor import DTensor, Partial  # imported here because it takes a second

    if not isinstance(x, DTensor):
        return x
    whole = x.full_tensor(grad_placements=[Partial()] * x.device_mesh.ndim)
    if whole.requires_grad and torch.is_grad_enabled():
        processes = math.prod(x.device_mesh.shape)
        whole.register_hook(lambda gradient: gradient / processes)
    return whole


def is_partitioned(x: object) -> bool:
    """Whether DeepSpeed's ZeRO-3 has partitioned the parameter, so that this process holds a part of it."""
    return hasattr(x, "ds_id") and isinstance(x, Tensor) and x.numel() == 0


def is_quantised(x: object) -> bool:
    """Whether x is a tensor subclass that wraps tensors of other dtypes (a weight of torchao), which only its module's forward can use."""
    return type(x) not in (Tensor, torch.nn.Parameter) and is_traceable_wrapper_subclass(x) and not hasattr(x, "device_mesh")


def unpartitioned(x: Tensor) -> Tensor:
    """Gather a parameter that ZeRO-3 has partitioned; return other tensors unchanged. The model must use the parameter in the same backward
    pass too: then DeepSpeed has gathered it again when its gradient arrives, and takes the mean over the processes."""
    if not is_partitioned(x):
        return x
    import deepspeed

    with deepspeed.zero.GatheredParameters([x]):
        return x.view_as(x)  # the view keeps the gathered memory alive
