"""The GRPO loss as one writes it by hand in PyTorch: the baseline of every suite and, in float64, the truth of their gates."""

from __future__ import annotations

import torch
from torch import Tensor

import grpo_fast as gf

__all__ = ["CONFIG", "eager_logprobs", "eager_loss"]

CONFIG = gf.LossConfig(loss_type="dapo")


def eager_logprobs(
    logits: Tensor, token_ids: Tensor, temperature: float | Tensor, *, entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Log-softmax of z/T [..., V] and gather; the entropy if wanted, as a metric without gradient."""
    log_p = torch.log_softmax(logits / temperature, dim=-1)
    logprobs = log_p.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
    if not entropy:
        return logprobs, None
    with torch.no_grad():
        return logprobs, -(log_p.exp() * log_p).sum(-1)


def eager_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, tokens: float | Tensor | None = None) -> Tensor:
    """The clipped surrogate over the unmasked tokens, divided by ``tokens`` (None: their number); TRL's formula for loss_type="dapo" of one
    process."""
    ratio = torch.exp(logprobs - old_logprobs)
    clipped = ratio.clamp(1 - CONFIG.epsilon_low, 1 + CONFIG.epsilon_high)
    per_token = -torch.min(ratio * advantages, clipped * advantages)
    return (per_token * mask).sum() / (mask.sum().clamp(min=1) if tokens is None else tokens)
