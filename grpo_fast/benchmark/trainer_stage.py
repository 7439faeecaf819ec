"""Suite ``trainer`` (``grpo-fast bench-trainer``): the loss stage of GRPOTrainer, against the same trainer with the loss in eager PyTorch.

All implementations are this trainer, on one batch and one model; they differ in how the loss of a micro-batch is computed.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import grpo_fast as gf
from grpo_fast.benchmark.eager import eager_logprobs, eager_loss
from grpo_fast.benchmark.harness.comparison import Answer, compare
from grpo_fast.benchmark.harness.measure import measure
from grpo_fast.benchmark.harness.suite import Progress, Result, Suite
from grpo_fast.benchmark.loss_stage import LossStageSettings, make_batch, make_model, make_tokenizer, print_loss_stage, trainer_arguments
from grpo_fast.models.batch import ForwardBatch
from grpo_fast.models.forward import ModelForward
from grpo_fast.trainer.config import GRPOConfig
from grpo_fast.trainer.grpo_trainer import GRPOTrainer
from grpo_fast.trainer.rollout import MicroBatch, Rollout

__all__ = ["LABELS", "SUITE", "EagerForward", "TrainerStageSettings", "run"]

LABELS = {
    "eager": "eager PyTorch over logits",
    "logits": "one-pass loss over logits",
    "fused": "fused head",
}
LOGGED = ("entropy", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "ratio/mean", "ratio/max")
TOLERANCE = 1e-4  # relative, of the loss, of what is logged, and of each parameter's gradient


@dataclass(frozen=True, kw_only=True)
class TrainerStageSettings(LossStageSettings):
    """All groups are active."""

    active: tuple[float, ...] = (1.0,)


class EagerForward(ModelForward):
    """The loss as one writes it by hand: float32 log-softmax of z/T, ratio, clip, mean, each an operation; and the trainer's metrics."""

    def loss(
        self,
        model: Any,
        batch: ForwardBatch,
        *,
        config: gf.LossConfig,
        num_items: float | Tensor | None = None,
        loss_scale: float = 1.0,
        metrics_on: str = "all",
    ) -> gf.GRPOOutput:
        packed = self.pack(model, batch)
        advantages, mask = packed.per_token(batch.advantages), packed.per_token(batch.loss_mask)
        logits, temperature = self.logits(model, packed).float(), packed.per_token(batch.temperature)[:, None]
        logprobs, entropy = eager_logprobs(logits, packed.token_ids, temperature, entropy=True)
        assert entropy is not None and num_items is not None
        old_logprobs = batch.tokens.get("old", logprobs.detach())
        loss = eager_loss(logprobs, old_logprobs, advantages, mask, tokens=num_items) * loss_scale
        with torch.no_grad():
            ratio = (logprobs - old_logprobs).exp()
            low = (ratio < 1 - config.epsilon_low) & (advantages < 0)
            high = (ratio > 1 + config.epsilon_high) & (advantages > 0)
            means = {"entropy": entropy, "clip_low": low, "clip_high": high, "clip_region": low | high, "ratio_mean": ratio}
            metrics = {name: (value * mask).sum() / mask.sum() for name, value in means.items()}
            metrics |= {"ratio_max": (ratio * mask).max(), "active_fraction": mask.float().mean(), "kl": torch.zeros(())}
        return gf.GRPOOutput(loss, logprobs.detach(), entropy, mask, metrics)


def make_trainer(settings: LossStageSettings, folder: str) -> GRPOTrainer:
    """With its defaults, in float32, for a model and a batch of these sizes."""
    args = GRPOConfig(**trainer_arguments(settings, folder))
    return GRPOTrainer(make_model(settings), lambda completions, **_: [0.0] * len(completions), args, processing_class=make_tokenizer())


def make_micro_batch(settings: LossStageSettings) -> MicroBatch:
    """A batch whose ratios lie on both sides of the clip band, in the trainer's own form."""
    batch, every = make_batch(settings), torch.ones(settings.sequences)
    ids = (batch["prompt_ids"].tolist(), batch["completion_ids"].tolist())
    rows = Rollout(*ids, every, batch["advantages"], every.bool(), {"old": batch["old_per_token_logps"].flatten()})
    return MicroBatch(rows, settings.sequences * settings.tokens, settings.sequences, on_policy=True)


def repetition(trainer: GRPOTrainer, forward: ModelForward, batch: MicroBatch, threads: int) -> Answer:
    """One loss stage. Its outputs: the loss, what is logged, and each parameter's gradient."""
    trainer.model_forward = forward
    trainer.model.train()
    trainer.model.zero_grad(set_to_none=True)

    def stage() -> tuple[Tensor, dict[str, float]]:
        loss: Tensor = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        return loss, trainer.metrics.read()

    measured = measure(stage, threads)
    loss, logged = measured.result
    trainer.metrics = type(trainer.metrics)()
    gradients = {f"gradient of {name}": p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    outputs = {"loss": loss.detach(), **{name: logged[name] for name in LOGGED}, **gradients}
    return {"seconds": measured.seconds, "peak_bytes": measured.peak_bytes, "outputs": outputs}


def run(settings: LossStageSettings, progress: Progress) -> Result:
    """Measure everything.

    Raises:
        RuntimeError: losses, gradients or metrics differ.
    """
    torch.set_num_threads(settings.threads)
    with tempfile.TemporaryDirectory() as folder:
        progress("the batch")
        trainer, batch = make_trainer(settings, folder), make_micro_batch(settings)
        fused = trainer.model_forward

        def ask(name: str, active: float) -> Answer:
            progress(LABELS[name])
            return repetition(trainer, forwards[name], batch, settings.threads)

        over_logits: dict[str, Any] = {"packing": fused.packing, "fused_head": False}
        forwards: dict[str, ModelForward] = {
            "fused": fused,
            "logits": ModelForward(fused.accelerator, fused.pad_token_id, **over_logits),
            "eager": EagerForward(fused.accelerator, fused.pad_token_id, **over_logits),
        }
        found = compare(LABELS, settings.active, settings.rounds, ask, tolerance=TOLERANCE)
    return {
        "settings": {"dtype": "float32"},
        "timed": "compute_loss, backward and the metrics of GRPOTrainer on a prepared batch; no generation, no optimizer",
        **found,
    }


SUITE = Suite(
    "bench-trainer",
    TrainerStageSettings,
    run,
    partial(print_loss_stage, labels=LABELS),
    options=("rounds", "threads"),
    quick={"sequences": 4, "group": 2, "tokens": 7, "width": 8, "vocabulary": 61},
)
