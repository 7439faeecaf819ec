"""Checks of the argument ``impl``: whether the named GPU kernels can compute a call on this machine."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_fast.ops import extension

__all__ = ["IMPLS", "check_impl", "why_no_clusters"]

IMPLS = ("triton", "cluster")


def check_impl(impl: str, logits: Tensor, backend: str, *, one_pass: bool) -> None:
    """Raise unless the kernels named by ``impl`` can compute this call.

    Args:
        impl: ``"triton"`` or ``"cluster"``.
        backend: the backend that computes on these logits by default.
        one_pass: whether the gradient needs only one pass over the logits.

    Raises:
        ValueError: there are no kernels of this name, or they cannot compute a call with these arguments.
        RuntimeError: they cannot compute on this machine or for these logits; the message has the reason and the fix.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl is {impl!r}; expected None or one of {', '.join(map(repr, IMPLS))}.")
    if logits.dtype == torch.float64:
        raise ValueError(f"impl is {impl!r} with float64 logits; expected float32, bfloat16 or float16. Leave impl at None.")
    if impl == "triton":
        if backend != "triton":
            raise RuntimeError(
                f"impl is 'triton', but tensors on {logits.device} are computed by the backend {backend!r} here; expected a GPU's tensors "
                "and 'triton' usable: grpo_fast.backends() says what is missing. Or leave impl at None."
            )
        return
    if not one_pass:
        raise ValueError(
            "impl is 'cluster' with a loss whose gradient needs the whole sequence or other processes' vocabulary first; expected ratios "
            "of single tokens and no process_group. Leave impl at None."
        )
    if torch.compiler.is_compiling():  # the operator raises the error when it runs
        return
    if why := why_no_clusters(logits):
        raise RuntimeError(f"impl is 'cluster', but {why} Or leave impl at None.")


def why_no_clusters(logits: Tensor) -> str:
    """Return why the cluster kernels cannot compute these logits, and the fix, as a clause; "" if they can."""
    device = logits.device
    if device.type != "cuda" or torch.version.hip is not None:
        return f"the logits are on {device}; expected an NVIDIA GPU of compute capability 9.0 or newer. Move them there."
    if not extension.load():
        return f"the CUDA extension is not loaded: {extension.status().why}. {extension.status().fix}"
    if not torch._C._dispatch_has_kernel_for_dispatch_key("grpo_fast::grpo_loss_cluster", "CUDA"):
        fix = "Install a CUDA toolkit and build again with GRPO_FAST_BUILD=cuda."
        return f"the extension was built without CUDA; expected a build with nvcc. {fix}"
    try:
        longest = torch.ops.grpo_fast.cluster_row_bytes(device.index or 0)
    except RuntimeError as error:
        return f"{str(error).splitlines()[0]}."
    row = logits.shape[-1] * logits.element_size()
    if row > longest:
        return f"a row of the logits is {row:,} bytes long; expected at most {longest:,} on {device}. Use 16-bit logits."
    return ""
