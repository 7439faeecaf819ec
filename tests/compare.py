"""How a kernel is compared with the truth, one tolerance for everywhere.

A kernel may be no further from the float64 truth than the same mathematics in plain PyTorch at the kernel's own precision, plus an
allowance tied to the type of what is compared: rounding of the result, and a few ulps of float32 for another order of summation.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Relative to the largest magnitude of the truth: rounding to the type, and 32 float32 ulps of arithmetic.
ALLOWANCE = {torch.float32: 2.0**-19, torch.float16: 2.0**-11 + 2.0**-19, torch.bfloat16: 2.0**-8 + 2.0**-19}


def of_two_ulps(logprobs: Tensor) -> float:
    """How far, relatively, two ulps of the largest log-probability move a ratio. The slack for what ratios are in: where a token has
    log p = -24, 32 ulps of the ratio are less than one of log p."""
    return 2.0**-22 * logprobs.abs().max().item() if logprobs.numel() else 0.0


def labelled(name: str) -> Callable[[str], str]:
    """For the argument ``msg`` of torch.testing.assert_close: its message, with the name of the value in front."""
    return lambda message: f"{name}: {message}"


def assert_close(actual: Tensor, truth: Tensor, naive: Tensor, what: str, scale: float | None = None, slack: float = 0.0) -> None:
    """actual, of any type, against float64 truth; naive is plain PyTorch's answer in the type of actual.

    scale is what the allowance is relative to; the truth's largest magnitude unless given, as it must be for a sum whose terms cancel.
    slack is allowed on top: what an intermediate result's rounding (bfloat16 logits), which falls differently in each, can make of it.
    """
    assert actual.shape == truth.shape, f"{what}: shape {list(actual.shape)}, expected {list(truth.shape)}"
    assert torch.isfinite(truth).all(), f"{what}: the truth itself is not finite; the test's inputs are wrong"
    assert torch.isfinite(actual).all(), f"{what}: not finite at {(~torch.isfinite(actual)).nonzero()[:3].tolist()}"
    if scale is None:
        scale = truth.abs().max().item() if truth.numel() else 0.0
    allowed = (naive.double() - truth).abs().amax().item() if truth.numel() else 0.0
    allowed += slack + ALLOWANCE[actual.dtype] * scale + torch.finfo(actual.dtype).tiny
    error = (actual.double() - truth).abs().max().item() if truth.numel() else 0.0
    assert error <= allowed, f"{what}: error {error:.3e} of {scale:.3e}, allowed {allowed:.3e}"
