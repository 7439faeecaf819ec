"""The check of the sampler: its log-probabilities must agree with the loss's, or another policy than the one that sampled is trained."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from accelerate.utils import gather_object
from torch import Tensor

import grpo_fast as gf
from grpo_fast.generation import SamplerError
from grpo_fast.trainer.random_forward import describe_random_forward
from grpo_fast.trainer.rollout import MicroBatch, Rollout
from grpo_fast.trainer.temperature_mismatch import explain_mismatch

if TYPE_CHECKING:
    from grpo_fast.trainer.grpo_trainer import GRPOTrainer

__all__ = ["LogprobGap", "SamplerCheck", "logprob_gap"]

logger = logging.getLogger("grpo_fast")
TOLERANCES = {torch.float32: 0.02, torch.bfloat16: 0.1, torch.float16: 0.1}  # mean difference per token, in nats
COMPARED = 4  # completions that are drawn only for the comparison
FIXES = (
    "If the sampler computes in another precision than the trainer: `vllm serve --dtype float32`, as the trainer's weights, or train with "
    "--bf16 and a server in bfloat16. If the difference is intended: a larger sampler_tolerance."
)


class LogprobGap(NamedTuple):
    """Mean absolute difference of a token's log-probability between sampler and loss, in nats, and the number of tokens compared."""

    mean: float
    tokens: int


