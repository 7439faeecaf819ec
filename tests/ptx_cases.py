"""Batches for the kernels that the PTX machine runs, and the truth: the formulas in float64 with PyTorch alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from compare import assert_close
from torch import Tensor

import grpo_fast as gf

CLIP = 0.2
ENTROPY_COEF = 0.1


@dataclass
class Batch:
    """Single tokens [1, N, V] with a masked one, an advantage of 0, and a target at each edge of a row."""

    logits: Tensor
    token_ids: Tensor
    mask: Tensor
    advantages: Tensor
    old_logprobs: Tensor
    temperature: float = 0.9
    softcap: float | None = None
    entropy_coef: float = ENTROPY_COEF

    @property
    def config(self) -> gf.LossConfig:
        return gf.LossConfig(loss_type="bnpo", entropy_coef=self.entropy_coef, epsilon_low=CLIP, epsilon_high=CLIP)

    @property
    def options(self) -> dict[str, Any]:
        """Of gf.grpo_loss, behind the logits."""
        return {
            "token_ids": self.token_ids, "advantages": self.advantages, "old_logprobs": self.old_logprobs, "mask": self.mask,
            "temperature": self.temperature, "softcap": self.softcap, "config": self.config,
        }  # fmt: skip


@dataclass
class Truth:
    loss: Tensor
    logprobs: Tensor
    entropy: Tensor
    gradient: Tensor
    metrics: dict[str, float]


def batch(rows: int, vocabulary: int, dtype: torch.dtype, *, seed: int = 0, before: int = 0, after: int = 0, **options: Any) -> Batch:
    """Draw one. before, after: columns of NaN beside each row, in the memory of the logits."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.full((1, rows, before + vocabulary + after), math.nan, dtype=dtype)[..., before : before + vocabulary]
    logits.copy_(2.5 * torch.randn(1, rows, vocabulary, generator=generator))
    token_ids = torch.randint(vocabulary, (1, rows), generator=generator)
    token_ids[0, 0], token_ids[0, -1] = 0, vocabulary - 1
    mask, advantages = torch.ones(1, rows, dtype=torch.bool), torch.randn(1, rows, generator=generator)
    if rows > 2:
        mask[0, rows // 2], advantages[0, 1] = False, 0.0
    drawn = Batch(logits, token_ids, mask, advantages, torch.zeros(1, rows), **options)
    drawn.old_logprobs = truth(drawn).logprobs.float() - 0.1 * torch.randn(1, rows, generator=generator)
    return drawn


def truth(given: Batch, dtype: torch.dtype = torch.float64) -> Truth:
    """The clipped loss with an entropy bonus, mean over the unmasked tokens, by log_softmax."""
    logits = given.logits.to(dtype, copy=True).requires_grad_()
    scaled = logits if given.softcap is None else given.softcap * torch.tanh(logits / given.softcap)
    log_p = torch.log_softmax(scaled / given.temperature, -1)
    logprobs = log_p.gather(-1, given.token_ids.unsqueeze(-1)).squeeze(-1)
    entropy = -(log_p.exp() * log_p.where(log_p > -math.inf, 0.0)).sum(-1)
    ratio = torch.exp(logprobs - given.old_logprobs.to(dtype))
    surrogate = torch.minimum(ratio * given.advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * given.advantages)
    per_token = torch.where(given.mask, -surrogate - given.entropy_coef * entropy, 0.0)
    loss = per_token.sum() / given.mask.sum()
    (gradient,) = torch.autograd.grad(loss, logits)
    counted = ratio[given.mask].detach()
    metrics = {"entropy": entropy[given.mask].mean().item(), "ratio_mean": counted.mean().item(), "ratio_max": counted.max().item()}
    return Truth(loss.detach(), logprobs.detach(), entropy.detach(), gradient, metrics)


def check(given: Batch, loss: Tensor, logprobs: Tensor, entropy: Tensor, gradient: Tensor, metrics: dict[str, Tensor]) -> None:
    """Compare with the truth; the gradient row by row, and that of each target relative to itself."""
    expected, naive = truth(given), truth(given, torch.float32)
    assert_close(loss.reshape(()), expected.loss, naive.loss, "loss", scale=1 + expected.loss.abs().item())
    known = given.mask
    assert_close(logprobs.reshape(known.shape)[known], expected.logprobs[known], naive.logprobs[known], "logprobs")
    assert_close(entropy.reshape(known.shape)[known], expected.entropy[known], naive.entropy[known], "entropy")
    rows = (x.flatten(0, -2) for x in (gradient, expected.gradient, naive.gradient))
    for row, (found, true, plain) in enumerate(zip(*rows, strict=True)):
        assert_close(found, true, plain, f"gradient of row {row}")
        target, slack = given.token_ids.flatten()[row], 2.0**-21 * true.abs().max().item()
        assert_close(found[target], true[target], plain[target], f"gradient of the target of row {row}", slack=slack)
    for name, value in expected.metrics.items():
        assert abs(metrics[name].item() - value) <= 2.0**-19 * (1 + abs(value)), name
