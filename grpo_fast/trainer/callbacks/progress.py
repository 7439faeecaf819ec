"""The live progress bar: how far, how long yet, and the handful of numbers that tell whether a run is well."""

from __future__ import annotations

import atexit
import math
import re
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from grpo_fast.trainer.callbacks.samples import print_completions, read_completions

__all__ = ["CompletionsCallback", "ProgressBarCallback", "numbers"]

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
)
_EVALUATION = re.compile(r"(eval(?:_.+)?)_reward")  # of one data set, or of one of several by name
_FAILURES = re.compile(r"rewards/(.+)/(timeouts|errors|scorer_raised)")
_MEANING = {
    "timeouts": "took too long, and does not apply to what it had no time for",
    "errors": "failed or returned what is no number, and does not apply there",
    "scorer_raised": "met answers that the task's own score function raises at, and counts them as wrong",
}
TRAINING = "GRPO"
DEAD = 0.8  # share of groups without a signal from which on a hint is given, once


class ProgressBarCallback(TrainerCallback):
    """A rich progress bar with reward, entropy, repetition, groups without a signal, clipped tokens, KL and speed.

    On a terminal a live bar and below it the numbers, on as many lines as they need; elsewhere (a file, a pipe, CI) a plain line for each
    log call and no bar. Evaluations have a line of their own, which stays. The first process alone shows anything. Meanwhile the progress
    bars of transformers, for the files of each checkpoint, are switched off.

    Args:
        console: where to; None = standard error, so that standard output stays for results.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console if console is not None else Console(stderr=True)
        self.progress: _Bar | None = None
        self._hinted: set[str] = set()
        self._silenced = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.stop()
        if not state.is_world_process_zero:
            return
        self._silenced = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        atexit.register(self.stop)  # an error or an interrupt ends training without on_train_end, and the terminal without its cursor
        if self.console.is_terminal:
            self.progress = _Bar(self.console, state.global_step, state.max_steps)
            self.progress.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.progress is not None:
            self.progress.show(completed=state.global_step, description="evaluating" if control.should_evaluate else TRAINING)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.progress is not None:
            self.progress.show(description=TRAINING)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        words, evaluations = numbers(logs), _evaluations(logs)
        if self.progress is not None:
            self.progress.logs |= logs
        lines = [evaluations] if self.progress is not None else [words, evaluations]
        for line in filter(None, lines):
            self._print(f"step {state.global_step}/{state.max_steps}  {'  '.join(line)}")
        self._hints(state, logs)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.stop()

    def stop(self) -> None:
        """Leave the bar as it is, and the terminal as it was. May be called twice."""
        atexit.unregister(self.stop)
        if self.progress is not None:
            self.progress.stop()
            self.progress = None
        if self._silenced:
            logging.enable_progress_bar()
            self._silenced = False

    def _print(self, line: str, **style: Any) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=not self.console.is_terminal, **style)

    def _hints(self, state: TrainerState, logs: Mapping[str, Any]) -> None:
        """What one should know and could miss, each once."""
        dead = _finite(logs.get("frac_reward_zero_std")) or 0.0
        if dead >= DEAD:
            self._hint(
                "dead groups",
                f"step {state.global_step}: in {dead:.0%} of the groups all rewards are equal, so their advantages are 0 and nothing is "
                "learnt from them. If the reward is high the task is done: take harder prompts. If it is low: easier ones, a reward with "
                "steps between 0 and 1, or a higher temperature.",
            )
        for key, value in logs.items():
            if (match := _FAILURES.fullmatch(key)) and value:
                self._hint(key, f"step {state.global_step}: {key} is {value:g}: reward {match[1]!r} {_MEANING[match[2]]}.")

    def _hint(self, what: str, text: str) -> None:
        if what not in self._hinted:
            self._hinted.add(what)
            self._print(text, style="yellow")


class _Bar(Progress):
    """One task, and its numbers below it."""

    def __init__(self, console: Console, step: int, steps: int) -> None:
        self.logs: dict[str, Any] = {}  # the last of each kind: a step without a rollout says nothing of rewards
        columns = (TextColumn("{task.description}"), BarColumn(None), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        super().__init__(*columns, console=console, expand=True)
        self._task = self.add_task(TRAINING, total=steps, completed=step)

    def show(self, **changes: Any) -> None:
        self.update(self._task, **changes)

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if words := numbers(self.logs):
            whole = "  ".join(word.replace(" ", "\xa0") for word in words)  # a number stays on the line of its name
            yield Text("\n".join(textwrap.wrap(whole, self.console.width)).replace("\xa0", " "))


class CompletionsCallback(TrainerCallback):
    """With ``log_completions``: some completions of the step that was logged, from the best to the worst, as a table above the progress
    bar; on a terminal only.

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
            print_completions(**read_completions(file), step=state.global_step, limit=self.limit, console=self.console)


def numbers(logs: Mapping[str, Any]) -> list[str]:
    """The numbers worth a glance, of those that are there: ``["reward 0.512 ±0.31", "entropy 0.294", ...]``; last the sampler's part of
    the time."""
    words: list[str] = []
    for key, name, form in _SHOWN:
        if (value := _finite(logs.get(key))) is None:
            continue
        if name == "±":
            words[-1:] = [f"{words[-1]} ±{form.format(value)}"] if words else []
        else:
            words.append(f"{name} {form.format(value)}")
    seconds = [value for key in logs if key.startswith("step_time/") and (value := _finite(logs[key])) is not None]
    generate = _finite(logs.get("step_time/generate"))
    if generate is not None and sum(seconds) > 0:
        words.append(f"sampling {generate / sum(seconds):.0%} of {sum(seconds):.1f} s")
    return words


def _evaluations(logs: Mapping[str, Any]) -> list[str]:
    """``["eval 0.812 ±0.011"]``: mean reward and standard error of each data set that was evaluated."""
    words = []
    for key, value in logs.items():
        if (match := _EVALUATION.fullmatch(key)) and (value := _finite(value)) is not None:
            error = _finite(logs.get(f"{key}_se"))
            words.append(f"{match[1]} {value:.3f}" + ("" if error is None else f" ±{error:.3f}"))
    return words


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None