class SamplerCheck:
    """Compares the sampler's log-probabilities with those of the loss on each on-policy step of a trainer.

    If sampling is penalised (``repetition_penalty``, ``generation_kwargs``), the log-probabilities of a rollout's tokens differ by the
    penalty. Then a few short completions are drawn without it, under the same weights, and theirs are compared.

    The first comparison stops the run before anything is trained. A later one warns at the first excess, and stops the run after
    ``sampler_tolerance_patience`` rollouts in a row, since a sampler can lose the weights during a run.

    Args:
        trainer: whose settings and model are used.
    """

    def __init__(self, trainer: GRPOTrainer) -> None:
        self.trainer = trainer
        self.done = False  # whether any token has been compared
        self.excesses = 0  # rollouts in a row whose gap was too large
        self.gap = 0.0  # of the last comparison, the largest of all processes
        self._warned = False

    def check(self, losses: Sequence[tuple[gf.GRPOOutput, MicroBatch]]) -> None:
        """Compare a step's log-probabilities. Every process must call it.

        Args:
            losses: the outputs and micro-batches of the step in this process, before the weights have changed.

        Raises:
            SamplerError: they differ by more than ``sampler_tolerance``; on the first step the message names the temperature that would
                explain it.
        """
        if not losses[0][1].on_policy or (self.done and self.trainer.args.bypass_mode):  # a later sampler may be several steps behind
            return
        rollouts, rows = self.trainer.rollouts, losses[0][1].rows
        if self.trainer.args.penalises:
            rows = self._drawn_without_penalties(rows)
            gaps = gather_object([self._gap_of_all_tokens(rows, 0.0)])
        else:
            gain = self.trainer.args.max_truncation_gain if rollouts is None else rollouts.replay.max_truncation_gain
            gaps = gather_object([logprob_gap(losses, gain)])
            if not self.done and not any(gap.tokens for gap in gaps):  # no token is in the loss: compare those of groups without advantage
                gaps = gather_object([self._gap_of_all_tokens(rows, gain)])
        if not any(gap.tokens for gap in gaps):
            return
        first, self.done = not self.done, True
        largest, tolerance = max(gap.mean for gap in gaps), self._tolerance()
        self.gap = largest
        if largest <= tolerance:
            self.excesses = 0
        elif first:
            raise SamplerError(f"{self._explain(rows)} Nothing was trained. (Allowed: sampler_tolerance = {tolerance:g} nats a token.)")
        else:
            self._exceed(largest, tolerance)

    def _exceed(self, gap: float, tolerance: float) -> None:
        self.excesses += 1
        step, patience = self.trainer.state.global_step + 1, self.trainer.args.sampler_tolerance_patience
        problem = (
            f"Step {step}: the sampler's log-probabilities differ from ours by {gap:.3g} nats a token, more than sampler_tolerance = "
            f"{tolerance:g}"
        )
        if self.excesses >= patience:
            raise SamplerError(
                f"{problem}, in {self.excesses} rollouts in a row (sampler_tolerance_patience). The sampler draws from other weights than "
                "those that are trained: was it restarted, or does something else write its weights? Fix: resume from a checkpoint before "
                f"the first of these steps. {FIXES}"
            )
        if not self._warned and self.trainer.accelerator.is_main_process:
            logger.warning("%s. The run stops after %d such rollouts in a row (sampler_tolerance_patience).", problem, patience)
        self._warned = True

    def _tolerance(self) -> float:
        args = self.trainer.args
        dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
        return args.sampler_tolerance or TOLERANCES[dtype]

    def _drawn_without_penalties(self, rows: Rollout) -> Rollout:
        """Completions of the first prompts of these rows, from softmax(z/T) itself; a sharded model needs every process."""
        prompts, temperature = rows.prompt_ids[:COMPARED], rows.temperature[:COMPARED]
        step = self.trainer.state.global_step
        drawn = self.trainer.completions.draw_unchanged(prompts, temperature.tolist(), "comparison", step)
        values = [value for each in drawn for value in each.logprobs or ()]
        lengths = [len(each.token_ids) for each in drawn]
        found = Rollout(prompts, [each.token_ids for each in drawn], temperature, torch.zeros(len(drawn)), torch.ones(len(drawn)).bool())
        if len(values) == sum(lengths):
            found.tokens["sampler"] = torch.tensor(values, dtype=torch.float32, device=self.trainer.args.device)
        return found

    def _gap_of_all_tokens(self, rows: Rollout, truncation_gain: float) -> LogprobGap:
        """The gap of these rows' tokens, whether they are in the loss or not; a sharded model needs every process."""
        if "sampler" not in rows.tokens:
            return LogprobGap(0.0, 0)
        ours = self.trainer.model_forward.logprobs_at(self.trainer.model_wrapped, rows, rows.temperature)
        return _gap(rows.tokens["sampler"] - ours, truncation_gain)

    def _explain(self, rows: Rollout) -> str:
        trainer = self.trainer
        assumed = float(rows.temperature.mean())
        mismatch = explain_mismatch(
            lambda other: trainer.model_forward.logprobs_at(trainer.model_wrapped, rows, rows.temperature * (other / assumed)),
            rows.tokens["sampler"],
            temperature=assumed,
        )
        if mismatch.assumed_gap <= self._tolerance():  # the model in evaluation mode agrees with the sampler
            return describe_random_forward(trainer.model, trainer.args, self.gap, mismatch.assumed_gap)
        sentence = mismatch.sentence(assumed)
        return sentence if mismatch.explains() else f"{sentence} {FIXES}"


def logprob_gap(losses: Sequence[tuple[gf.GRPOOutput, MicroBatch]], truncation_gain: float = 0.0) -> LogprobGap:
    """The gap between sampler and loss over the tokens that the loss has computed.

    Args:
        losses: the outputs and micro-batches of a step in this process.
        truncation_gain: by how much truncation (top-p) can raise the sampler's log-probability of a kept token; a difference up to this
            much is not counted.

    Returns:
        The gap; of no tokens if the sampler reports no log-probabilities.
    """
    scored = [(out, batch.rows) for out, batch in losses if batch.on_policy and "sampler" in batch.rows.tokens]
    differences = [(rows.tokens["sampler"] - out.logprobs)[out.active] for out, rows in scored]
    return _gap(torch.cat(differences) if differences else torch.zeros(0), truncation_gain)


def _gap(difference: Tensor, truncation_gain: float) -> LogprobGap:
    gap = (-difference).clamp(min=0) + (difference - truncation_gain).clamp(min=0)
    return LogprobGap(float(gap.mean()) if gap.numel() else 0.0, gap.numel())
