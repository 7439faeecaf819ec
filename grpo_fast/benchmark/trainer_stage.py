"""``grpo-fast bench-trainer``: the loss stage of GRPOTrainer, against the same trainer with the loss in eager PyTorch.

Timed is what happens between a prepared batch and its gradients: compute_loss (model, head, loss, metrics), backward, and the metrics read.
No generation, no optimizer. All contestants are this trainer, on one batch and one model, which has a real head on one thin layer, so that
the head is what is timed; they differ in how the loss of a micro-batch is made. Repetitions are interleaved. No time is reported unless
losses, gradients and what is logged agree.
"""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

import grpo_fast as gf
from grpo_fast.benchmark.measure import timed
from grpo_fast.benchmark.trl_stage import Settings, make_batch, make_model
from grpo_fast.models.batch import ForwardBatch
from grpo_fast.models.forward import ModelForward
from grpo_fast.ops.environment import caption, describe, load_average
from grpo_fast.trainer.config import GRPOConfig
from grpo_fast.trainer.grpo_trainer import GRPOTrainer
from grpo_fast.trainer.rollout import MicroBatch, Rollout
from grpo_fast.utils.files import check_output, write_json

__all__ = ["CONTESTANTS", "EagerForward", "app", "run"]

CONTESTANTS = {
    "fused": "fused head",
    "logits": "one-pass loss over logits",
    "eager": "eager PyTorch over logits",
}
LOGGED = ("entropy", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "ratio/mean", "ratio/max")
TOLERANCE = 1e-4  # relative, of the loss, of what is logged, and of each parameter's gradient


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
        assert num_items is not None
        packed = self.pack(model, batch)
        logits = self.logits(model, packed)
        advantages, mask = packed.per_token(batch.advantages), packed.per_token(batch.loss_mask)
        scores = (logits.float() / packed.per_token(batch.temperature)[:, None]).log_softmax(-1)
        logprobs = scores.gather(-1, packed.token_ids[:, None]).squeeze(-1)
        ratio = (logprobs - batch.tokens.get("old", logprobs.detach())).exp()
        clipped = ratio.clamp(1 - config.epsilon_low, 1 + config.epsilon_high)
        loss = (-torch.min(ratio * advantages, clipped * advantages) * mask).sum() / num_items * loss_scale
        with torch.no_grad():
            entropy = -(scores.exp() * scores).sum(-1)
            low = (ratio < 1 - config.epsilon_low) & (advantages < 0)
            high = (ratio > 1 + config.epsilon_high) & (advantages > 0)
            means = {"entropy": entropy, "clip_low": low, "clip_high": high, "clip_region": low | high, "ratio_mean": ratio.detach()}
            metrics = {name: (value * mask).sum() / mask.sum() for name, value in means.items()}
            metrics |= {"ratio_max": (ratio * mask).max(), "active_fraction": mask.float().mean(), "kl": torch.zeros(())}
        return gf.GRPOOutput(loss, logprobs.detach(), entropy, mask, metrics)


def make_trainer(settings: Settings, folder: str) -> GRPOTrainer:
    """With its defaults, in float32, for a model and a batch of these sizes."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>"))
    args = GRPOConfig(
        folder,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        num_generations=settings.group,
        per_device_train_batch_size=settings.sequences,
        max_completion_length=settings.tokens,
        gradient_checkpointing=False,
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    return GRPOTrainer(make_model(settings), lambda completions, **_: [0.0] * len(completions), args, processing_class=tokenizer)


def prepared(settings: Settings) -> MicroBatch:
    """A batch whose ratios lie on both sides of the clip band, in the trainer's own form."""
    batch = make_batch(settings)
    rows = Rollout(
        batch["prompt_ids"].tolist(),
        batch["completion_ids"].tolist(),
        torch.ones(settings.sequences),
        batch["advantages"],
        torch.ones(settings.sequences, dtype=torch.bool),
        {"old": batch["old_per_token_logps"].flatten()},
    )
    return MicroBatch(rows, settings.sequences * settings.tokens, settings.sequences, on_policy=True)


def repetition(trainer: GRPOTrainer, forward: ModelForward, batch: MicroBatch, threads: int) -> dict[str, Any]:
    """One loss stage: seconds (CPU time of the thread; wall time with several), peak_bytes above what was resident before, the loss, and
    what is logged. The gradients are left in the model.
    """
    trainer.model_forward = forward
    trainer.model.train()
    trainer.model.zero_grad(set_to_none=True)

    def stage() -> tuple[Tensor, dict[str, float]]:
        loss: Tensor = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        return loss, trainer.metrics.read()

    (loss, logged), seconds, peak = timed(stage, threads)
    trainer.metrics = type(trainer.metrics)()
    return {"seconds": seconds, "peak_bytes": peak, "loss": loss.item(), "logged": {name: logged[name] for name in LOGGED}}


def gradients(trainer: GRPOTrainer) -> dict[str, Tensor]:
    return {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}


