"""Checkpoints that are either complete or absent: each is written to a temporary folder and renamed when everything is on disk.

transformers' ``Trainer`` writes a checkpoint file by file into ``checkpoint-<step>``, and resumes from the newest such folder even if the
run was killed while writing it.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints
from transformers.utils import logging

from grpo_fast.models.loading import load_adapter_weights
from grpo_fast.models.unwrap import is_peft
from grpo_fast.trainer.checkpoint_files import (
    NEW_RUN,
    STATE,
    CheckpointError,
    changed_files,
    checkpoints_in,
    checksums_of,
    files_of,
    missing_from,
    write_checksums,
)
from grpo_fast.trainer.run_lock import RunLock
from grpo_fast.utils.disk import DiskFullError, describe_space, is_disk_full
from grpo_fast.utils.redaction import redacted_copy

if TYPE_CHECKING:
    from optuna import Trial
    from torch import nn
    from transformers.trainer_utils import TrainOutput

__all__ = ["STATE", "AtomicCheckpointTrainer", "CheckpointError", "last_checkpoint", "missing_from"]

UNFINISHED = ".unfinished"  # folder in output_dir in which checkpoints are written

logger = logging.get_logger(__name__)


def last_checkpoint(output_dir: str | Path) -> str | None:
    """Return the newest complete checkpoint of a run, or None. Incomplete ones are skipped with a warning.

    The contents of the files are not compared with their checksums, which `AtomicCheckpointTrainer.train` does.
    """
    for path in checkpoints_in(output_dir):
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
    _run_lock: RunLock | None = None

    def save_extra_state(self, folder: Path) -> None:
        """Write the additional files of a checkpoint into its folder. Called in every process."""
        raise NotImplementedError

    def load_extra_state(self, folder: Path) -> None:
        """Read what `save_extra_state` wrote. Called in every process."""
        raise NotImplementedError

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train, as transformers' ``Trainer.train``.

        Args:
            resume_from_checkpoint: a checkpoint's folder; True = the newest checkpoint of ``output_dir`` that is complete and undamaged.
            args, kwargs: further arguments of ``Trainer.train``.

        Raises:
            CheckpointError: the checkpoint is incomplete or damaged, or there is none; another run is training in ``output_dir``; or
                ``output_dir`` holds checkpoints of another run, and this one does not resume from one.
            DiskFullError: there is no space left for a checkpoint.
        """
        with self.output_dir_locked():
            folder = self._checkpoint_to_resume(resume_from_checkpoint)
            if folder is not None:
                self.load_extra_state(folder)
            return super().train(None if folder is None else str(folder), *args, **kwargs)

    @contextmanager
    def output_dir_locked(self) -> Iterator[None]:
        """Keep other runs out of ``output_dir`` inside the context. `train` enters it too, and the context may be nested.

        Raises:
            CheckpointError: another run is training there.
        """
        if self._run_lock is None:
            self._run_lock = RunLock(self.args.output_dir)
        with self._run_lock.held(is_main=self.is_world_process_zero()):
            yield

    def _checkpoint_to_resume(self, requested: str | Path | bool | None) -> Path | None:
        output_dir = self.args.output_dir
        checkpoints = checkpoints_in(output_dir)
        if not requested:
            if checkpoints:  # the checkpoints would mix, and a later resume could take one of the other run
                raise CheckpointError(
                    f"output_dir is {str(output_dir)!r}, which holds a run already ({checkpoints[0].name}); expected another folder, or "
                    "resume_from_checkpoint=True, to go on with that run. Fix: one of the two, or delete that run's checkpoints."
                )
            return None
        if requested is not True:
            problem = self._problem_of(Path(requested))
            if problem is not None:
                raise CheckpointError(f"resume_from_checkpoint is {str(requested)!r}, which {problem}; expected a complete one. {NEW_RUN}")
            return Path(requested)
        problems = []
        for path in checkpoints:
            problem = self._problem_of(path)
            if problem is None:
                return path
            problems.append(f"{path.name} {problem}")
            if self.is_world_process_zero():
                logger.warning(f"{path} is skipped: it {problem}.")
        found = f" ({'; '.join(problems)}). {NEW_RUN}" if problems else ", nor any other."
        raise CheckpointError(f"resume_from_checkpoint is True and {output_dir} holds no complete checkpoint{found}")

    def _problem_of(self, checkpoint: Path) -> str | None:
        """What is wrong with a checkpoint, the same in every process; each reads its share of the files."""
        missing = missing_from(checkpoint)
        if missing is None:
            changed = changed_files(checkpoint, self.args.process_index, self.args.world_size)
            found = None if not changed else f"has damaged files: {', '.join(changed)} (not what was written)"
        else:
            found = f"lacks {missing}"
        problems: list[str] = [each for each in gather_object([found]) if each is not None]
        return problems[0] if problems else None

    def stop_if_finished(self) -> bool:
        """End the training loop if the last step is done, and return whether training ends.

        transformers' loop checks the number of steps after a step only, so a run that is resumed at its end would make one step too many.
        """
        self.control.should_training_stop |= self.state.global_step >= self.state.max_steps
        return self.control.should_training_stop

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        policy: Any = self.model if model is None else model
        names = list(policy.peft_config) if is_peft(policy) else []
        if len(names) < 2 or self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        # Of several adapters transformers leaves out the first, and changes which are active and trained.
        for name in names:
            folder = Path(resume_from_checkpoint, *([] if name == "default" else [name]))
            load_adapter_weights(policy, name, folder / "adapter_model.safetensors")

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
        staging = folder / UNFINISHED
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)  # left over from a killed run
        self.accelerator.wait_for_everyone()
        try:
            self._write_checkpoint(model, trial, folder, staging)
        except Exception as error:
            full = is_disk_full(error, staging)
            shutil.rmtree(staging, ignore_errors=True)
            if not full:
                raise
            raise DiskFullError(errno.ENOSPC, self._describe_full_disk(folder)) from error
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder / f"checkpoint-{self.state.global_step}"))
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
            rotate_checkpoints(
                output_dir=str(folder),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def _write_checkpoint(self, model: nn.Module, trial: Trial | None, folder: Path, staging: Path) -> None:
        """Write a checkpoint to the folder ``staging``, and move it to ``folder`` when all of it is on the disk."""
        name = f"checkpoint-{self.state.global_step}"
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
        self._add_checksums(staging / name)
        if self.args.should_save:
            _flush_to_disk(staging / name)
            _replace_folder(staging / name, folder / name)
        self.accelerator.wait_for_everyone()

    def _add_checksums(self, checkpoint: Path) -> None:
        """Write the checksums of a checkpoint, of which each process computes a share; if each node has its own folder, each node all."""
        files = files_of(checkpoint)
        if self.args.save_on_each_node:
            checksums = checksums_of(checkpoint, files) if self.args.should_save else {}
        else:
            share = files[self.args.process_index :: self.args.world_size]
            checksums = {name: value for part in gather_object([checksums_of(checkpoint, share)]) for name, value in part.items()}
        if self.args.should_save:
            write_checksums(checkpoint, checksums)

    def _describe_full_disk(self, folder: Path) -> str:
        complete = last_checkpoint(folder)
        resume = "There is no complete checkpoint." if complete is None else f"The last complete checkpoint is {complete}."
        return (
            f"the disk is full: checkpoint-{self.state.global_step} could not be written to {folder}, of whose file system "
            f"{describe_space(folder)}; what was written of it has been removed. {resume} Fix: free some space, or set save_total_limit, "
            "and resume."
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
