"""The data of one case with their truth in float64, and how a result is held to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grpo_fast.benchmark.contestants import readable_loss
from grpo_fast.benchmark.data import CONFIG

__all__ = ["Case", "Truth", "errors", "make_cases", "passes"]

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
    mask: Tensor  # int64 [B, T]
    truth: Truth


def make_cases(tokens: int, width: int, vocabulary: int, dtype: torch.dtype, shares: Sequence[float], seed: int) -> list[Case]:
    """For each share of active tokens the same random states and weights, whose logits have a standard deviation of about 1.5, and the same
    old log-probabilities, which straddle the clip band. Inactive are whole sequences, which have no advantage, as in groups whose rewards
    are all equal; what is missing to the share is masked at the end of one."""
    generator = torch.Generator().manual_seed(seed)
    length = tokens // SEQUENCES
    hidden = torch.randn(SEQUENCES, length, width, generator=generator).to(dtype)
    weight = (torch.randn(vocabulary, width, generator=generator) * 1.5 / width**0.5).to(dtype)
    token_ids = torch.randint(vocabulary, (SEQUENCES, length), generator=generator)
    advantages = torch.randn(SEQUENCES, generator=generator)
    logprobs, lse = _exact_logprobs(hidden, weight, token_ids)
    old_logprobs = (logprobs + torch.randn(token_ids.shape, generator=generator) * 0.2).float()
    cases = []
    for share in shares:
        active = round(share * tokens)
        alive = -(-active // length)
        mask = torch.ones_like(token_ids)
        mask[alive - 1, active - (alive - 1) * length :] = 0
        of_case = torch.where(torch.arange(SEQUENCES) < alive, advantages, 0)
        given = (hidden, weight, token_ids, of_case, old_logprobs, mask)
        cases.append(Case(*given, _truth(*given, logprobs, lse)))
    return cases


def _exact_logprobs(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Of the tokens [B, T], and the log-sum-exp [N], in float64."""
    flat, ids, w = hidden.flatten(0, 1).double(), token_ids.flatten(), weight.double()
    lse, target = torch.empty_like(flat[:, 0]), torch.empty_like(flat[:, 0])
    for some in torch.arange(ids.numel()).split(_AT_ONCE):
        logits = flat[some] @ w.T / TEMPERATURE
        lse[some], target[some] = logits.logsumexp(-1), logits.gather(-1, ids[some, None]).squeeze(-1)
    return (target - lse).view(token_ids.shape), lse


def _truth(
    hidden: Tensor, weight: Tensor, token_ids: Tensor, advantages: Tensor, old_logprobs: Tensor, mask: Tensor, logprobs: Tensor, lse: Tensor
) -> Truth:
    flat, ids, w = hidden.flatten(0, 1).double(), token_ids.flatten(), weight.double()
    entries = torch.cat([ids[: SAMPLED // 2], torch.arange(SAMPLED - SAMPLED // 2) * 31 % w.shape[0]])
    tokens = torch.linspace(0, ids.numel() - 1, SAMPLED).long()
    leaf = logprobs.clone().requires_grad_()
    loss = readable_loss(leaf, old_logprobs.double(), advantages.double()[:, None], mask)
    (g,) = torch.autograd.grad(loss, leaf)
    g = g.flatten() / TEMPERATURE

    def slope(some: Tensor, columns: Tensor | None) -> Tensor:  # d loss / d logits of some tokens, for some columns or all
        rows = w if columns is None else w[columns]
        number = torch.arange(w.shape[0]) if columns is None else columns
        p = (flat[some] @ rows.T / TEMPERATURE - lse[some, None]).exp()
        return g[some, None] * ((number == ids[some, None]).double() - p)

    everything = torch.arange(ids.numel())
    return Truth(loss.item(), tokens, slope(tokens, None) @ w, entries, slope(everything, entries).T @ flat)


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
    return {"config": CONFIG, "old_logprobs": case.old_logprobs, "mask": case.mask, "temperature": TEMPERATURE}
