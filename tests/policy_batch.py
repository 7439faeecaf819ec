"""A batch as trainers that work on log-probabilities see it, with a signal: ratios on both sides of the band, a row without an advantage,
one that is masked as a whole, and what is masked poisoned on our side (other libraries need it finite)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def policy_batch(generator: torch.Generator, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    def normal(std: float) -> Tensor:
        return std * torch.randn(6, 5, generator=generator, dtype=dtype)

    mask = torch.arange(5) < torch.tensor([5, 3, 4, 5, 2, 0]).unsqueeze(1)
    logprobs = -2 + normal(0.5)
    return {
        "logprobs": logprobs,
        "old": logprobs - normal(0.4) - torch.tensor([0.35, -0.35, 0.02, 0.35, 0.1, 0.0], dtype=dtype).unsqueeze(1),
        "ref": logprobs + normal(0.5),
        "weights": normal(0.5).exp(),
        "entropy": normal(0.3).abs() + 1,
        "advantages": torch.tensor([1.3, -0.8, 0.6, -0.5, 0.0, 0.7], dtype=dtype),
        "mask": mask,
    }


def poisoned(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same with NaN under the mask's zeros."""
    return {name: x.masked_fill(~batch["mask"], float("nan")) if x.is_floating_point() and x.dim() == 2 else x for name, x in batch.items()}


def value_and_gradient(loss_of: Any, logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """loss_of takes the log-probabilities and returns a loss, or a tuple that begins with it."""
    leaf = logprobs.detach().clone().requires_grad_()
    result = loss_of(leaf)
    loss = result[0] if isinstance(result, tuple) else result
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


def assert_same(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor], mask: Tensor, tolerance: float) -> None:
    """Relative to the largest magnitude of the gradient, which the value's terms have as well."""
    (loss, gradient), (expected, expected_gradient) = ours, theirs
    scale = expected_gradient.abs().max().item()
    assert scale > 1e-3, f"a gradient of {scale:.3g} says nothing"
    assert torch.isfinite(expected_gradient).all(), "their gradient is not finite: the inputs are wrong"
    assert (gradient[~mask] == 0).all()
    assert (gradient.double() - expected_gradient.double()).abs().max().item() <= tolerance * scale
    assert abs(loss.item() - expected.item()) <= tolerance * max(abs(expected.item()), scale * mask.sum().item())
