"""The callback that prints a table of completions on a terminal."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from grpo_fast.trainer.callbacks.completions_table import print_completions, read_completions

__all__ = ["CompletionsCallback"]


class CompletionsCallback(TrainerCallback):
    """With ``log_completions=True``, prints some completions of each logged step, from the highest advantage to the lowest.

    It prints on a terminal only, above the progress bar. ``output_dir/completions`` holds all completions of the logged steps.

    Args:
        console: where to print; pass the progress bar's so that the two do not overwrite each other. None = standard error.
        limit: number of completions to print.
    """

    def __init__(self, console: Console | None = None, limit: int = 4) -> None:
        self.console = console if console is not None else Console(stderr=True)
        self.limit = limit

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float] | None = None, **kwargs: object
    ) -> None:
        if not state.is_world_process_zero or not self.console.is_terminal or "reward" not in (logs or {}):
            return
        file = Path(args.output_dir) / "completions" / f"step-{state.global_step:06d}.jsonl"
        if getattr(args, "log_completions", False) and file.is_file():
            print_completions(**read_completions(file), step=state.global_step, limit=self.limit, console=self.console)
