"""Evaluations of a custom surrogate that show whether it treats each token by itself, and whether it needs an advantage."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

__all__ = ["depends_on_other_tokens", "largest_without_advantage", "probe_arguments"]

POINTS = 64
TOLERANCE = 1e-3  # vectorised and scalar code round differently; what mixes tokens differs by far more

Call = Callable[[Mapping[str, Tensor]], Tensor]


def probe_arguments(names: Sequence[str]) -> dict[str, Tensor]:
    """Return random inputs of a surrogate, float32 [POINTS] on the CPU: ratios from 1e-4 to 1e4, most of them near 1."""
    generator = torch.Generator().manual_seed(0)

    def normal() -> Tensor:
        return torch.randn(POINTS, generator=generator, device="cpu", dtype=torch.float32)

    spread = torch.tensor([0.3, 0.3, 1.0, 3.0], device="cpu").repeat(POINTS // 4)
    log_ratio, logprobs = (normal() * spread).clamp(-9, 9), -normal().exp()
    known = {
        "ratio": log_ratio.exp(),
        "advantages": normal(),
        "logprobs": logprobs,
        "old_logprobs": logprobs - log_ratio,
        "ref_logprobs": logprobs - normal() * spread,
        "rollout_weights": (normal() * 0.3).exp(),
        "entropy": normal().exp(),
    }
    return {name: known[name] if name in known else normal() for name in names}


@torch.no_grad()
def depends_on_other_tokens(call: Call, arguments: Mapping[str, Tensor]) -> float:
    """Return by how much losses of tokens change if only every second token is given; 0 if it is no more than rounding."""
    whole = call(arguments)
    parts = [call({name: x[first::2].contiguous() for name, x in arguments.items()}) for first in (0, 1)]
    largest = 0.0
    for first, part in enumerate(parts):
        expected = whole[first::2]
        differ = ~torch.isclose(part, expected, rtol=TOLERANCE, atol=1e-5, equal_nan=True)
        if bool(differ.any()):
            largest = max(largest, float((part - expected).abs()[differ].nan_to_num(nan=torch.inf).amax()))
    return largest


def largest_without_advantage(call: Call, arguments: Mapping[str, Tensor]) -> float:
    """Return the largest loss or derivative, in magnitude, of tokens with these inputs but an advantage of 0."""
    with torch.enable_grad():
        leaves = {name: x.detach().requires_grad_(name in ("ratio", "logprobs", "entropy")) for name, x in arguments.items()}
        leaves["advantages"] = torch.zeros_like(next(iter(leaves.values())))
        losses = call({name: leaves[name] for name in arguments})
        inputs = [x for x in leaves.values() if x.requires_grad]
        found: list[Tensor | None] = [losses.detach()]
        if inputs and losses.requires_grad:
            found += torch.autograd.grad(losses.sum(), inputs, allow_unused=True)
    sizes = torch.stack([x.abs().amax() for x in found if x is not None]) if losses.numel() else torch.zeros(1)
    return float("nan") if bool(sizes.isnan().any()) else float(sizes.amax())
