"""``grpo-fast study sampling | training``: the command. What is slow to import is imported when one of the two runs."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

__all__ = ["app"]

USAGE = """usage: grpo-fast study sampling --model M --dataset D --rewards R ... [--name value ...]
       grpo-fast study training [--name value ...]

What the temperature does.

sampling: a causal language model at several sampling temperatures, on a dataset and with rewards named as for grpo-fast train: pass@1 with
its standard error, majority vote, repetition, loops, diversity, entropy; the zones, the temperature to evaluate at and the one to train at.
A settings file of grpo-fast train can be given in the first place; what sampling does not read of it plays no part. Whole groups are drawn
at once, about 64 completions, or --per_device_eval_batch_size.

  grpo-fast study sampling --model demo --dataset demo --rewards accuracy format
  grpo-fast study sampling sums.yaml --temperatures 0 0.4 0.6 0.8 1.0 1.2 --rounds 8

training: the demonstration's model trained at several temperatures and by schedules, each evaluated at several.

  grpo-fast study training --temperatures 0.6 1.0 '0.6->1.4' --seeds 5

Both write JSON, CSV and a figure, and go on from the JSON file if they are started again. --quick shows in some ten seconds whether it
runs.
"""
STUDIES = {  # with the packages that each needs, and the extras that bring them
    "sampling": (("transformers", "datasets", "accelerate", "matplotlib", "scipy"), ("train", "plot")),
    "training": (("transformers", "tokenizers", "datasets", "accelerate", "matplotlib", "scipy"), ("demo", "train")),
}


def app(args: Sequence[str] | None = None, prog_name: str = "grpo-fast study") -> None:
    """The command. Exit status 2: a setting is wrong, said in one line and before any work. 1: it could not go on. 130: interrupted.

    Args:
        args: of the command line.
        prog_name: for messages.
    """
    args = list(sys.argv[1:] if args is None else args)
    console = Console()
    wants_help = not args or "--help" in args or "-h" in args
    if wants_help and (not args or args[0] not in STUDIES):
        console.print(USAGE, highlight=False, markup=False, soft_wrap=True)
        raise SystemExit(0 if args else 2)
    study, rest = args[0], args[1:]
    if study not in STUDIES:
        _say(f"{prog_name}: there is no study {study!r}; expected {' or '.join(STUDIES)}. See {prog_name} --help.")
        raise SystemExit(2)
    name = f"{prog_name} {study}"
    with _wrong_settings(name):
        from grpo_fast.utils.install_hints import require_packages

        modules, extras = STUDIES[study]
        require_packages(*modules, extras=extras, needed_by="the study")
    if wants_help:
        _help(study, console)
        raise SystemExit(0)
    from grpo_fast.generation import SamplerError
    from grpo_fast.rewards import RewardError

    try:
        path = _sampling(rest, name, console) if study == "sampling" else _training(rest, name, console)
    except (RewardError, SamplerError, FloatingPointError) as error:
        _say(f"{name}: {error}")
        raise SystemExit(1) from error
    except KeyboardInterrupt as error:
        _say(f"{name}: interrupted. What is finished is in the JSON file: the same command goes on from there.")
        raise SystemExit(130) from error
    console.print(f"Every number: {path}; also as {path.with_suffix('.csv').name} and {path.with_suffix('.png').name}.", highlight=False)


def _sampling(args: Sequence[str], name: str, console: Console) -> Path:
    with _wrong_settings(name):
        from grpo_fast.study.sampling_setup import load_model, prepare, threads_of
        from grpo_fast.trainer.config import GRPOConfig

        prepared = prepare(args, GRPOConfig)
        with threads_of(prepared):
            model = load_model(prepared) if prepared.missing() else None
    from grpo_fast.study import plot, report, sampling
    from grpo_fast.utils.files import write_json

    path = prepared.path

    def keep(result: dict[str, Any]) -> None:
        try:
            write_json(path, result)
        except OSError as error:  # the measurement goes on: it may be written in the end, and its tables are printed before that
            _say(f"{name}: warning: what is finished cannot be kept: {error}")

    with _progress(console) as bar, threads_of(prepared):
        tasks = {temperature: bar.add_task(f"T = {temperature:g}", total=None) for temperature in prepared.temperatures}
        for temperature in prepared.temperatures:
            if temperature not in prepared.missing():
                bar.update(tasks[temperature], completed=1, total=1)
        result = sampling.run(prepared, model, _Calls(bar, tasks, console), keep)
    for table in report.sampling_tables(result):
        console.print(report.as_rich(table))
    _print_reading(result["reading"]["sentences"], console)
    try:
        write_json(path, result)
        report.write_sampling_csv(result, path.with_suffix(".csv"))
        plot.write_sampling_figure(result, path.with_suffix(".png"))
    except OSError as error:
        _say(f"{name}: the result cannot be written: {error}")
        raise SystemExit(1) from error
    return path


class _Calls:
    """Tells how far it is: in a terminal by a bar; in a log file, which has no live bar, by a line at the beginning, the end, and between
    them every half a minute.
    """

    def __init__(self, bar: Any, tasks: dict[float, Any], console: Console) -> None:
        self.bar, self.tasks, self.console, self.told = bar, tasks, console, 0.0

    def __call__(self, temperature: float, done: int, total: int) -> None:
        self.bar.update(self.tasks[temperature], completed=done, total=total)
        if not self.console.is_terminal and (done in (0, total) or time.monotonic() > self.told + 30):
            self.told = time.monotonic()
            self.console.print(f"T = {temperature:g}: {done} of {total} calls of the sampler", highlight=False)


def _training(args: Sequence[str], name: str, console: Console) -> Path:
    with _wrong_settings(name):
        from grpo_fast.study import plot, report, training, training_setup

        prepared = training_setup.prepare(args)
    with _progress(console) as bar:
        total = prepared.seeds * len(prepared.schedules) * prepared.demo.steps
        task = bar.add_task("warm start", total=total)
        shown = [(-1, "")]

        def on_step(seed: int, label: str, steps: int) -> None:
            begins = label in (training.WARM_START, training_setup.BEFORE)
            bar.update(task, description=f"seed {seed}, {label if begins else f'T = {label}'}", advance=steps)
            if not console.is_terminal and shown[0] != (seed, label):
                shown[0] = seed, label
                console.print(f"seed {seed}, {label if begins else f'trained at {label}'}", highlight=False)

        result = training.run(prepared, on_step)
    report.write_training_csv(result, prepared.path.with_suffix(".csv"))
    plot.write_training_figure(result, prepared.path.with_suffix(".png"))
    for table in (report.matrix_table(result), report.training_table(result)):
        console.print(report.as_rich(table))
    _print_reading(result["reading"]["sentences"], console)
    return prepared.path


@contextmanager
def _wrong_settings(name: str) -> Iterator[None]:
    """What is wrong with them is said in one line, and so are warnings."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *where, **more: _say(f"{name}: warning: {message}")
        try:
            yield
        except (ValueError, TypeError, ImportError, OSError) as error:
            _say(f"{name}: {error}")
            raise SystemExit(2) from error


