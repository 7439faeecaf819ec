"""Checkpoints that are complete or absent: written to a folder beside the others, and renamed into place when all is on disk.

transformers' Trainer writes file by file into ``checkpoint-<step>``, and takes the newest such folder to resume from, half written or not.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints
from transformers.utils import logging

__all__ = ["CompleteCheckpoints", "last_checkpoint", "missing_from"]

STATE = "grpo_state.json"  # what a GRPO run knows beside model, optimiser and transformers' own state
UNFINISHED = ".unfinished"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")

logger = logging.get_logger(__name__)


def missing_from(checkpoint: str | Path) -> str | None:
    """What a checkpoint lacks to be resumed from, in words; None if nothing."""
    checkpoint = Path(checkpoint)
    for name in ("trainer_state.json", STATE):
        try:
            json.loads((checkpoint / name).read_text())
        except (OSError, ValueError) as error:
            return f"{name} ({type(error).__name__})"
    sharded = any(path.is_dir() for path in checkpoint.glob("*"))  # FSDP and DeepSpeed keep folders
    if not sharded and not any((checkpoint / name).is_file() for name in WEIGHTS):
        return " or ".join(WEIGHTS)
    return None


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The newest complete checkpoint of a run; half ones are passed over with a warning."""
    found = [
        (int(match[1]), path) for path in Path(output_dir).glob("checkpoint-*") if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    ]
    for _, path in sorted(found, reverse=True):
        lacking = missing_from(path)
        if lacking is None:
            return str(path)
        logger.warning(f"{path} is passed over: it lacks {lacking}.")
    return None


class CompleteCheckpoints(Trainer):
    """transformers' Trainer with checkpoints of that kind.

    ``extra_state(folder)`` writes what else belongs into one, in every process, and ``load_extra_state(folder)`` reads it.
    """

    _writing_to: Path | None = None
    _to_push: str | None = None

    def extra_state(self, folder: Path) -> None:
        raise NotImplementedError

    def load_extra_state(self, folder: Path) -> None:
        raise NotImplementedError

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """transformers' own. ``resume_from_checkpoint=True`` takes the newest complete checkpoint of ``output_dir``."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(f"resume_from_checkpoint is True and {self.args.output_dir} holds no complete checkpoint; expected one.")
        if resume_from_checkpoint:
            lacking = missing_from(resume_from_checkpoint)
            if lacking is not None:
                raise ValueError(
                    f"resume_from_checkpoint is {str(resume_from_checkpoint)!r}, which lacks {lacking}; expected a complete one."
                )
            self.load_extra_state(Path(resume_from_checkpoint))
        return super().train(str(resume_from_checkpoint) if resume_from_checkpoint else None, *args, **kwargs)

    def stop_if_finished(self) -> bool:
        """Whether the last step is done; if so the loop is told to end. It looks after a step only, so that one more would be made of a run
        that is resumed from its end.
        """
        self.control.should_training_stop |= self.state.global_step >= self.state.max_steps
        return self.control.should_training_stop

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._writing_to or super()._get_output_dir(trial))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._writing_to is None:
            super()._push_from_checkpoint(checkpoint_folder)  # else: when it is where it belongs

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(super()._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        staging = folder / UNFINISHED
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)  # of a run that was killed
        self.accelerator.wait_for_everyone()
        self._writing_to = staging
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._writing_to = None
        self.extra_state(staging / name)
        best = self.state.best_global_step
        if best and (best == self.state.global_step or (folder / f"checkpoint-{best}").exists()):
            self.state.best_model_checkpoint = str(folder / f"checkpoint-{best}")
        if self.args.should_save:
            self.state.save_to_json(str(staging / name / "trainer_state.json"))
        self.accelerator.wait_for_everyone()  # all have written
        if self.args.should_save:
            _to_disk(staging / name)
            _replace(staging / name, folder / name)
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


def _to_disk(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def _replace(new: Path, final: Path) -> None:
    old = new.with_name(f"{new.name}-before")
    if final.exists():  # a resumed run reaches the same step again
        os.replace(final, old)
    os.replace(new, final)
