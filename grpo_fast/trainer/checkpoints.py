"""Checkpoints that are either complete or absent: each is written to a temporary folder and renamed when everything is on disk.

transformers' ``Trainer`` writes a checkpoint file by file into ``checkpoint-<step>``, and resumes from the newest such folder even if the
run was killed while writing it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints
from transformers.utils import logging

from grpo_fast.utils.redaction import redacted_copy

if TYPE_CHECKING:
    from optuna import Trial
    from torch import nn
    from transformers.trainer_utils import TrainOutput

__all__ = ["AtomicCheckpointTrainer", "last_checkpoint", "missing_from"]

STATE = "grpo_state.json"  # the state of a GRPO run besides the model, the optimizer and transformers' own state
UNFINISHED = ".unfinished"  # folder in output_dir in which checkpoints are written
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")

logger = logging.get_logger(__name__)


def missing_from(checkpoint: str | Path) -> str | None:
    """Return a description of the files that a checkpoint lacks for resuming; None if it is complete."""
    checkpoint = Path(checkpoint)
    for name in ("trainer_state.json", STATE):
        try:
            json.loads((checkpoint / name).read_text())
        except (OSError, ValueError) as error:
            return f"{name} ({type(error).__name__})"
    sharded = any(path.is_dir() for path in checkpoint.glob("*"))  # FSDP and DeepSpeed write folders
    if not sharded and not any((checkpoint / name).is_file() for name in WEIGHTS):
        return " or ".join(WEIGHTS)
    return None


def last_checkpoint(output_dir: str | Path) -> str | None:
    """Return the newest complete checkpoint of a run, or None. Incomplete ones are skipped with a warning."""
    found = [
        (int(match[1]), path) for path in Path(output_dir).glob("checkpoint-*") if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    ]
    for _, path in sorted(found, reverse=True):
        missing = missing_from(path)
        if missing is None:
            return str(path)
        logger.warning(f"{path} is skipped: it lacks {missing}.")
    return None


class AtomicCheckpointTrainer(Trainer):
    """transformers' ``Trainer`` with checkpoints that are complete or absent.

    A subclass adds files with ``save_extra_state(folder)``, which every process calls before the checkpoint is renamed, and
    reads them with ``load_extra_state(folder)`` before training resumes.
    """

    _staging: Path | None = None  # while a checkpoint is written: the folder that stands in for output_dir

    def save_extra_state(self, folder: Path) -> None:
        """Write the additional files of a checkpoint into its folder. Called in every process."""
        raise NotImplementedError

    def load_extra_state(self, folder: Path) -> None:
        """Read what `save_extra_state` wrote. Called in every process."""
        raise NotImplementedError

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train, as transformers' ``Trainer.train``.

        Args:
            resume_from_checkpoint: a checkpoint's folder; True = the newest complete checkpoint of ``output_dir``.
            args, kwargs: further arguments of ``Trainer.train``.

        Raises:
            ValueError: the checkpoint is incomplete, or there is none.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(f"resume_from_checkpoint is True and {self.args.output_dir} holds no complete checkpoint; expected one.")
        if resume_from_checkpoint:
            missing = missing_from(resume_from_checkpoint)
            if missing is not None:
                raise ValueError(
                    f"resume_from_checkpoint is {str(resume_from_checkpoint)!r}, which lacks {missing}; expected a complete one."
                )
            self.load_extra_state(Path(resume_from_checkpoint))
        return super().train(str(resume_from_checkpoint) if resume_from_checkpoint else None, *args, **kwargs)

    def stop_if_finished(self) -> bool:
        """End the training loop if the last step is done, and return whether training ends.

        transformers' loop checks the number of steps after a step only, so a run that is resumed at its end would make one step too many.
        """
        self.control.should_training_stop |= self.state.global_step >= self.state.max_steps
        return self.control.should_training_stop

    def _get_output_dir(self, trial: Trial | None) -> str:
        return str(self._staging or super()._get_output_dir(trial))

    def _save(self, *args: Any, **kwargs: Any) -> None:
        given: TrainingArguments = self.args  # type: ignore[has-type]
        self.args = redacted_copy(given)  # for training_args.bin: no secret may reach the disk, not even for a moment
        try:
            super()._save(*args, **kwargs)
        finally:
            self.args = given

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging is None:  # otherwise _save_checkpoint pushes after the rename
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model: nn.Module, trial: Trial | None) -> None:
        folder = Path(super()._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        staging = folder / UNFINISHED
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)  # left over from a killed run
        self.accelerator.wait_for_everyone()
        self._staging = staging
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = None
        self.save_extra_state(staging / name)
        best = self.state.best_global_step
        if best and (best == self.state.global_step or (folder / f"checkpoint-{best}").exists()):
            self.state.best_model_checkpoint = str(folder / f"checkpoint-{best}")
        if self.args.should_save:
            self.state.save_to_json(str(staging / name / "trainer_state.json"))
        self.accelerator.wait_for_everyone()  # every process has written its files
        if self.args.should_save:
            _flush_to_disk(staging / name)
            _replace_folder(staging / name, folder / name)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder / name))
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
            rotate_checkpoints(
                output_dir=str(folder),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )


def _flush_to_disk(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def _replace_folder(new: Path, final: Path) -> None:
    old = new.with_name(f"{new.name}-before")
    if final.exists():  # a resumed run reaches the same step again
        os.replace(final, old)
    os.replace(new, final)
