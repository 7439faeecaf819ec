"""Suite ``trl`` (``grpo-fast bench-trl``): the loss stage of TRL's GRPOTrainer against that of this package's subclass of it.

Each trainer lives in a process of its own, all at once, and repetitions are interleaved.
"""

from __future__ import annotations

import math
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grpo_fast.benchmark.harness.gate import compare
from grpo_fast.benchmark.harness.measure import Record
from grpo_fast.benchmark.harness.suite import Progress, Result, Suite
from grpo_fast.benchmark.harness.worker import WorkerProcess
from grpo_fast.benchmark.trainer_stage import (
    LossStageSettings,
    make_batch,
    make_model,
    make_tokenizer,
    measure_stage,
    print_loss_stage,
    trainer_arguments,
)
from grpo_fast.integrations.versions import refuse_other_versions

__all__ = ["LABELS", "SUITE", "TOLERANCE", "TrlWorker", "run"]

HELP = "Time the loss stage of TRL's GRPOTrainer against this package's. Seven minutes, 8 GiB."
LABELS = {
    "stock": "TRL",
    "ours": "grpo_fast",
    "ours_active": "grpo_fast, metrics on active",
}
TOLERANCE = 1e-4  # relative, of losses, of the norm of each parameter's gradient, and of some of its entries to the largest of them
_ENTRIES = 64  # of each parameter's gradient, that are compared

SKIPPED = {
    "stock": "nothing. On the CPU it scores the prompt's positions too, so prompts have one token here, which leaves none to score.",
    "ours": (
        "the backward products of tokens without an advantage (groups whose rewards are all equal): their term of the loss is advantage "
        "times ratio, 0 at every value of the parameters as there is no KL term and no entropy bonus, and so is its gradient. Their "
        "log-probabilities and entropies are computed for the metrics, which equal TRL's."
    ),
    "ours_active": "of the same tokens the forward product too: the entropy that is logged is then the mean over the other tokens.",
}


class TrlWorker:
    """A trainer in its process, with TRL's defaults (loss_type "dapo", beta 0), in float32."""

    def __init__(self, name: str, batch: Path, settings: LossStageSettings):
        from datasets import Dataset
        from trl import GRPOConfig
        from trl import GRPOTrainer as Stock

        from grpo_fast.integrations.trl import GRPOTrainer

        self.settings = settings
        self.batch: dict[str, Tensor] = torch.load(batch)
        self.folder = tempfile.TemporaryDirectory()
        args = GRPOConfig(**trainer_arguments(self.settings, self.folder.name), bf16=False, log_level="error")
        self.trainer: Any = (Stock if name == "stock" else GRPOTrainer)(
            make_model(self.settings),
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=args,
            train_dataset=Dataset.from_list([{"prompt": ""}] * self.settings.sequences),
            processing_class=make_tokenizer(),
            **({"metrics_on": "active"} if name == "ours_active" else {}),
        )

    def repetition(self, active: float) -> Record:
        """One loss stage. Its outputs: the loss, and of each parameter's gradient the norm and _ENTRIES of its entries."""
        trainer, advantages = self.trainer, self.batch["advantages"]
        alive = torch.arange(len(advantages)) < round(active * len(advantages))
        inputs = {**self.batch, "advantages": advantages * alive}
        trainer.current_gradient_accumulation_steps = 1
        measured = measure_stage(trainer, inputs, lambda: trainer.log({}), self.settings.threads)
        outputs = {"loss": [measured.result[0].item()]}
        for name, parameter in trainer.model.named_parameters():
            if parameter.grad is not None:
                outputs[f"norm of {name}"] = [parameter.grad.norm().item()]
                outputs[f"entries of {name}"] = self._entries(parameter.grad)
        norm = math.hypot(*(value for key, (value, *_) in outputs.items() if key.startswith("norm of ")))
        return {"seconds": measured.seconds, "peak_bytes": measured.peak_bytes, "outputs": outputs, "gradient_norm": norm}

    def _entries(self, gradient: Tensor) -> list[float]:
        """The same of every trainer's; where the parameter has a row for each token of the vocabulary, in rows of the batch's tokens."""
        rows = self.batch["completion_ids"].flatten()[:_ENTRIES] % len(gradient)
        if gradient.dim() == 1:
            return gradient[rows].tolist()
        return gradient[rows, torch.arange(len(rows)) % gradient.shape[1]].tolist()


def start_worker(name: str, batch: Path, settings: LossStageSettings) -> WorkerProcess:
    return WorkerProcess(partial(TrlWorker, name, batch, settings), settings.threads)


def check(settings: LossStageSettings) -> None:
    """Raise an ImportError if TRL is not installed, or is a version that this package was not compared with."""
    refuse_other_versions("trl", "grpo-fast bench-trl", "Another one may work otherwise inside.", required=True)


def run(settings: LossStageSettings, progress: Progress) -> Result:
    """Measure everything.

    Raises:
        RuntimeError: losses or gradients differ, or a process ended.
    """
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        progress("the batch")
        path = Path(folder) / "batch.pt"
        torch.save(make_batch(settings), path)
        workers = {name: stack.enter_context(start_worker(name, path, settings)) for name in LABELS}

        def ask(name: str, active: float) -> Record:
            return workers[name].ask("repetition", active=active)

        found = compare(LABELS, settings.active, settings.rounds, ask, tolerance=TOLERANCE, progress=progress, smallest=1e-6)
    return {
        "settings": {"dtype": "float32"},
        "timed": "compute_loss, backward and log on a prepared batch; no generation, no optimizer",
        "skipped_work": SKIPPED,
        **found,
    }


SUITE = Suite("bench-trl", HELP, LossStageSettings, run, partial(print_loss_stage, labels=LABELS), check=check)
