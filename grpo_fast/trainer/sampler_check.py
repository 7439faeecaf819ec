"""The check of the first step: the sampler's log-probabilities must agree with the loss's, or another policy would be trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from accelerate.utils import gather_object

import grpo_fast as gf
from grpo_fast.trainer.rollout import MicroBatch
from grpo_fast.trainer.temperature_mismatch import explain_mismatch

if TYPE_CHECKING:
    from grpo_fast.trainer.grpo_trainer import GRPOTrainer

__all__ = ["check_sampler", "mean_logprob_gap"]

TOLERANCES = {torch.float32: 0.02, torch.bfloat16: 0.1, torch.float16: 0.1}  # mean difference per token, in nats


def check_sampler(trainer: GRPOTrainer, losses: Sequence[tuple[gf.GRPOOutput, MicroBatch]]) -> None:
    """Compare the sampler's log-probabilities with those of the loss. Every process must call it.

    Args:
        trainer: whose settings and model are used.
        losses: the outputs and micro-batches of the first step in this process, before the weights have changed.

    Raises:
        RuntimeError: they differ by more than ``sampler_tolerance``; the message names the temperature that would explain it.
    """
    args = trainer.args
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    tolerance = args.sampler_tolerance or TOLERANCES[dtype]
    if max(gather_object([mean_logprob_gap(losses, args.max_truncation_gain)])) <= tolerance:
        return
    rows = losses[0][1].rows
    assumed = float(rows.temperature.mean())
    mismatch = explain_mismatch(
        lambda other: trainer.model_forward.logprobs_at(trainer.model_wrapped, rows, rows.temperature * (other / assumed)),
        rows.tokens["sampler"],
        temperature=assumed,
    )
    raise RuntimeError(f"{mismatch.sentence(assumed)} Nothing was trained. (Allowed: sampler_tolerance = {tolerance:g} nats a token.)")


def mean_logprob_gap(losses: Sequence[tuple[gf.GRPOOutput, MicroBatch]], truncation_gain: float = 0.0) -> float:
    """Mean absolute difference of a token's log-probability between sampler and loss, in nats.

    Args:
        losses: the outputs and micro-batches of a step in this process.
        truncation_gain: by how much truncation (top-p) can raise the sampler's log-probability of a kept token; a difference up to this
            much is not counted.

    Returns:
        The mean over the computed tokens; 0 if the sampler reports no log-probabilities.
    """
    scored = [(out, batch.rows) for out, batch in losses if batch.on_policy and "sampler" in batch.rows.tokens]
    gaps = [(rows.tokens["sampler"] - out.logprobs)[out.active] for out, rows in scored]
    gap = torch.cat(gaps) if gaps else torch.zeros(0)
    gap = (-gap).clamp(min=0) + (gap - truncation_gain).clamp(min=0)
    return float(gap.mean()) if gap.numel() else 0.0
