"""The metrics file: one JSON object for each log call, safe to append to when a run is resumed."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from grpo_fast.trainer.callbacks.records import METRICS_FILE, drop_after

__all__ = ["JournalCallback"]


class JournalCallback(TrainerCallback):
    """Writes ``output_dir/metrics.jsonl``: what the trainer logs, and ``step``, a line for each call, by the first process alone.

    A run that starts over empties the file; one that is resumed at step N first drops the lines of the steps after N, which it will make
    again. That is done by writing a new file beside the old one and moving it into place. A line is one write: a run that is killed leaves
    at most one torn line, at the end, which reading and resuming leave out.
    """

    def __init__(self, file: str | os.PathLike[str] | None = None) -> None:
        self.file = None if file is None else Path(file)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            drop_after(self._path(args), state.global_step)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        path = self._path(args)
        path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"step": state.global_step} | {key: _plain(value) for key, value in logs.items() if key != "step"})
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def _path(self, args: TrainingArguments) -> Path:
        return self.file if self.file is not None else Path(args.output_dir) / METRICS_FILE


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: null. Tensors and NumPy's scalars are made into numbers."""
    if hasattr(value, "item"):  # a tensor or scalar of torch or NumPy; what holds more than one number raises, and should
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, bool, list, dict, type(None))) else str(value)
