"""The data of one case with their truth in float64, and the measurement of a loss with its gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_fast.benchmark.eager import CONFIG, eager_loss
from grpo_fast.benchmark.harness.gate import Verdict, row_error
from grpo_fast.benchmark.harness.measure import Measurement, measure

__all__ = ["SEQUENCES", "TEMPERATURE", "Gradients", "HeadCase", "Step", "Truth", "arguments", "compare_with_truth"]
__all__ += ["make_cases", "measure_gradients"]

SEQUENCES = 8
TEMPERATURE = 0.9
SAMPLED = 32  # rows of the gradients that are compared
_AT_ONCE = 64  # tokens whose float64 logits are there together
# Errors that pass: of the loss (whose tokens are about 1), and of a sampled row of a gradient, see row_error.
TOLERANCE = {"float32": (1e-5, 1e-3), "bfloat16": (2e-2, 6e-2)}

Step = Callable[[Tensor, Tensor], Tensor]  # (hidden [B, T, D], weight [V, D]) -> loss, differentiable


class Truth(NamedTuple):
    """In float64."""

    loss: float
    tokens: Tensor  # int64 [SAMPLED]
    d_hidden: Tensor  # [SAMPLED, D] of these tokens
    entries: Tensor  # int64 [SAMPLED], of the vocabulary
    d_weight: Tensor  # [SAMPLED, D] of these


@dataclass(frozen=True)
class HeadCase:
    """What every implementation gets."""

    hidden: Tensor  # [B, T, D]
    weight: Tensor  # [V, D]
    token_ids: Tensor  # int64 [B, T]
    advantages: Tensor  # [B], 0 for the sequences that cannot change the gradient
    old_logprobs: Tensor  # [B, T]
    mask: Tensor  # int64 [B, T]
    truth: Truth


class Gradients(NamedTuple):
    """What a step computes: the loss, and its gradients for a trainable head or a frozen one."""

    loss: float
    d_hidden: Tensor  # [N, D]
    d_weight: Tensor | None  # [V, D]


def make_cases(
    tokens: int, width: int, vocabulary: int, dtype: torch.dtype, shares: Sequence[float], seed: int, sequences: int = SEQUENCES
) -> list[HeadCase]:
    """For each share of active tokens the same random states and weights, whose logits have a standard deviation of about 1.5, and the same
    old log-probabilities, which straddle the clip band. Inactive are whole sequences, which have no advantage, as in groups whose rewards
    are all equal; what is missing to the share is masked at the end of one."""
    generator = torch.Generator().manual_seed(seed)
    length = tokens // sequences
    hidden = torch.randn(sequences, length, width, generator=generator).to(dtype)
    weight = (torch.randn(vocabulary, width, generator=generator) * 1.5 / width**0.5).to(dtype)
    token_ids = torch.randint(vocabulary, (sequences, length), generator=generator)
    advantages = torch.randn(sequences, generator=generator)
    logprobs, lse = _exact_logprobs(hidden, weight, token_ids)
    old_logprobs = (logprobs + torch.randn(token_ids.shape, generator=generator) * 0.2).float()
    cases = []
    for share in shares:
        active = round(share * tokens)
        alive = -(-active // length)
        mask = torch.ones_like(token_ids)
        mask[alive - 1, active - (alive - 1) * length :] = 0
        of_case = torch.where(torch.arange(sequences) < alive, advantages, 0)
        loss_of = (old_logprobs.double(), of_case.double()[:, None], mask)
        cases.append(
            HeadCase(hidden, weight, token_ids, of_case, old_logprobs, mask, _truth(hidden, weight, token_ids, logprobs, lse, loss_of))
        )
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
    hidden: Tensor, weight: Tensor, token_ids: Tensor, logprobs: Tensor, lse: Tensor, loss_of: tuple[Tensor, Tensor, Tensor]
) -> Truth:
    flat, ids, w = hidden.flatten(0, 1).double(), token_ids.flatten(), weight.double()
    entries = torch.cat([ids[: SAMPLED // 2], torch.arange(SAMPLED - SAMPLED // 2) * 31 % w.shape[0]])
    tokens = torch.linspace(0, ids.numel() - 1, SAMPLED).long()
    leaf = logprobs.clone().requires_grad_()
    loss = eager_loss(leaf, *loss_of)
    g = torch.autograd.grad(loss, leaf)[0].flatten() / TEMPERATURE

    def d_logits(some: Tensor, columns: Tensor) -> Tensor:
        p = (flat[some] @ w[columns].T / TEMPERATURE - lse[some, None]).exp()
        return g[some, None] * ((columns == ids[some, None]).double() - p)

    d_hidden = d_logits(tokens, torch.arange(w.shape[0])) @ w
    return Truth(loss.item(), tokens, d_hidden, entries, d_logits(torch.arange(ids.numel()), entries).T @ flat)


def arguments(case: HeadCase) -> dict[str, Any]:
    """Of linear_grpo_loss and grpo_loss."""
    return {"config": CONFIG, "old_logprobs": case.old_logprobs, "mask": case.mask, "temperature": TEMPERATURE}


def measure_gradients(step: Step, case: HeadCase, trainable: bool, threads: int) -> Measurement[Gradients]:
    """One loss and its gradients, from hidden states that are there."""
    hidden, weight = case.hidden.detach().requires_grad_(), case.weight.detach().requires_grad_(trainable)

    def run() -> Gradients:
        loss = step(hidden, weight)
        loss.backward()
        assert hidden.grad is not None, "backward gave the hidden states no gradient"
        return Gradients(loss.item(), hidden.grad.flatten(0, -2), weight.grad)

    return measure(run, threads)


def compare_with_truth(found: Gradients, truth: Truth, dtype: torch.dtype) -> Verdict:
    """How far a result is from the truth."""
    loss, gradient = TOLERANCE[str(dtype).removeprefix("torch.")]
    errors: dict[str, float | None] = {"loss": abs(found.loss - truth.loss)}
    errors["d_hidden"] = row_error(found.d_hidden[truth.tokens], truth.d_hidden)
    if found.d_weight is not None:
        errors["d_weight"] = row_error(found.d_weight[truth.entries], truth.d_weight)
    return Verdict(errors, {"loss": loss, "d_hidden": gradient, "d_weight": gradient})