def disagreement(answer: dict[str, Any], grads: dict[str, Tensor], eager: dict[str, Any], eager_grads: dict[str, Tensor]) -> float:
    """The largest relative difference of the loss, of what is logged, and of a gradient (by its norm, of the eager one); infinite
    if the gradients are of other parameters, or something is not a number.
    """
    if grads.keys() != eager_grads.keys() or not grads:
        return math.inf
    pairs = [(answer["loss"], eager["loss"]), *((answer["logged"][name], value) for name, value in eager["logged"].items())]
    gaps = [abs(mine - theirs) / max(abs(theirs), 1e-6) for mine, theirs in pairs]
    gaps += [((grads[name] - theirs).norm() / theirs.norm().clamp(min=1e-12)).item() for name, theirs in eager_grads.items()]
    return max(gap if math.isfinite(gap) else math.inf for gap in gaps)


def run(settings: Settings, report: Callable[[str], None]) -> dict[str, Any]:
    """Measure everything; the answer is what is written to the JSON file.

    Raises:
        RuntimeError: losses, gradients or metrics differ.
    """
    load = load_average()
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTESTANTS}
    gate = dict.fromkeys(CONTESTANTS, 0.0)
    with tempfile.TemporaryDirectory() as folder:
        report("the batch")
        trainer, batch = make_trainer(settings, folder), prepared(settings)
        fused = trainer.model_forward
        ways: dict[str, ModelForward] = {
            "fused": fused,
            "logits": ModelForward(fused.accelerator, fused.pad_token_id, packing=fused.packing, fused_head=False),
            "eager": EagerForward(fused.accelerator, fused.pad_token_id, packing=fused.packing, fused_head=False),
        }
        report("the gradients to compare with")
        eager = repetition(trainer, ways["eager"], batch, settings.threads)
        expected = {name: gradient.clone() for name, gradient in gradients(trainer).items()}
        for number in range(settings.rounds + 1):
            for name, forward in ways.items():
                report(f"round {number} of {settings.rounds}: {CONTESTANTS[name]}")
                answer = repetition(trainer, forward, batch, settings.threads)
                gate[name] = max(gate[name], disagreement(answer, gradients(trainer), eager, expected))
                if not gate[name] <= TOLERANCE:
                    raise RuntimeError(
                        f"{CONTESTANTS[name]}: loss, gradients or metrics differ from eager PyTorch's by {gate[name]:.2g} relative; "
                        f"expected {TOLERANCE:g} at most. No times are reported."
                    )
                if number:  # the first is the warm-up
                    found[name].append(answer)
    middle = {name: statistics.median(answer["seconds"] for answer in answers) for name, answers in found.items()}
    return {
        "kind": "trainer_stage",
        "machine": {**describe(), "load_average": [load, load_average()]},
        "settings": {**asdict(settings), "dtype": "float32", "clock": "thread CPU time" if settings.threads == 1 else "wall time"},
        "timed": "compute_loss, backward and the metrics of GRPOTrainer on a prepared batch; no generation, no optimizer",
        "gate": {"tolerance": TOLERANCE, "largest_relative_difference": gate},
        "results": [
            {
                "contestant": name,
                "seconds": [answer["seconds"] for answer in answers],
                "median": middle[name],
                "faster_than_eager": middle["eager"] / middle[name],
                "peak_bytes": max((answer["peak_bytes"] for answer in answers if answer["peak_bytes"] is not None), default=None),
                "loss": answers[0]["loss"],
            }
            for name, answers in found.items()
        ],
    }


_DEFAULTS = Settings(active=(1.0,))
_QUICK = Settings(sequences=4, group=2, tokens=7, width=8, vocabulary=61, active=(1.0,))
app = typer.Typer(add_completion=False)


@app.command()
def bench_trainer(
    rounds: Annotated[int, typer.Option(help="Repetitions after a warm-up.")] = _DEFAULTS.rounds,
    threads: Annotated[int, typer.Option(help="One thread is timed by its CPU time, several by the wall clock.")] = _DEFAULTS.threads,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes: does it run?")] = False,
    output: Annotated[Path, typer.Option(help="The result as JSON.")] = Path("runs/bench/trainer_cpu.json"),
) -> None:
    """Time the loss stage of GRPOTrainer against itself with an eager loss. Four minutes, 8 GiB."""
    from rich.console import Console
    from rich.table import Table

    try:
        check_output(output)
        settings = replace(_QUICK if quick else _DEFAULTS, rounds=rounds, threads=threads)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    torch.set_num_threads(threads)
    console = Console()
    with console.status("starting") as status:
        result = run(settings, status.update)
    write_json(output, result)
    table = Table(title="Loss stage of GRPOTrainer: compute_loss, backward, metrics", title_justify="left")
    for column in ("", "seconds", "faster than eager", "extra memory, MiB"):
        table.add_column(column, justify="left" if not column else "right")
    for entry in result["results"]:
        peak = math.nan if entry["peak_bytes"] is None else entry["peak_bytes"] / 2**20
        table.add_row(CONTESTANTS[entry["contestant"]], f"{entry['median']:.3g}", f"{entry['faster_than_eager']:.2f}x", f"{peak:.0f}")
    console.print(table)
    console.print(caption(result["machine"], threads))
    typer.echo(f"Every number: {output}")


if __name__ == "__main__":
    app()
