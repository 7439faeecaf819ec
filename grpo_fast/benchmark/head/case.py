"""The data of one case with their truth in float64, and how a result is held to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grpo_fast.benchmark.contestants import readable_loss
from grpo_fast.benchmark.data import CONFIG

__all__ = ["Case", "Truth", "errors", "make_case"]

SEQUENCES = 8
TEMPERATURE = 0.9
SAMPLED = 32  # rows of the gradients that are compared
_AT_ONCE = 64  # tokens whose float64 logits are there together
# Errors that pass: of the loss (whose tokens are about 1), and of a sampled row of a gradient relative to the typical length of one. A
# gradient of zeros, and one twice too long, has the error 1.
TOLERANCE = {"float32": (1e-5, 1e-3), "bfloat16": (2e-2, 6e-2)}


@dataclass(frozen=True)
class Truth:
    """In float64."""

    loss: float
    tokens: Tensor  # int64 [SAMPLED]
    d_hidden: Tensor  # [SAMPLED, D] of these tokens
    entries: Tensor  # int64 [SAMPLED], of the vocabulary
    d_weight: Tensor  # [SAMPLED, D] of these


@dataclass(frozen=True)
class Case:
    """What every contestant gets; B = SEQUENCES, N = B * T tokens."""

    hidden: Tensor  # [B, T, D]
    weight: Tensor  # [V, D]
    token_ids: Tensor  # int64 [B, T]
    advantages: Tensor  # [B], 0 for the sequences that cannot matter
    old_logprobs: Tensor  # [B, T]
    truth: Truth


def make_case(tokens: int, width: int, vocabulary: int, dtype: torch.dtype, active: float, seed: int) -> Case:
    """Random states and weights whose logits have a standard deviation of about 1.5; old log-probabilities that straddle the clip band; a
    share 1 - active of the sequences without an advantage, as in groups whose rewards are all equal."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(SEQUENCES, tokens // SEQUENCES, width, generator=generator).to(dtype)
    weight = (torch.randn(vocabulary, width, generator=generator) * 1.5 / width**0.5).to(dtype)
    token_ids = torch.randint(vocabulary, hidden.shape[:2], generator=generator)
    advantages = torch.randn(SEQUENCES, generator=generator)
    advantages[round(active * SEQUENCES) :] = 0.0
    noise = torch.randn(token_ids.shape, generator=generator) * 0.2
    return Case(hidden, weight, token_ids, advantages, *_truth(hidden, weight, token_ids, advantages, noise))


def _truth(hidden: Tensor, weight: Tensor, token_ids: Tensor, advantages: Tensor, noise: Tensor) -> tuple[Tensor, Truth]:
    flat, ids, w = hidden.flatten(0, 1).double(), token_ids.flatten(), weight.double()
    entries = torch.cat([ids[: SAMPLED // 2], torch.arange(SAMPLED - SAMPLED // 2) * 31 % weight.shape[0]])
    tokens = torch.linspace(0, ids.numel() - 1, SAMPLED).long()
    lse, target = torch.empty_like(flat[:, 0]), torch.empty_like(flat[:, 0])
    for some in torch.arange(ids.numel()).split(_AT_ONCE):
        logits = flat[some] @ w.T / TEMPERATURE
        lse[some], target[some] = logits.logsumexp(-1), logits.gather(-1, ids[some, None]).squeeze(-1)
    logprobs = (target - lse).view(token_ids.shape).requires_grad_()
    old_logprobs = (logprobs.detach() + noise).float()
    loss = readable_loss(logprobs, old_logprobs.double(), advantages.double()[:, None], torch.ones_like(token_ids))
    (g,) = torch.autograd.grad(loss, logprobs)
    g = g.flatten() / TEMPERATURE

    def slope(some: Tensor, columns: Tensor | None) -> Tensor:  # d loss / d logits of some tokens, for some columns or all
        rows = w if columns is None else w[columns]
        number = torch.arange(w.shape[0]) if columns is None else columns
        p = (flat[some] @ rows.T / TEMPERATURE - lse[some, None]).exp()
        return g[some, None] * ((number == ids[some, None]).double() - p)

    everything = torch.arange(ids.numel())
    return old_logprobs, Truth(loss.item(), tokens, slope(tokens, None) @ w, entries, slope(everything, entries).T @ flat)


def errors(truth: Truth, loss: float, d_hidden: Tensor | None, d_weight: Tensor | None) -> dict[str, float]:
    """How far a result is from the truth."""
    assert d_hidden is not None, "backward gave the hidden states no gradient"
    out = {"loss": abs(loss - truth.loss), "d_hidden": _error(d_hidden.flatten(0, -2)[truth.tokens], truth.d_hidden)}
    if d_weight is not None:
        out["d_weight"] = _error(d_weight[truth.entries], truth.d_weight)
    return out


def _error(got: Tensor, true: Tensor) -> float:
    lengths = true.norm(dim=-1)
    typical = lengths[lengths > 0].median()
    return float(((got.double() - true).norm(dim=-1) / lengths.clamp(min=float(typical))).max())


def passes(found: dict[str, float], dtype: str) -> bool:
    """Whether every error is within the tolerance of the type; NaN is not."""
    loss, gradient = TOLERANCE[dtype]
    return all(error <= (loss if name == "loss" else gradient) for name, error in found.items())


def arguments(case: Case) -> dict[str, Any]:
    """Of linear_grpo_loss and grpo_loss."""
    return {"config": CONFIG, "old_logprobs": case.old_logprobs, "temperature": TEMPERATURE}