def _progress(console: Console) -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    clocks = (MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(TextColumn("{task.description:<24}"), BarColumn(bar_width=16), *clocks, console=console)


def _print_reading(sentences: Sequence[str], console: Console) -> None:
    for sentence in sentences:
        console.print(f"- {sentence}", highlight=False, markup=False)


def _help(study: str, console: Console) -> None:
    console.print(USAGE, highlight=False, markup=False, soft_wrap=True)
    from dataclasses import fields, make_dataclass

    from grpo_fast.trainer.run_settings import option_table, reward_table

    if study == "training":
        from grpo_fast.study.training_setup import TrainingOptions

        console.print(option_table("Options", TrainingOptions, [each.name for each in fields(TrainingOptions)]))
        return
    from grpo_fast.study.sampling_setup import AT_ONCE, NOT_READ, SAMPLED_BY, SHARED, SamplingOptions
    from grpo_fast.trainer.config import GRPOConfig

    config = make_dataclass("Config", [(each, int, value) for each, value in AT_ONCE.items()], bases=(GRPOConfig,))  # its own defaults
    own = [each.name for each in fields(SamplingOptions) if each.name not in (*SHARED, *NOT_READ)]
    console.print(option_table("What is measured", SamplingOptions, own))
    console.print(option_table("Model, data and rewards, as of grpo-fast train", SamplingOptions, SHARED))
    console.print(option_table("How it is sampled, as of grpo-fast train", config, SAMPLED_BY))
    console.print(reward_table())


def _say(message: str) -> None:
    console = Console(stderr=True)
    console.print(message, highlight=False, markup=False, soft_wrap=not console.is_terminal)
