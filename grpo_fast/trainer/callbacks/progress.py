"""The live progress bar: completed steps, remaining time and the metrics that show whether a run is healthy."""

from __future__ import annotations

import atexit
import math
import re
import textwrap
from collections.abc import Iterable, Mapping

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

__all__ = ["ProgressBarCallback", "format_metrics"]

# key of the log, label on the screen, number format
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
_EVALUATION = re.compile(r"(eval(?:_.+)?)_reward")  # of a single evaluation dataset, or of one of several by name
_FAILURES = re.compile(r"rewards/(.+)/(timeouts|errors|scorer_raised)")
_MEANING = {
    "timeouts": "took too long, and does not apply to the completions it had no time for",
    "errors": "failed or returned something that is not a number, and does not apply there",
    "scorer_raised": "met answers for which the task's own score function raises an exception, and scores them as wrong",
}
TRAINING = "GRPO"
ZERO_STD_HINT = 0.8  # share of groups with equal rewards from which a hint is printed, once
DEAD_STEPS_HINT = 50  # steps without any group of unequal rewards, after which another one is printed, once


class ProgressBarCallback(TrainerCallback):
    """A rich progress bar with reward, entropy, repetition, groups with equal rewards, clipped tokens, KL and speed.

    On a terminal it shows a live bar with the metrics below it, on as many lines as they need. Elsewhere (a file, a pipe, CI) it prints a
    plain line per log call. Each evaluation prints a line that stays. Only the first process prints. While training runs, transformers'
    progress bars for the files of a checkpoint are disabled.

    Args:
        console: where to print; None = standard error, so that standard output is free for results.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console if console is not None else Console(stderr=True)
        self.progress: _Bar | None = None
        self._hinted: set[str] = set()
        self._last_live_step = 0  # the last step that had a group of unequal rewards, or the one before the first
        self._disabled_bars = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        self.stop()
        self._last_live_step = state.global_step
        if not state.is_world_process_zero:
            return
        self._disabled_bars = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        atexit.register(self.stop)  # an error or an interrupt ends training without on_train_end, and would leave the cursor hidden
        if self.console.is_terminal:
            self.progress = _Bar(self.console, state.global_step, state.max_steps)
            self.progress.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        if self.progress is not None:
            self.progress.show(completed=state.global_step, description="evaluating" if control.should_evaluate else TRAINING)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        if self.progress is not None:
            self.progress.show(description=TRAINING)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float] | None = None, **kwargs: object
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        metrics, evaluations = format_metrics(logs), _format_evaluations(logs)
        if self.progress is not None:
            self.progress.logs |= logs
        lines = [evaluations] if self.progress is not None else [metrics, evaluations]
        for line in filter(None, lines):
            self._print(f"step {state.global_step}/{state.max_steps}  {'  '.join(line)}")
        self._hints(state, logs)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop the live bar and restore the terminal. A second call does nothing."""
        atexit.unregister(self.stop)
        if self.progress is not None:
            self.progress.stop()
            self.progress = None
        if self._disabled_bars:
            logging.enable_progress_bar()
            self._disabled_bars = False

    def _print(self, line: str, *, style: str | None = None) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=not self.console.is_terminal, style=style)

    def _hints(self, state: TrainerState, logs: Mapping[str, object]) -> None:
        """Print problems that are easy to miss, each of them once per run."""
        share = _finite(logs.get("frac_reward_zero_std")) or 0.0
        if share >= ZERO_STD_HINT:
            self._hint(
                "dead groups",
                f"step {state.global_step}: in {share:.0%} of the groups all rewards are equal, so their advantages are 0 and they "
                "do not train the model. If the reward is high, use harder prompts. If it is low, use easier prompts, a reward with steps "
                "between 0 and 1, or a higher temperature.",
            )
        if "frac_reward_zero_std" in logs:
            if share < 1.0:
                self._last_live_step = state.global_step
            elif state.global_step - self._last_live_step >= DEAD_STEPS_HINT:
                self._hint(
                    "dead steps",
                    f"step {state.global_step}: for {state.global_step - self._last_live_step} steps all rewards have been equal in every "
                    "group, so the reward has not trained the model in any of them. Fix: stop the run, look at completions and rewards "
                    "(--log_completions), and start again with other prompts, another reward, or more completions per prompt "
                    "(--num_generations).",
                )
        for key, value in logs.items():
            if (match := _FAILURES.fullmatch(key)) and value:
                self._hint(key, f"step {state.global_step}: {key} is {value:g}: reward {match[1]!r} {_MEANING[match[2]]}.")

    def _hint(self, topic: str, text: str) -> None:
        if topic not in self._hinted:
            self._hinted.add(topic)
            self._print(text, style="yellow")


class _Bar(Progress):
    """A progress bar for one task, with the latest metrics below it."""

    def __init__(self, console: Console, step: int, steps: int) -> None:
        self.logs: dict[str, float] = {}  # latest value of each metric: a step without a new rollout logs no rewards
        columns = (TextColumn("{task.description}"), BarColumn(None), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        super().__init__(*columns, console=console, expand=True)
        self._task = self.add_task(TRAINING, total=steps, completed=step)

    def show(self, completed: int | None = None, description: str | None = None) -> None:
        self.update(self._task, completed=completed, description=description)

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if metrics := format_metrics(self.logs):
            line = "  ".join(metric.replace(" ", "\xa0") for metric in metrics)  # wrap between metrics, never between a name and its value
            yield Text("\n".join(textwrap.wrap(line, self.console.width)).replace("\xa0", " "))


def format_metrics(logs: Mapping[str, object]) -> list[str]:
    """Format the metrics for the screen that ``logs`` contains: ``["reward 0.512 ±0.31", "entropy 0.294", ...]``, last the share of the
    time that sampling takes.
    """
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


def _format_evaluations(logs: Mapping[str, object]) -> list[str]:
    """Format mean reward and standard error of each evaluated dataset: ``["eval 0.812 ±0.011"]``."""
    words = []
    for key, value in logs.items():
        if (match := _EVALUATION.fullmatch(key)) and (value := _finite(value)) is not None:
            error = _finite(logs.get(f"{key}_se"))
            words.append(f"{match[1]} {value:.3f}" + ("" if error is None else f" ±{error:.3f}"))
    return words


def _finite(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None
