"""The checkpoint file with the state of a GRPO run besides model, optimizer and transformers' own state."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from grpo_fast.trainer.checkpoints import STATE
from grpo_fast.trainer.temperature import ScheduleState
from grpo_fast.utils.files import write_json

if TYPE_CHECKING:
    from grpo_fast.trainer.config import GRPOConfig

__all__ = ["RunState", "batch_geometry"]


@dataclass
class RunState:
    """The contents of ``grpo_state.json``.

    Args:
        batches: the settings that determine the rows of a step, see `batch_geometry`.
        temperature: the state of the temperature schedule.
        step_tokens: tokens of each optimizer step of an unfinished rollout; empty at the end of a rollout.
        version: of the format.
    """

    batches: dict[str, int]
    temperature: ScheduleState
    step_tokens: list[int]
    version: int = 1

    def save(self, folder: Path) -> None:
        """Write the file into a checkpoint's folder."""
        write_json(folder / STATE, asdict(self))

    @classmethod
    def load(cls, folder: Path) -> RunState:
        """Read the file from a checkpoint's folder."""
        return cls(**json.loads((folder / STATE).read_text()))

    def check_batches(self, folder: Path, batches: dict[str, int]) -> None:
        """Check that an unfinished rollout can be continued with the current settings.

        Raises:
            ValueError: the rollout's rows would be split into other steps.
        """
        if self.step_tokens and self.batches != batches:
            raise ValueError(
                f"{folder} was written in the middle of a rollout, with {self.batches}, and now it is {batches}; expected the same. "
                "Resume from a checkpoint at the end of a rollout."
            )


def batch_geometry(args: GRPOConfig, num_processes: int) -> dict[str, int]:
    """Return the settings that determine how a rollout is split into steps."""
    names = ("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation", "num_iterations")
    return {"processes": num_processes} | {name: getattr(args, name) for name in names}
