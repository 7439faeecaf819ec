"""The batch that every contestant gets, and what float64 says of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

import grpo_fast as gf
from grpo_fast.benchmark.arena import Arena, arena_bytes
from grpo_fast.benchmark.settings import Case
from grpo_fast.loss.reference import policy_loss, token_statistics

__all__ = ["CONFIG", "GATE_ROWS", "Batch", "batch_bytes", "expected_loss", "fill", "shared_batch", "write_truth"]

CONFIG = gf.LossConfig(loss_type="dapo")
GATE_ROWS = 16  # rows whose gradient is compared: a float64 gradient of all of them would take gigabytes

_STD = 2.5  # of the logits: an entropy of a few nats under the log of the vocabulary, as a language model's
_CHUNK = 1 << 22  # elements made at once


@dataclass(frozen=True)
class Batch:
    """What a contestant is given, and behind it what float64 says."""

    logits: Tensor  # [B, T, V]
    token_ids: Tensor  # int64 [B, T]
    mask: Tensor  # bool [B, T]
    advantages: Tensor  # float32 [B, T]
    old_logprobs: Tensor  # float32 [B, T]
    true_logprobs: Tensor  # float64 [B, T]; of the first data of a case
    true_entropy: Tensor  # float64 [GATE_ROWS]
    true_gradient: Tensor  # float64 [GATE_ROWS, V]
    gate_rows: Tensor  # int64 [GATE_ROWS], positions in the flattened batch


def _layout(case: Case) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    tokens, rows = case.batch, min(GATE_ROWS, case.rows)
    return {
        "logits": ((*tokens, case.vocabulary), case.torch_dtype),
        "token_ids": (tokens, torch.int64),
        "mask": (tokens, torch.bool),
        "advantages": (tokens, torch.float32),
        "old_logprobs": (tokens, torch.float32),
        "true_logprobs": (tokens, torch.float64),
        "true_entropy": ((rows,), torch.float64),
        "true_gradient": ((rows, case.vocabulary), torch.float64),
        "gate_rows": ((rows,), torch.int64),
    }


def batch_bytes(case: Case) -> int:
    """What shared_batch takes of an arena."""
    return sum(arena_bytes(shape, dtype) for shape, dtype in _layout(case).values())


def shared_batch(arena: Arena, case: Case) -> Batch:
    """The batch in the arena, at its current position."""
    layout = _layout(case)
    assert list(layout) == [field.name for field in fields(Batch)]
    return Batch(**{name: arena.take(shape, dtype) for name, (shape, dtype) in layout.items()})


def fill(batch: Batch, *, temperature: float, active_fraction: float, seed: int) -> None:
    """Draw the batch anew.

    A third of the tokens is likely under the policy. Half of the importance ratios lie inside the clip band, half well outside it on either
    side: rounding a log-probability to bfloat16 (up to 0.1 here) changes a ratio, but not on which side of the band it is.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, vocabulary = batch.token_ids.numel(), batch.logits.shape[-1]

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(rows, generator=generator) * (high - low) + low

    token_ids = torch.randint(vocabulary, (rows,), generator=generator)
    typical_lse = math.log(vocabulary) + (_STD / temperature) ** 2 / 2
    likely = torch.where(torch.arange(rows) % 3 == 0, temperature * (typical_lse + uniform(-1, 4)), torch.nan)
    logits, logprobs = batch.logits.view(rows, vocabulary), torch.empty(rows)
    step = max(1, _CHUNK // vocabulary)
    for first in range(0, rows, step):
        part = slice(first, min(first + step, rows))
        chunk = torch.randn(part.stop - first, vocabulary, generator=generator).mul_(_STD)
        ids = token_ids[part].unsqueeze(-1)
        at_target = torch.where(likely[part].isnan(), chunk.gather(-1, ids).squeeze(-1), likely[part])
        chunk.scatter_(-1, ids, at_target.unsqueeze(-1))
        logits[part] = chunk
        scaled = logits[part].float() / temperature
        logprobs[part] = scaled.gather(-1, ids).squeeze(-1) - scaled.logsumexp(-1)

    inside, outside = uniform(-0.08, 0.08), uniform(0.35, 0.6) * torch.where(uniform(0, 1) < 0.5, 1.0, -1.0)
    log_ratio = torch.where(uniform(0, 1) < 0.5, inside, outside)
    mask = torch.zeros(rows, dtype=torch.bool)
    mask[torch.randperm(rows, generator=generator)[: max(1, round(rows * active_fraction))]] = True
    batch.token_ids.copy_(token_ids.view_as(batch.token_ids))
    batch.mask.copy_(mask.view_as(batch.mask))
    batch.advantages.copy_((uniform(0.5, 1.5) * torch.where(uniform(0, 1) < 0.5, 1.0, -1.0)).view_as(batch.advantages))
    batch.old_logprobs.copy_((logprobs - log_ratio).view_as(batch.old_logprobs))
    # The true logprobs until write_truth replaces them by exact ones: good to 1e-5, enough for the loss of a repetition.
    batch.true_logprobs.copy_(logprobs.view_as(batch.true_logprobs))


def write_truth(batch: Batch, temperature: float) -> None:
    """Log-probabilities of every row; entropy and gradient of the gate's rows: by the reference, in float64."""
    rows, vocabulary = batch.token_ids.numel(), batch.logits.shape[-1]
    logits, token_ids = batch.logits.view(rows, vocabulary), batch.token_ids.view(rows)
    step = max(1, _CHUNK // 4 // vocabulary)
    for first in range(0, rows, step):
        part = slice(first, first + step)
        scaled = logits[part].double() / temperature
        batch.true_logprobs.view(rows)[part] = scaled.gather(-1, token_ids[part].unsqueeze(-1)).squeeze(-1) - scaled.logsumexp(-1)

    batch.gate_rows.copy_(torch.linspace(0, rows - 1, batch.gate_rows.numel()).round().long())
    for i, row in enumerate(batch.gate_rows.tolist()):
        leaf = logits[row : row + 1].double().requires_grad_()
        logprob, entropy = token_statistics(leaf, token_ids[row : row + 1], temperature)
        loss = _loss(batch, logprob, entropy, slice(row, row + 1))
        batch.true_gradient[i] = torch.autograd.grad(loss, leaf)[0].squeeze(0)
        batch.true_entropy[i] = entropy.item()


def expected_loss(batch: Batch) -> float:
    """The loss of the whole batch in float64, from the batch's true log-probabilities."""
    logprobs = batch.true_logprobs.flatten()
    return float(_loss(batch, logprobs, torch.zeros_like(logprobs), slice(None)))


def _loss(batch: Batch, logprobs: Tensor, entropy: Tensor, rows: slice) -> Tensor:
    """The specification's loss of some rows, weighted as in the whole batch."""
    return policy_loss(
        logprobs,
        entropy,
        batch.advantages.flatten()[rows].double(),
        CONFIG,
        mask=batch.mask.flatten()[rows],
        old_logprobs=batch.old_logprobs.flatten()[rows].double(),
        num_items=batch.mask.sum(),
    )[0]
