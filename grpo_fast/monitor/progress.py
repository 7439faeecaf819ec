"""The live progress bar: how far, how long yet, and the handful of numbers that tell whether a run is well."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from grpo_fast.monitor.samples import print_completions, read_completions

__all__ = ["CompletionsCallback", "ProgressBarCallback", "headline"]

# key of the log, name on the screen, how it is written
_SHOWN = (
    ("reward", "reward", "{:.3f}"),
    ("reward_std", "±", "{:.2f}"),
    ("entropy", "entropy", "{:.3f}"),
    ("completions/repetition", "repeats", "{:.1%}"),
    ("frac_reward_zero_std", "dead groups", "{:.0%}"),
    ("clip_ratio/region_mean", "clipped", "{:.1%}"),
    ("kl", "kl", "{:.4f}"),
    ("completions/clipped_ratio", "cut", "{:.0%}"),
    ("tokens_per_second", "tok/s", "{:,.0f}"),
    ("eval_reward", "eval", "{:.3f}"),
)
DEAD = 0.8  # share of groups without a signal from which on a hint is given, once


class ProgressBarCallback(TrainerCallback):
    """A rich progress bar with reward, entropy, repetition, groups without a signal, clipped tokens, KL and speed.

    On a terminal one live line; elsewhere (a file, a pipe, CI) a plain line for each log call and no bar. The first process alone shows it.

    Args:
        console: where to; None = standard error, so that standard output stays for results.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console if console is not None else Console(stderr=True)
        self.progress: Progress | None = None
        self._task: Any = None
        self._warned = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._stop()
        if not state.is_world_process_zero or not self.console.is_terminal:
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
        )
        self.progress = Progress(*columns, console=self.console, expand=True)
        self._task = self.progress.add_task("GRPO", total=state.max_steps, completed=state.global_step, note="")
        self.progress.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.progress is not None:
            self.progress.update(self._task, completed=state.global_step)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        note = headline(logs)
        if self.progress is not None:
            if note:
                self.progress.update(self._task, note=note)
        elif note:
            self.console.print(f"step {state.global_step}/{state.max_steps}  {note}", highlight=False, markup=False, soft_wrap=True)
        self._hint(state, logs)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._stop()

    def _hint(self, state: TrainerState, logs: Mapping[str, Any]) -> None:
        dead = logs.get("frac_reward_zero_std")
        if self._warned or not isinstance(dead, (int, float)) or dead < DEAD:
            return
        self._warned = True
        self.console.print(
            f"step {state.global_step}: in {dead:.0%} of the groups all rewards are equal, so their advantages are 0 and nothing is learnt "
            "from them. If the reward is high the task is done: take harder prompts. If it is low: easier ones, a reward with steps "
            "between 0 and 1, or a higher temperature.",
            style="yellow",
            highlight=False,
            markup=False,
        )

    def _stop(self) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None


class CompletionsCallback(TrainerCallback):
    """With ``log_completions``: the first completions of the step that was logged, as a table above the progress bar; on a terminal only.

    Args:
        console: the progress bar's, so that the two do not write over each other; None = standard error.
        limit: completions shown; the files in ``output_dir/completions`` have them all.
    """

    def __init__(self, console: Console | None = None, limit: int = 4) -> None:
        self.console = console if console is not None else Console(stderr=True)
        self.limit = limit

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero or not self.console.is_terminal or "reward" not in (logs or {}):
            return
        file = Path(args.output_dir) / "completions" / f"step-{state.global_step:06d}.jsonl"
        if getattr(args, "log_completions", False) and file.is_file():
            print_completions(*read_completions(file), step=state.global_step, limit=self.limit, console=self.console)


def headline(logs: Mapping[str, Any]) -> str:
    """The numbers worth a glance, of those that are there: ``reward 0.512 ±0.31  entropy 0.294  ...``; rollout's share of the time last."""
    words = []
    for key, name, form in _SHOWN:
        value = logs.get(key)
        if not isinstance(value, (int, float)) or math.isnan(value):
            continue
        text = form.format(value)
        words.append(f"{name}{text}" if name == "±" else f"{name} {text}")
    times = {key.removeprefix("step_time/"): value for key, value in logs.items() if key.startswith("step_time/")}
    numbers = {name: value for name, value in times.items() if isinstance(value, (int, float)) and value >= 0}
    total = numbers.pop("total", None) or sum(numbers.values())
    rollout = next((numbers[name] for name in ("generate", "generation", "rollout") if name in numbers), None)
    if rollout is not None and total > 0:
        words.append(f"sampling {min(rollout / total, 1):.0%} of {total:.1f} s")
    return "  ".join(words).replace("  ±", " ±")
