"""The Triton kernels as implementations of the operators in grpo_fast/ops/operators.py, for CUDA (which is also ROCm's name) and XPU.

Importing this module registers them. In Triton's interpreter (TRITON_INTERPRET=1) they work on CPU tensors too: interpreted_on_cpu()
puts them in the place of the C++ kernels for as long as it is wanted. The launchers know neither: here are the device guard, the
allocation of gradients, and nothing else.
"""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from grpo_fast.kernels.grpo_loss import PolicyTensors, grpo_loss_fwd
from grpo_fast.kernels.scale import scale_
from grpo_fast.kernels.token_logprobs import LogitRows, Scoring, token_logprobs_bwd, token_logprobs_fwd
from grpo_fast.ops.operators import LIBRARY

__all__ = ["INTERPRETED", "interpreted_on_cpu", "scaled_"]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # of these kernels: Triton asked the same when they were defined, just now


def _rows(logits: Tensor, token_ids: Tensor, mask: Tensor) -> LogitRows:
    return LogitRows(logits if logits.stride(2) == 1 else logits.contiguous(), token_ids, mask)


def _new_gradient(logits: Tensor) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _token_logprobs(
    logits: Tensor,
    token_ids: Tensor,
    mask: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    softcap: float,
    logit_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return token_logprobs_fwd(_rows(logits, token_ids, mask), Scoring(temperatures, temperature, softcap, logit_scale))


def _token_logprobs_backward(
    grad_logprobs: Tensor,
    grad_entropy: Tensor,
    logits: Tensor,
    token_ids: Tensor,
    mask: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    softcap: float,
    logit_scale: float,
    logprobs: Tensor,
    entropy: Tensor,
    lse: Tensor,
    *,
    inplace: bool = False,
) -> Tensor:
    rows, scoring = _rows(logits, token_ids, mask), Scoring(temperatures, temperature, softcap, logit_scale)
    return token_logprobs_bwd(grad_logprobs, grad_entropy, rows, scoring, logprobs, entropy, lse, inplace=inplace)


def _token_logprobs_backward_inplace(grad_logprobs: Tensor, grad_entropy: Tensor, logits: Tensor, *rest: Any) -> None:
    _require_unit_stride(logits)
    _token_logprobs_backward(grad_logprobs, grad_entropy, logits, *rest, inplace=True)


def _grpo_loss(
    logits: Tensor,
    token_ids: Tensor,
    mask: Tensor,
    advantages: Tensor,
    weights: Tensor,
    entropy_weights: Tensor | None,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    rollout_weights: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    softcap: float,
    logit_scale: float,
    loss_scale: float,
    settings: list[float],
    only_active: bool,
    want_gradient: bool = True,
    *,
    inplace: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, scoring = _rows(logits, token_ids, mask), Scoring(temperatures, temperature, softcap, logit_scale)
    policy = PolicyTensors(advantages, weights, entropy_weights, old_logprobs, ref_logprobs, rollout_weights)
    gradient = logits if inplace else _new_gradient(logits) if want_gradient else None
    out = grpo_loss_fwd(rows, scoring, policy, loss_scale, settings, only_active, gradient)
    return *out, logits.new_empty(0) if gradient is None else gradient


def _grpo_loss_inplace(logits: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    _require_unit_stride(logits)
    return _grpo_loss(logits, *rest, inplace=True)[:4]


def _require_unit_stride(logits: Tensor) -> None:
    if logits.stride(2) != 1:
        raise ValueError(f"in place: logits have strides {logits.stride()}; expected them contiguous over the vocabulary.")


def _on_its_device(launch: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device and its current stream: make it the logits' device."""

    @functools.wraps(launch)
    def guarded(*arguments: Any) -> Any:
        device = next(x.device for x in arguments if isinstance(x, Tensor))
        with torch.get_device_module(device).device(device):
            return launch(*arguments)

    return guarded


def scaled_(gradient: Tensor, upstream: Tensor) -> Tensor:
    """gradient *= upstream, a 0-d tensor on the same device that nobody waits for; at no cost where it is 1."""
    rows = gradient.is_contiguous() or (gradient.dim() == 3 and gradient.stride(2) == 1)
    return _on_its_device(scale_)(gradient, upstream) if rows else gradient.mul_(upstream)


_IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "token_logprobs": _token_logprobs,
    "token_logprobs_backward": _token_logprobs_backward,
    "token_logprobs_backward_": _token_logprobs_backward_inplace,
    "grpo_loss": _grpo_loss,
    "grpo_loss_": _grpo_loss_inplace,
}

for _name, _implementation in _IMPLEMENTATIONS.items():
    for _key in ("CUDA", "XPU"):
        LIBRARY.impl(_name, _on_its_device(_implementation), _key)

_on_cpu: torch.library.Library | None = None


@contextlib.contextmanager
def interpreted_on_cpu(wanted: bool) -> Iterator[None]:
    """Whether, inside the ``with``, CPU tensors are computed by these kernels in the interpreter, in every thread of the process. Nests."""
    before = _on_cpu is not None
    _place_on_cpu(wanted and INTERPRETED)
    try:
        yield
    finally:
        _place_on_cpu(before)


def _place_on_cpu(wanted: bool) -> None:
    global _on_cpu
    if wanted == (_on_cpu is not None):
        return
    if not wanted and _on_cpu is not None:
        _on_cpu._destroy()  # the C++ kernels are back
        _on_cpu = None
        return
    _on_cpu = torch.library.Library("grpo_fast", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*verrid")  # it is meant
        for name, implementation in _IMPLEMENTATIONS.items():
            _on_cpu.impl(name, implementation, "CPU")
