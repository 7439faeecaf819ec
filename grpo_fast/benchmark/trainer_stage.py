"""Suite ``trainer`` (``grpo-fast bench-trainer``): the loss stage of GRPOTrainer, against the same trainer with the loss in eager PyTorch.

The loss stage of a training step is what lies between a prepared batch and its gradients. Timed are compute_loss (backbone, head, loss),
backward, and the metrics read as they are logged; no generation, no optimizer. The model has a real head on one thin layer, so the head
is what is timed. All implementations are this trainer, on one batch and one model; they differ in how a micro-batch's loss is computed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from rich.console import Console
from torch import Tensor

import grpo_fast as gf
from grpo_fast.benchmark.eager import eager_logprobs, eager_loss
from grpo_fast.benchmark.harness.gate import compare
from grpo_fast.benchmark.harness.measure import Measurement, Record, measure
from grpo_fast.benchmark.harness.suite import (
    BenchmarkSettings,
    Progress,
    Result,
    Suite,
    mebibytes,
    require,
    require_whole_groups,
    setting,
    table,
)
from grpo_fast.models.batch import ForwardBatch
from grpo_fast.models.forward import ModelForward
from grpo_fast.trainer.config import GRPOConfig
from grpo_fast.trainer.grpo_trainer import GRPOTrainer
from grpo_fast.trainer.rollout import MicroBatch, Rollout

__all__ = ["LABELS", "SUITE", "EagerForward", "LossStageSettings", "TrainerStageSettings"]
__all__ += ["make_batch", "make_model", "make_tokenizer", "measure_stage", "print_loss_stage", "run", "trainer_arguments"]

LABELS = {
    "eager": "eager PyTorch over logits",
    "logits": "one-pass loss over logits",
    "fused": "fused head",
}
LOGGED = ("entropy", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "ratio/mean", "ratio/max")
TOLERANCE = 1e-4  # relative, of the loss, of what is logged, and of each parameter's gradient
T = TypeVar("T")
_NOISE = 0.2  # nats between the old log-probabilities and the model's: ratios on both sides of the clip band


@dataclass(frozen=True, kw_only=True)
class LossStageSettings(BenchmarkSettings):
    """What is measured. With this width, the vocabulary is that of Qwen2.5-0.5B's head, which is tied to its embedding."""

    sequences: int = setting(8, "Of a batch.")
    group: int = setting(4, "Sequences of one prompt.", least=1)
    tokens: int = setting(128, "Of each completion.", least=1)
    width: int = setting(896, "Of the hidden states.", least=1)
    vocabulary: int = setting(151_936, "Rows of the head's weight.", least=2)
    active: tuple[float, ...] = setting((1.0, 0.5), "Share of groups with unequal rewards; may be repeated.")

    def __post_init__(self) -> None:
        super().__post_init__()
        whole = self.sequences >= self.group and self.sequences % self.group == 0
        require(whole, "sequences", self.sequences, f"a multiple of group, {self.group}")
        groups = self.sequences // self.group
        require_whole_groups(self.active, groups)


@dataclass(frozen=True, kw_only=True)
class TrainerStageSettings(LossStageSettings):
    """All groups are active."""

    active: tuple[float, ...] = (1.0,)


def make_model(settings: LossStageSettings) -> Any:
    """One layer and the head, random; logits with a standard deviation of about 1.5. The same in every process."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(settings.seed)
    sizes = {"vocab_size": settings.vocabulary, "hidden_size": settings.width, "intermediate_size": 2 * settings.width}
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}
    tokens = {"max_position_embeddings": settings.tokens + 1, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
    return Qwen2ForCausalLM(Qwen2Config(**sizes, **layers, **tokens, initializer_range=1.5 / settings.width**0.5))


def trainer_arguments(settings: LossStageSettings, folder: str) -> Record:
    """The arguments that both libraries' GRPOConfig take; the rest are their defaults."""
    sizes = {"num_generations": settings.group, "per_device_train_batch_size": settings.sequences}
    quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    options = {"use_cpu": True, "gradient_checkpointing": False, "max_completion_length": settings.tokens}
    return {"output_dir": folder, **sizes, **quiet, **options}


