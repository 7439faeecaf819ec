"""Weights of sharded training, gathered for the head."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = ["gathered", "is_partitioned", "is_quantised", "unpartitioned"]


def gathered(x: Tensor) -> Tensor:
    """Gather a DTensor (FSDP2, tensor parallelism) into one tensor. In backward each shard receives the mean of the processes' gradients,
    as in FSDP; if all processes have the same data, the mean is the gradient itself.

    Raises:
        ValueError: DeepSpeed's ZeRO-3 has partitioned the parameter, so that its gradient could not be assigned.
    """
    if is_partitioned(x):
        raise ValueError(
            "weight is partitioned by DeepSpeed ZeRO-3; expected the full weight. Fix: call linear_loss_from, which runs the model and "
            "gathers its weight, or gather it until backward is done: with deepspeed.zero.GatheredParameters([weight])."
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
    """Whether x is a tensor subclass that wraps tensors of other dtypes (a torchao weight), which only the module's forward can use."""
    return type(x) not in (Tensor, torch.nn.Parameter) and is_traceable_wrapper_subclass(x) and not hasattr(x, "device_mesh")


def unpartitioned(x: Tensor) -> Tensor:
    """Gather a parameter that ZeRO-3 has partitioned; return other tensors unchanged. The model must use the parameter in the same backward
    pass too, so that DeepSpeed gathers it again before its gradient arrives, and takes the mean over the processes."""
    if not is_partitioned(x):
        return x
    import deepspeed

    with deepspeed.zero.GatheredParameters([x]):
        return x.view_as(x)  # the view keeps the gathered memory alive
