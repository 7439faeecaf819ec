"""Calls of the trainer from transformers' training loop, at places for which ``Trainer`` has no method to override."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from transformers import TrainerCallback

from grpo_fast.trainer.prompt_stream import PromptStream

if TYPE_CHECKING:
    from grpo_fast.trainer.grpo_trainer import GRPOTrainer

__all__ = ["TrainingHooks"]


class TrainingHooks(TrainerCallback):
    """Calls the trainer at the places of transformers' training loop for which ``Trainer`` has no method to override."""

    def __init__(self, trainer: GRPOTrainer) -> None:
        self.trainer, self.started = trainer, 0.0

    def on_train_begin(self, *args: object, **kwargs: object) -> None:
        self.trainer.throughput.start(self.trainer.state.num_input_tokens_seen)
        self.trainer.completions.forget_weights()
        if self.trainer.resumed is not None:
            self.trainer.resumed.start()

    def on_pre_optimizer_step(self, *args: object, **kwargs: object) -> None:
        self.trainer.check_step()
        self.started = time.perf_counter()

    def on_optimizer_step(self, *args: object, **kwargs: object) -> None:
        self.trainer.metrics.add_seconds("step_time/optimizer", time.perf_counter() - self.started)

    def on_step_end(self, *args: object, **kwargs: object) -> None:
        rollouts, state = self.trainer.rollouts, self.trainer.state
        if rollouts is not None and isinstance(rollouts.prompts, PromptStream):
            state.epoch = rollouts.prompts.epoch(state.global_step / self.trainer.args.updates_per_rollout)
        self.trainer.finish_step()
