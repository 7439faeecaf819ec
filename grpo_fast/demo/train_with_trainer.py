"""Training of the demonstration's model by `GRPOTrainer`, with the settings of the loop in `grpo.py`: for comparison and for the study."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from grpo_fast.demo.grpo import LoopSettings, make_optimizer
from grpo_fast.demo.options import REWARDS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

    from grpo_fast.trainer.grpo_trainer import GRPOTrainer

__all__ = ["TrainerRun", "make_trainer", "train_with_trainer"]


def make_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, str]],
    settings: LoopSettings,
    prompts: int,
    seed: int,
    output: Path,
    **config: Any,
) -> GRPOTrainer:
    """Return a trainer that makes the steps of the loop.

    Args:
        model: to train, in place.
        tokenizer: of the task.
        rows: training rows, see `question`.
        settings: of the loop.
        prompts: per step.
        seed: of data and sampling.
        output: folder that the trainer may write to.
        config: further settings of GRPOConfig.
    """
    from grpo_fast.trainer.grpo_trainer import GRPOConfig, GRPOTrainer

    loss = settings.loss
    args = GRPOConfig(
        str(output),
        seed=seed,
        max_steps=settings.steps,
        per_device_train_batch_size=prompts * settings.group_size,
        num_generations=settings.group_size,
        max_completion_length=settings.max_new_tokens,
        max_grad_norm=settings.max_grad_norm,
        loss_type=loss.loss_type,
        epsilon=loss.epsilon_low,
        epsilon_high=loss.epsilon_high,
        reward_weights=list(REWARDS.values()),
        packing="true",
        gradient_checkpointing=False,
        logging_steps=1,
        disable_tqdm=True,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        **({"temperature": settings.temperature} | config),
    )
    optimizers = make_optimizer(model, settings)
    return GRPOTrainer(model, list(REWARDS), args, train_dataset=rows, processing_class=tokenizer, optimizers=optimizers)


class TrainerRun(NamedTuple):
    """The record of a training."""

    logs: list[Mapping[str, float]]  # the trainer's log of each step
    seconds: float  # CPU time of the process, from the first step to the last


def train_with_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, str]],
    settings: LoopSettings,
    prompts: int,
    seed: int,
    *,
    callbacks: Sequence[TrainerCallback] = (),
    **config: Any,
) -> TrainerRun:
    """Train ``model`` in place; see `make_trainer`. Files that the trainer writes are deleted."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(model, tokenizer, rows, settings, prompts, seed, Path(folder), **config)
        for callback in callbacks:
            trainer.add_callback(callback)
        began = time.process_time()
        trainer.train()
        seconds = time.process_time() - began
    return TrainerRun([log for log in trainer.state.log_history if "loss" in log], seconds)