def make_tokenizer() -> Any:
    """The smallest tokenizer that a trainer accepts."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def make_batch(settings: LossStageSettings) -> dict[str, Tensor]:
    """What TRL hands to compute_loss, for all groups active."""
    model = make_model(settings)
    generator = torch.Generator().manual_seed(settings.seed)
    ids = torch.randint(2, settings.vocabulary, (settings.sequences, settings.tokens + 1), generator=generator)
    with torch.no_grad():  # sequence by sequence: the logits of all are gigabytes
        logprobs = torch.cat([eager_logprobs(model(row[None, :-1]).logits, row[None, 1:], 1.0)[0] for row in ids])
    rewards = torch.randn(settings.sequences // settings.group, settings.group, generator=generator)
    return {
        "prompt_ids": ids[:, :1],
        "prompt_mask": torch.ones_like(ids[:, :1]),
        "completion_ids": ids[:, 1:],
        "completion_mask": torch.ones_like(ids[:, 1:]),
        "advantages": ((rewards - rewards.mean(1, keepdim=True)) / rewards.std(1, keepdim=True)).flatten(),
        "num_items_in_batch": torch.tensor(settings.sequences * settings.tokens),
        "old_per_token_logps": logprobs + _NOISE * torch.randn(settings.sequences, settings.tokens, generator=generator),
    }


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
        router_scale: float = 1.0,
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


def measure_stage(trainer: Any, batch: Any, log: Callable[[], T], threads: int) -> Measurement[tuple[Tensor, T]]:
    """Run a loss stage once; ``log`` reads the metrics. The result is the loss and what ``log`` returns."""
    trainer.model.train()
    trainer.model.zero_grad(set_to_none=True)

    def stage() -> tuple[Tensor, T]:
        loss: Tensor = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        return loss, log()

    return measure(stage, threads)


def repetition(trainer: GRPOTrainer, forward: ModelForward, batch: MicroBatch, threads: int) -> Record:
    """One loss stage. Its outputs: the loss, what is logged, and each parameter's gradient."""
    trainer.model_forward = forward
    measured = measure_stage(trainer, batch, trainer.metrics.read, threads)
    loss, logged = measured.result
    trainer.metrics = type(trainer.metrics)()
    gradients = {f"gradient of {name}": p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    outputs = {"loss": loss.detach(), **{name: logged[name] for name in LOGGED}, **gradients}
    return {"seconds": measured.seconds, "peak_bytes": measured.peak_bytes, "outputs": outputs}


def print_loss_stage(result: Result, console: Console, labels: dict[str, str]) -> None:
    """The table of a loss stage: times, multiples of the baseline's, memory."""
    (faster,) = (key for key in result["results"][0] if key.startswith("faster_than"))
    rows = [
        (labels[e["implementation"]], f"{e['active']:.0%}", f"{e['median']:.3g}", f"{e[faster]:.2f}x", mebibytes(e["peak_bytes"]))
        for e in result["results"]
    ]
    columns = ("groups active", "seconds", faster.replace("_", " "), "extra memory, MiB")
    console.print(table("Loss stage: compute_loss, backward, metrics", columns, rows))


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

        over_logits: Record = {"packing": fused.packing, "fused_head": False}
        forwards: dict[str, ModelForward] = {
            "fused": fused,
            "logits": ModelForward(fused.accelerator, fused.pad_token_id, **over_logits),
            "eager": EagerForward(fused.accelerator, fused.pad_token_id, **over_logits),
        }

        def ask(name: str, active: float) -> Record:
            return repetition(trainer, forwards[name], batch, settings.threads)

        found = compare(LABELS, settings.active, settings.rounds, ask, tolerance=TOLERANCE, progress=progress)
    return {
        "settings": {"dtype": "float32"},
        "timed": "compute_loss, backward and the metrics of GRPOTrainer on a prepared batch; no generation, no optimizer",
        **found,
    }


SUITE = Suite(
    "bench-trainer",
    "Time the loss stage of GRPOTrainer against itself with an eager loss. Four minutes, 8 GiB.",
    TrainerStageSettings,
    run,
    partial(print_loss_stage, labels=LABELS),
    options=("rounds", "threads"),
    quick={"sequences": 4, "group": 2, "tokens": 7, "width": 8, "vocabulary": 61},
)
