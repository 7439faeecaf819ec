"""No number for a wrong result: every contestant is held to float64 on the very call that is timed."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from grpo_fast.benchmark.contestants import Result
from grpo_fast.benchmark.data import Batch

__all__ = ["Tolerance", "Verdict", "judge", "loss_is_right", "tolerance"]


@dataclass(frozen=True)
class Tolerance:
    """Largest errors that pass: absolute for logprobs and entropy (nats) and the loss (whose tokens are about 1); for a row of the gradient
    the length of its error over its own length, or over the typical length of a row where that is larger, so that a gradient that is zero
    or twice too long has the error 1."""

    logprobs: float
    loss: float
    gradient: float
    why: str


def tolerance(dtype: torch.dtype, arithmetic: str) -> Tolerance:
    """What is asked of a contestant with logits of this type, by how it computes.

    float64_sums  the promise of grpo_fast: float32 terms summed in float64, an error that does not grow with the vocabulary
    float32       plain float32 sums over the vocabulary: 1e-4 at 150,000 entries; a gradient rounded once into the type of the logits
    own           everything in the type of the logits: with bfloat16 an error of 0.1 in a log-probability, so 10 % in a ratio, and that in
                  rows of up to three times the typical size
    """
    if arithmetic == "own" and dtype != torch.float32:
        eps = torch.finfo(dtype).eps  # 2^-7 for bfloat16
        name = str(dtype).removeprefix("torch.")
        return Tolerance(16 * eps, 4 * eps, 40 * eps, f"log-probabilities in {name}, the contestant's own choice")
    gradient = 3e-4 if dtype == torch.float32 else torch.finfo(dtype).eps
    if arithmetic == "float64_sums":
        return Tolerance(1e-5, 1e-5, min(gradient, 1e-4) if dtype == torch.float32 else gradient, "float32 terms, summed in float64")
    return Tolerance(2e-4, 5e-5, gradient, "plain float32 arithmetic")


@dataclass(frozen=True)
class Verdict:
    """Errors of one call against float64, and whether they pass. An error that was not measured is None."""

    passed: bool
    logprobs: float | None
    entropy: float | None
    loss: float | None
    gradient: float | None
    gradient_rows: int  # how many rows the gradient was compared on
    tolerance: Tolerance

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which knows no NaN: an error that is not finite becomes a string."""
        return {
            name: str(value) if isinstance(value, float) and not math.isfinite(value) else value for name, value in asdict(self).items()
        }


def judge(result: Result, batch: Batch, true_loss: float, allowed: Tolerance) -> Verdict:
    """Compare what there is: every unmasked row of logprobs and the loss, the gate's rows of entropy and gradient."""
    logprobs = entropy = loss = gradient = None
    rows, mask = batch.gate_rows, batch.mask.flatten()
    if result.logprobs is not None:
        error = (result.logprobs.double() - batch.true_logprobs).abs().flatten()[mask]
        logprobs = float(error.max())
    if result.entropy is not None:
        error = (result.entropy.double().flatten()[rows] - batch.true_entropy).abs()[mask[rows]]
        entropy = float(error.max()) if error.numel() else 0.0
    if result.loss is not None:
        loss = abs(float(result.loss) - true_loss)
    if result.gradient is not None:
        got = result.gradient.flatten(0, -2)[rows].double()
        lengths = batch.true_gradient.norm(dim=-1)
        typical = lengths[lengths > 0].median() if (lengths > 0).any() else lengths.new_ones(())
        gradient = float(((got - batch.true_gradient).norm(dim=-1) / lengths.clamp(min=float(typical))).max())
    measured = [
        (logprobs, allowed.logprobs),
        (entropy, allowed.logprobs * 5),  # a sum over the vocabulary of such terms
        (loss, allowed.loss),
        (gradient, allowed.gradient),
    ]
    passed = all(error is None or error <= limit for error, limit in measured)  # NaN is not <= anything
    return Verdict(passed, logprobs, entropy, loss, gradient, rows.numel(), allowed)


def loss_is_right(loss: float, true_loss: float, allowed: Tolerance) -> bool:
    """For the repetitions, whose truth is itself float32."""
    return abs(loss - true_loss) <= allowed.loss + 2e-5
