"""Registration of the Triton kernels for the operators of this folder, on CUDA (which is also ROCm's device name in PyTorch) and XPU.

Importing this module registers them. In Triton's interpreter (TRITON_INTERPRET=1) they can also compute on CPU tensors:
interpreted_on_cpu() registers them in place of the C++ kernels. This module guards the device and allocates the gradients; the launchers in
kernels/fused do neither.
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

import grpo_fast.ops.kept_products  # noqa: F401  defines operators
from grpo_fast.kernels.grpo_loss import PolicyTensors, grpo_loss_fwd
from grpo_fast.kernels.kept_products import add_kept_weight_gradient, kept_hidden_gradient, kept_logits
from grpo_fast.kernels.scale import scale_
from grpo_fast.kernels.token_logprobs import LogitRows, Scoring, token_logprobs_bwd, token_logprobs_fwd
from grpo_fast.ops.grpo_loss import GrpoLossArguments
from grpo_fast.ops.library import LIBRARY
from grpo_fast.ops.rounding import rounded_
from grpo_fast.ops.token_logprobs import RowStatistics, TokenLogprobsArguments

__all__ = ["INTERPRETED", "interpret_on_cpu", "interpreted_on_cpu"]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads the variable when the kernels are defined, by the imports above


def _rows(logits: Tensor, token_ids: Tensor, mask: Tensor) -> LogitRows:
    return LogitRows(logits if logits.stride(-1) == 1 else logits.contiguous(), token_ids, mask)


def _scoring(given: TokenLogprobsArguments | GrpoLossArguments) -> Scoring:
    return Scoring(given.temperatures, given.temperature, given.softcap, given.logit_scale)


def _new_gradient(logits: Tensor) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _without_flag(arguments: tuple[Any, ...], count: int) -> tuple[tuple[Any, ...], bool]:
    """Return the first ``count`` arguments, and bfloat16_gradient after them, which PyTorch does not pass on if it has its default."""
    return arguments[:count], any(arguments[count:])


def _token_logprobs(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    given = TokenLogprobsArguments(*arguments)
    return token_logprobs_fwd(_rows(logits, given.token_ids, given.mask), _scoring(given))


def _token_logprobs_backward(grad_logprobs: Tensor, grad_entropy: Tensor, logits: Tensor, *arguments: Any) -> Tensor:
    return _logits_gradient(grad_logprobs, grad_entropy, logits, *arguments, inplace=False)


def _token_logprobs_backward_inplace(grad_logprobs: Tensor, grad_entropy: Tensor, logits: Tensor, *arguments: Any) -> None:
    others, bfloat16_gradient = _without_flag(arguments, len(TokenLogprobsArguments._fields) + len(RowStatistics._fields))
    _require_unit_stride(logits)
    _logits_gradient(grad_logprobs, grad_entropy, logits, *others, inplace=True)
    if bfloat16_gradient:
        rounded_(logits, torch.bfloat16)


def _logits_gradient(grad_logprobs: Tensor, grad_entropy: Tensor, logits: Tensor, *arguments: Any, inplace: bool) -> Tensor:
    *of_tokens, logprobs, entropy, lse = arguments
    given = TokenLogprobsArguments(*of_tokens)
    rows = _rows(logits, given.token_ids, given.mask)
    return token_logprobs_bwd(grad_logprobs, grad_entropy, rows, _scoring(given), logprobs, entropy, lse, inplace=inplace)


def _grpo_loss(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *others, want_gradient = arguments
    gradient = _new_gradient(logits) if want_gradient else None
    out = _loss(logits, GrpoLossArguments(*others), gradient)
    return *out, logits.new_empty(0) if gradient is None else gradient


def _grpo_loss_inplace(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    given, bfloat16_gradient = _without_flag(arguments, len(GrpoLossArguments._fields))
    _require_unit_stride(logits)
    out = _loss(logits, GrpoLossArguments(*given), gradient=logits)
    if bfloat16_gradient:
        rounded_(logits, torch.bfloat16)
    return out


def _loss(logits: Tensor, given: GrpoLossArguments, gradient: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, scoring = _rows(logits, given.token_ids, given.mask), _scoring(given)
    policy = PolicyTensors(
        given.advantages, given.weights, given.entropy_weights, given.old_logprobs, given.ref_logprobs, given.rollout_weights
    )
    return grpo_loss_fwd(rows, scoring, policy, given.loss_scale, given.settings, given.only_active, gradient)


def _scale_gradient(gradient: Tensor, upstream: Tensor) -> None:
    """Compute gradient *= upstream: by the Triton kernel, which skips a factor of 1, if the rows are contiguous, else by PyTorch's mul_."""
    if gradient.is_contiguous() or (gradient.dim() == 3 and gradient.stride(2) == 1):
        scale_(gradient, upstream)
    else:
        gradient.mul_(upstream)


def _require_unit_stride(logits: Tensor) -> None:
    if logits.stride(-1) != 1:
        raise ValueError(f"in place: logits have strides {logits.stride()}; expected them contiguous over the vocabulary.")


def _on_its_device(launch: Callable[..., Any]) -> Callable[..., Any]:
    """Make the device of the tensors the current one, because Triton launches on the current device and its current stream."""

    @functools.wraps(launch)
    def guarded(*arguments: Any) -> Any:
        device = next(x.device for x in arguments if isinstance(x, Tensor))
        with torch.get_device_module(device).device(device):
            return launch(*arguments)

    return guarded


_IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "token_logprobs": _token_logprobs,
    "token_logprobs_backward": _token_logprobs_backward,
    "token_logprobs_backward_": _token_logprobs_backward_inplace,
    "grpo_loss": _grpo_loss,
    "grpo_loss_": _grpo_loss_inplace,
    "scale_gradient_": _scale_gradient,
    "kept_logits": kept_logits,
    "kept_hidden_gradient": kept_hidden_gradient,
    "add_kept_weight_gradient_": add_kept_weight_gradient,
}

for _name, _implementation in _IMPLEMENTATIONS.items():
    for _key in ("CUDA", "XPU"):
        LIBRARY.impl(_name, _on_its_device(_implementation), _key)

_on_cpu: torch.library.Library | None = None


@contextlib.contextmanager
def interpreted_on_cpu(wanted: bool) -> Iterator[None]:
    """Run these kernels on CPU tensors in the interpreter inside the ``with``, in every thread of the process. It can be nested."""
    before = _on_cpu is not None
    interpret_on_cpu(wanted)
    try:
        yield
    finally:
        interpret_on_cpu(before)


def interpret_on_cpu(wanted: bool) -> None:
    """Register the interpreted kernels for CPU tensors in place of the C++ kernels, or remove them; without the interpreter do nothing."""
    wanted = wanted and INTERPRETED
    global _on_cpu
    if wanted == (_on_cpu is not None):
        return
    if not wanted and _on_cpu is not None:
        _on_cpu._destroy()  # this restores the C++ kernels
        _on_cpu = None
        return
    _on_cpu = torch.library.Library("grpo_fast", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*verrid")  # overriding is intended
        for name, implementation in _IMPLEMENTATIONS.items():
            _on_cpu.impl(name, implementation, "CPU")
