"""The demonstration's model trained by GRPOTrainer, as the loop (`grpo.py`) would: for the comparison and for the temperature study."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from grpo_fast.demo.grpo import Settings, optimizer_of
from grpo_fast.demo.run import REWARDS

__all__ = ["Trained", "train_by_trainer", "trainer_of"]


def trainer_of(
    model: Any, tokenizer: Any, rows: list[dict[str, Any]], settings: Settings, prompts: int, seed: int, output: Path, **more: Any
) -> Any:
    """A GRPOTrainer that does what the loop does with these settings and as many prompts per step; ``more`` for GRPOConfig."""
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
        **({"temperature": settings.temperature} | more),
    )
    optimizers = optimizer_of(model, settings)
    return GRPOTrainer(model, list(REWARDS), args, train_dataset=rows, processing_class=tokenizer, optimizers=optimizers)


class Trained(NamedTuple):
    """What a training left behind beside the weights."""

    logs: list[dict[str, Any]]  # of each step, as the trainer logs it
    seconds: float  # of CPU, of the whole process, from the first step to the last


def train_by_trainer(
    model: Any,
    tokenizer: Any,
    rows: list[dict[str, Any]],
    settings: Settings,
    prompts: int,
    seed: int,
    *,
    callbacks: Sequence[Any] = (),
    **more: Any,
) -> Trained:
    """Train ``model`` in place; see `trainer_of`. What the trainer would write to disk is thrown away."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(model, tokenizer, rows, settings, prompts, seed, Path(folder), **more)
        for callback in callbacks:
            trainer.add_callback(callback)
        began = time.process_time()
        trainer.train()
        seconds = time.process_time() - began
    return Trained([log for log in trainer.state.log_history if "loss" in log], seconds)
