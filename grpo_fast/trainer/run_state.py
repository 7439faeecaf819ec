"""The checkpoint file with the state of a GRPO run besides model, optimizer and transformers' own state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_fast.trainer.checkpoint_files import STATE, CheckpointError, read_object
from grpo_fast.trainer.entropy_control import EntropyState
from grpo_fast.trainer.temperature import ScheduleState
from grpo_fast.utils.files import write_json

if TYPE_CHECKING:
    from grpo_fast.trainer.config import GRPOConfig

__all__ = ["RunState", "batch_geometry"]

VERSION = 2  # 1: without settings and reference, and without checksums of the checkpoint's files


@dataclass
class RunState:
    """The contents of ``grpo_state.json``.

    Args:
        batches: the settings that determine the rows of a step, see `batch_geometry`.
        temperature: the state of the temperature schedule.
        step_tokens: tokens of each optimizer step of an unfinished rollout; empty at the end of a rollout.
        settings: the settings of the run, see `recorded_settings`; empty if the checkpoint does not know them.
        entropy: the state of the adaptive entropy coefficient; None without one.
        reference: which reference policy the run has, see `ReferencePolicy.kind`; empty if the checkpoint does not know it.
        version: of the format.
        step_sequences: sequences in the denominators of each optimizer step of an unfinished rollout; empty if the checkpoint does not
            know them.
    """

    batches: dict[str, int]
    temperature: ScheduleState
    step_tokens: list[int]
    settings: dict[str, Any]
    reference: str
    entropy: EntropyState | None = None
    version: int = VERSION
    step_sequences: list[int] = field(default_factory=list)

    def save(self, folder: Path) -> None:
        """Write the file into a checkpoint's folder."""
        write_json(folder / STATE, asdict(self))

    @classmethod
    def load(cls, folder: Path) -> RunState:
        """Read the file from a checkpoint's folder.

        Raises:
            CheckpointError: a field is unknown, missing or of another type, or the file is of a later version.
        """
        found = {"settings": {}, "reference": "", "entropy": None, "version": 1, "step_sequences": [], **read_object(folder / STATE)}
        names = [each.name for each in fields(cls)]
        wrong = [f"unknown {name!r}" for name in found if name not in names]
        wrong += [
            f"{name} is {found.get(name)!r:.100}, expected {_TYPES[name][1]}" for name in names if not _TYPES[name][0](found.get(name))
        ]
        if not wrong and found["step_sequences"] and len(found["step_sequences"]) != len(found["step_tokens"]):
            wrong = [f"step_sequences has {len(found['step_sequences'])} numbers, expected {len(found['step_tokens'])}, as step_tokens"]
        if wrong:
            raise CheckpointError(f"{folder / STATE} cannot be read: {'; '.join(wrong)}. Fix: another checkpoint.")
        return cls(**found)

    def check_batches(self, folder: Path, batches: dict[str, int]) -> None:
        """Check that an unfinished rollout can be continued with the current settings.

        Raises:
            CheckpointError: the rollout's rows would be split into other steps.
        """
        if self.step_tokens and self.batches != batches:
            raise CheckpointError(
                f"{folder} was written in the middle of a rollout, with {self.batches}, and now it is {batches}; expected the same. "
                "Resume from a checkpoint at the end of a rollout."
            )


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _is_object(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


def _is_entropy_state(value: object) -> bool:
    numbers = isinstance(value, dict) and value.keys() == {"coef", "entropy"} and isinstance(value["coef"], (int, float))
    return value is None or (numbers and isinstance(value["entropy"], (int, float, type(None))))  # type: ignore[index]


_TYPES: dict[str, tuple[Callable[[Any], bool], str]] = {  # field -> (whether a value is valid, what is)
    "batches": (lambda value: _is_object(value) and all(map(_is_count, value.values())), "an object of whole numbers"),
    "temperature": (_is_object, "an object"),
    "step_tokens": (lambda value: isinstance(value, list) and all(map(_is_count, value)), "a list of whole numbers"),
    "step_sequences": (lambda value: isinstance(value, list) and all(map(_is_count, value)), "a list of whole numbers"),
    "settings": (_is_object, "an object"),
    "entropy": (_is_entropy_state, "an object with the numbers coef and entropy, or null"),
    "reference": (lambda value: isinstance(value, str), "a text"),
    "version": (lambda value: type(value) is int and 1 <= value <= VERSION, f"a whole number from 1 to {VERSION}"),
}


def batch_geometry(args: GRPOConfig, num_processes: int) -> dict[str, int]:
    """Return the settings that determine how a rollout is split into steps."""
    names = ("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation", "num_iterations")
    return {"processes": num_processes} | {name: getattr(args, name) for name in names}
