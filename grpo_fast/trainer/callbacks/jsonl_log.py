"""The metrics file: one JSON object per log call, with no duplicate steps when a run is resumed."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from grpo_fast.trainer.metrics_file import METRICS_FILE, drop_later_steps

__all__ = ["JSONLLogCallback"]


class JSONLLogCallback(TrainerCallback):
    """Writes ``output_dir/metrics.jsonl``: one line per log call with ``step`` and everything that was logged; in the first process only.

    A run that starts from step 0 empties the file. A run that is resumed at step N first removes the lines of later steps, because it will
    log those steps again; the shortened file replaces the old one atomically. Each line is a single write, so a killed run leaves at most
    one incomplete line, at the end, which reading and resuming ignore.

    Args:
        file: where to write; None = ``metrics.jsonl`` in the trainer's ``output_dir``.
    """

    def __init__(self, file: str | os.PathLike[str] | None = None) -> None:
        self.file = None if file is None else Path(file)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        if state.is_world_process_zero:
            drop_later_steps(self._path(args), state.global_step)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float] | None = None, **kwargs: object
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        path = self._path(args)
        path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"step": state.global_step} | {key: _to_json(value) for key, value in logs.items() if key != "step"})
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def _path(self, args: TrainingArguments) -> Path:
        return self.file if self.file is not None else Path(args.output_dir) / METRICS_FILE


def _to_json(value: object) -> object:
    """A value that JSON can hold: tensors and NumPy scalars become numbers, NaN and infinity become null."""
    if hasattr(value, "item"):  # raises for a tensor with more than one element, which is a mistake of the caller
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, bool, list, dict, type(None))) else str(value)
