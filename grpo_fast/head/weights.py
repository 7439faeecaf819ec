"""Weights as sharded training leaves them, made whole for the head."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["gathered"]


def gathered(x: Tensor) -> Tensor:
    """A DTensor (FSDP2, tensor parallelism) as one tensor. Its gradient goes back to the shards as the mean over the processes: what FSDP
    does where each has other data, and the same number where all have the same.

    Raises:
        ValueError: a parameter that DeepSpeed's third stage has partitioned: its gradient would have nowhere to go.
    """
    if hasattr(x, "ds_id") and x.numel() == 0:
        raise ValueError(
            "weight is partitioned by DeepSpeed's third stage; expected it whole. Compute the logits in the model's own forward and call "
            "grpo_loss, or take FSDP2, whose shards are gathered here."
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
