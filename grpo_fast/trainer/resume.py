"""Saving the state of a GRPO run in a checkpoint, and continuing from it, also with settings that have changed."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from grpo_fast.models.unwrap import inner_model
from grpo_fast.trainer.changed_settings import OptimizerSettings, SettingChange, changes_since, describe_changes, recorded_settings
from grpo_fast.trainer.checkpoint_files import CheckpointError
from grpo_fast.trainer.rollout import Rollout
from grpo_fast.trainer.run_state import RunState, batch_geometry

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from grpo_fast.trainer.grpo_trainer import GRPOTrainer

__all__ = ["Resumed", "load_run", "save_run"]

logger = logging.getLogger("grpo_fast")


def save_run(trainer: GRPOTrainer, folder: Path) -> None:
    """Add to a checkpoint: the temperature's state, the settings, a reference that cannot be made again, and an unfinished rollout.

    Args:
        trainer: whose state it is; every process calls this.
        folder: of the checkpoint.
    """
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = trainer.state.global_step % trainer.args.updates_per_rollout != 0
    if unfinished and trainer.rollout is not None:
        trainer.rollout.save(_rollout_file(trainer, folder))
    if not trainer.args.should_save:
        return
    trainer.reference.save(folder)
    RunState(
        batch_geometry(trainer.args, trainer.accelerator.num_processes),
        trainer.temperatures.state_dict(),
        trainer.step_tokens if unfinished else [],
        recorded_settings(trainer.args, trainer.rewards.names),
        trainer.reference.kind,
        trainer.entropy_control.state_dict(),
        step_sequences=trainer.step_sequences if unfinished else [],
    ).save(folder)


def load_run(trainer: GRPOTrainer, folder: Path) -> Resumed:
    """Read what `save_run` wrote.

    Args:
        trainer: which is to continue; every process calls this.
        folder: of the checkpoint.

    Raises:
        CheckpointError: a file is not valid; or the unfinished rollout cannot be continued with the current settings.
    """
    state = RunState.load(folder)
    state.check_batches(folder, batch_geometry(trainer.args, trainer.accelerator.num_processes))
    _check_rows(trainer, folder, state)
    continues = trainer.temperatures.can_continue(state.temperature)
    if continues:
        try:
            trainer.temperatures.load_state_dict(state.temperature)
        except ValueError as error:
            raise CheckpointError(
                f"{folder} has a state of the temperature that cannot be read: {error} Fix: another checkpoint."
            ) from error
    trainer.entropy_control.load_state_dict(state.entropy)
    trainer.step_tokens, trainer.step_sequences = state.step_tokens, state.step_sequences
    rollout = _rollout_file(trainer, folder)
    vocab_size = getattr(inner_model(trainer.model).get_input_embeddings(), "num_embeddings", None)
    trainer.rollout = Rollout.load(rollout, trainer.args.device, vocab_size) if rollout.exists() else None
    trainer.reference.load(folder, state.reference)
    changes = changes_since(state.settings, recorded_settings(trainer.args, trainer.rewards.names))
    return Resumed(trainer, changes, temperature_continues=continues)


def _check_rows(trainer: GRPOTrainer, folder: Path, state: RunState) -> None:
    """Check that an unfinished rollout has the old and reference log-probabilities of all rows that the loss needs now."""

    def needs_all(settings: dict[str, object]) -> bool:
        custom = settings.get("loss_type") == "custom"  # may need rows without an advantage
        penalty = any(settings.get(name, 0) != 0 for name in ("beta", "entropy_coef", "squared_log_ratio_coef"))
        return custom or penalty or bool(settings.get("use_adaptive_entropy"))

    now = recorded_settings(trainer.args, trainer.rewards.names)
    if state.step_tokens and state.settings and needs_all(now) and not needs_all(state.settings):
        raise CheckpointError(
            f"{folder} was written in the middle of a rollout, with beta and entropy_coef 0, and now they are {trainer.args.beta:g} and "
            f"{trainer.args.entropy_coef:g}; expected the same, and no new custom loss: the rest of the rollout lacks "
            "the log-probabilities for it. Resume from a checkpoint at the end of a rollout."
        )


def _rollout_file(trainer: GRPOTrainer, folder: Path) -> Path:
    return folder / f"rollout-{trainer.accelerator.process_index}.safetensors"


class Resumed:
    """What differs between a resumed run and its checkpoint.

    Args:
        trainer: the resumed run.
        changes: the settings that have changed.
        temperature_continues: whether the state of the temperature is the checkpoint's.
    """

    def __init__(self, trainer: GRPOTrainer, changes: list[SettingChange], *, temperature_continues: bool) -> None:
        self.trainer, self.changes, self._temperature_continues = trainer, changes, temperature_continues

    @contextmanager
    def optimizer_settings(self, optimizer: Optimizer, scheduler: LRScheduler) -> Iterator[None]:
        """Keep the changed settings of an optimizer while its state is loaded inside the context."""
        new = OptimizerSettings(optimizer, scheduler)
        yield
        if not self.trainer.is_deepspeed_enabled:  # which has its own optimizer and schedule
            new.restore(optimizer, scheduler, [change.name for change in self.changes])

    def start(self) -> None:
        """At the start of training: use the run's own intervals of logs, evaluations and checkpoints, and name each changed setting."""
        trainer = self.trainer
        trainer.state.compute_steps(trainer.args, trainer.state.max_steps)
        if self.changes and trainer.accelerator.is_main_process:
            unfinished = trainer.state.global_step % trainer.args.updates_per_rollout != 0
            line = describe_changes(self.changes, trainer.state.global_step, unfinished_rollout=unfinished, kept=self._kept())
            logger.warning(line)

    def _kept(self) -> list[str]:
        trainer, kept = self.trainer, []
        temperatures = trainer.temperatures
        if temperatures.adaptive:
            how = "continues" if self._temperature_continues else "starts"
            kept.append(f"The temperature {how} at {temperatures.base(trainer.state.global_step):g}.")
        if trainer.is_deepspeed_enabled:
            kept.append("DeepSpeed's optimizer keeps the learning rate, betas and weight decay of the checkpoint.")
        return kept
