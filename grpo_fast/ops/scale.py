"""The operator ``scale_gradient_``, and ``scaled``, with which a backward pass multiplies a finished gradient by the upstream gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_fast.ops.library import LIBRARY, define

__all__ = ["scaled"]

# gradient *= upstream, in place; upstream is a 0-d tensor. The default implementation is PyTorch's mul_. For CUDA and XPU a Triton kernel
# is registered that reads the factor on the device and does not touch the gradient if the factor is 1.
define("scale_gradient_(Tensor(a!) gradient, Tensor upstream) -> ()")


def _scale_gradient_(gradient: Tensor, upstream: Tensor) -> None:
    gradient.mul_(upstream)


LIBRARY.impl("scale_gradient_", _scale_gradient_, "CompositeExplicitAutograd")


@torch.library.register_fake("grpo_fast::scale_gradient_", lib=LIBRARY)
def _scale_gradient_fake(gradient: Tensor, upstream: Tensor) -> None:
    return None


def scaled(gradient: Tensor, upstream: Tensor, *, inplace: bool) -> Tensor:
    """Return gradient * upstream, without a pass over the gradient if upstream is 1.

    On the CPU the factor is read, and the gradient itself is returned if it is 1. On a GPU reading it would synchronise: the gradient is
    scaled in place by a kernel that checks the factor, unless the graph is retained and a second backward pass needs the gradient again.

    Args:
        gradient: the gradient for an upstream gradient of 1.
        upstream: 0-d, on the same device.
        inplace: whether the gradient's memory may be overwritten.
    """
    if type(upstream) is Tensor:  # torch.compile traces with tensors of another type, whose values are unknown
        if upstream.device.type == "cpu" and upstream.item() == 1:
            return gradient
        on_gpu = upstream.device.type in ("cuda", "xpu")
        if inplace or (on_gpu and not torch._C._autograd._get_current_graph_task_keep_graph()):
            torch.ops.grpo_fast.scale_gradient_.default(gradient, upstream)
            torch.autograd.graph.increment_version(gradient)  # a second backward pass must fail rather than scale it again
            return gradient
    return gradient.mul_(upstream) if inplace else gradient * upstream
