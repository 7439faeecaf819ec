"""Weights as sharded training leaves them, made whole for the head."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor

__all__ = ["gathered"]


def gathered(x: Tensor) -> Tensor:
    """A DTensor (FSDP2, tensor parallelism) as one tensor; its gradient goes back to the shards."""
    return x.full_tensor() if isinstance(x, DTensor) else x
