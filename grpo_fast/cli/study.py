"""The command ``grpo-fast study sampling | training``. Slow imports happen when one of the two runs."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from grpo_fast.cli.messages import exit_on_wrong_settings, print_error

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from grpo_fast.study.result_files import JSONObject
    from grpo_fast.study.training_study import TrainingStudy

__all__ = ["app"]

USAGE = """usage: grpo-fast study sampling --model M --dataset D --rewards R ... [--name value ...]
       grpo-fast study training [settings.yaml] [--name value ...]

Measure the effect of the temperature.

sampling: a causal language model at several sampling temperatures, on a dataset and with rewards named as for grpo-fast train: pass@1 with
its standard error, majority vote, repetition, loops, diversity, entropy; the temperature regions, the temperature to evaluate at and the
temperature to train at. A settings file of grpo-fast train can be given as the first argument; settings that sampling does not need are
ignored. Each call of the sampler gets whole groups, about 64 completions, or --per_device_eval_batch_size.

  grpo-fast study sampling --model demo --dataset demo --rewards accuracy format
  grpo-fast study sampling sums.yaml --temperatures 0 0.4 0.6 0.8 1.0 1.2 --rounds 8

training: a model trained at several temperatures, by schedules and with truncated sampling, each training evaluated at several
temperatures: the demonstration's model, or with --model, --dataset, --eval_dataset and --rewards (or a settings file of grpo-fast train)
one of your own. A model begins each training with its own weights.

  grpo-fast study training --temperatures 0.6 1.0 '0.6->1.4' --seeds 5
  grpo-fast study training sums.yaml --temperatures 0.6 1.0 --truncations none top_p=0.95 --max_steps 100

Both write JSON, CSV, a figure, and an HTML page with charts, tables and completions. Started again, they continue from the measurements
beside the JSON file (NAME.raw.json). --quick tests in about ten seconds whether a study runs.
"""
STUDIES = {  # the packages that each needs, and the extras that install them
    "sampling": (("transformers", "datasets", "accelerate", "matplotlib", "scipy"), ("train", "plot")),
    "training": (("transformers", "tokenizers", "datasets", "accelerate", "matplotlib", "scipy"), ("demo", "train")),
}
LOG_SECONDS = 30.0  # between two progress lines in a log file


def app(args: Sequence[str] | None = None, prog_name: str = "grpo-fast study") -> None:
    """Run the command. It exits with status 2 for a wrong setting, before any work; 1 if the study failed; 130 if it was interrupted.

    Args:
        args: of the command line.
        prog_name: name of the command in messages.
    """
    args = list(sys.argv[1:] if args is None else args)
    console = Console()
    wants_help = not args or "--help" in args or "-h" in args
    if wants_help and (not args or args[0] not in STUDIES):
        console.print(USAGE, highlight=False, markup=False, soft_wrap=True)
        raise SystemExit(0 if args else 2)
    study, rest = args[0], args[1:]
    if study not in STUDIES:
        print_error(f"{prog_name}: there is no study {study!r}; expected {' or '.join(STUDIES)}. See {prog_name} --help.")
        raise SystemExit(2)
    name = f"{prog_name} {study}"
    with exit_on_wrong_settings(name):
        from grpo_fast.utils.install_hints import require_packages

        modules, extras = STUDIES[study]
        require_packages(*modules, extras=extras, needed_by="the study")
    if wants_help:
        _print_help(study, console)
        raise SystemExit(0)
    from grpo_fast.generation import SamplerError
    from grpo_fast.rewards import RewardError

    try:
        path = _sampling(rest, name, console) if study == "sampling" else _training(rest, name, console)
    except (RewardError, SamplerError, FloatingPointError) as error:
        print_error(f"{name}: {error}")
        raise SystemExit(1) from error
    except KeyboardInterrupt as error:
        print_error(f"{name}: interrupted. Finished measurements are stored: the same command continues from there.")
        raise SystemExit(130) from error
    csv, png, html = (path.with_suffix(suffix).name for suffix in (".csv", ".png", ".html"))
    console.print(f"All numbers: {path}; also as {csv} and {png}; with completions as {html}.", highlight=False)


def _sampling(args: Sequence[str], name: str, console: Console) -> Path:
    with exit_on_wrong_settings(name):
        from grpo_fast.study.sampling_setup import load_model, prepare_sampling, study_threads

        study = prepare_sampling(args)
        with study_threads(study):
            model = load_model(study) if study.missing() else None
    from grpo_fast.study import page, plot, report, sampling
    from grpo_fast.study.result_files import write_measurements, write_result

    path = study.path

    def store(measurements: JSONObject) -> None:
        try:
            write_measurements(path, measurements)
        except OSError as error:  # continue: the tables are printed at the end, and writing may succeed then
            print_error(f"{name}: warning: finished measurements cannot be stored: {error}")

    with _progress_bar(console) as bar, study_threads(study):
        tasks = {temperature: bar.add_task(f"T = {temperature:g}", total=None) for temperature in study.temperatures}
        for temperature in study.temperatures:
            if temperature not in study.missing():
                bar.update(tasks[temperature], completed=1, total=1)
        result = sampling.run(study, model, _SamplingProgress(bar, tasks, console), store)
    for table in report.sampling_tables(result):
        console.print(report.as_rich(table))
    _print_advice(result["advice"]["sentences"], console)
    try:
        if study.result is None:
            write_result(path, result, study.measurements)
        report.write_sampling_csv(result, path.with_suffix(".csv"))
        plot.write_sampling_figure(result, path.with_suffix(".png"))
        page.write_sampling_page(result, path.with_suffix(".html"))
    except OSError as error:
        print_error(f"{name}: the result cannot be written: {error}")
        raise SystemExit(1) from error
    return path


class _SamplingProgress:
    """Shows the progress of each temperature as a bar; in a log file as a line at its beginning, its end, and every LOG_SECONDS."""

    def __init__(self, bar: Progress, tasks: dict[float, TaskID], console: Console) -> None:
        self.bar, self.tasks, self.console, self.last_line = bar, tasks, console, 0.0

    def __call__(self, temperature: float, done: int, total: int) -> None:
        self.bar.update(self.tasks[temperature], completed=done, total=total)
        if not self.console.is_terminal and (done in (0, total) or time.monotonic() > self.last_line + LOG_SECONDS):
            self.last_line = time.monotonic()
            self.console.print(f"T = {temperature:g}: {done} of {total} calls of the sampler", highlight=False)


def _training(args: Sequence[str], name: str, console: Console) -> Path:
    with exit_on_wrong_settings(name):
        from grpo_fast.demo.options import DemoOptions
        from grpo_fast.study import page, plot, report, training
        from grpo_fast.study.training_gains import not_learned
        from grpo_fast.study.training_study import BEFORE

        study = _prepare_training(args)
    with _progress_bar(console) as bar:
        total = study.seeds * len(study.variants) * study.steps
        task = bar.add_task("warm start", total=total)
        shown, since, steps_done = [(-1, "")], [0.0], [0]

        def on_step(seed: int, label: str, steps: int) -> None:
            untrained = label in (training.WARM_START, BEFORE)
            bar.update(task, description=f"seed {seed}, {label if untrained else f'T = {label}'}", advance=steps)
            begins = shown[0] != (seed, label)
            steps_done[0] = steps if begins else steps_done[0] + steps
            if not console.is_terminal and (begins or time.monotonic() > since[0] + LOG_SECONDS):
                shown[0], since[0] = (seed, label), time.monotonic()
                progress = "" if begins else f": {steps_done[0]} of {study.steps} steps"
                console.print(f"seed {seed}, {label if untrained else f'trained at {label}'}{progress}", highlight=False)

        result = training.run(study, on_step)
    report.write_training_csv(result, study.path.with_suffix(".csv"))
    plot.write_training_figure(result, study.path.with_suffix(".png"))
    page.write_training_page(result, study.path.with_suffix(".html"))
    for table in (
        report.evaluation_table(result),
        report.gain_table(result),
        report.training_table(result),
        report.first_step_table(result),
    ):
        if table is not None:
            console.print(report.as_rich(table))
    _print_advice(result["advice"]["sentences"], console)
    if not isinstance(study.subject, DemoOptions) and study.subject.options.require_gain and (labels := not_learned(result)):
        print_error(
            f"{name}: the held-out accuracy did not rise by more than twice its standard error when trained at {'; '.join(labels)}. "
            f"All numbers: {study.path}. Fix: more --max_steps, --seeds or held-out questions, or leave out --require_gain."
        )
        raise SystemExit(1)
    return study.path


def _prepare_training(args: Sequence[str]) -> TrainingStudy:
    """Prepare a study of the demonstration's model, or of the model that ``--model`` or a settings file names."""
    names_model = bool(args) and (not args[0].startswith("-") or any(each.partition("=")[0] == "--model" for each in args))
    if names_model:
        from grpo_fast.study.model_training import prepare_model_training

        return prepare_model_training(args)
    from grpo_fast.study.training_setup import prepare_training

    return prepare_training(args)


def _progress_bar(console: Console) -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    clocks = (MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(TextColumn("{task.description:<24}"), BarColumn(bar_width=16), *clocks, console=console)


def _print_advice(sentences: Sequence[str], console: Console) -> None:
    for sentence in sentences:
        console.print(f"- {sentence}", highlight=False, markup=False)


def _print_help(study: str, console: Console) -> None:
    console.print(USAGE, highlight=False, markup=False, soft_wrap=True)
    from dataclasses import fields, make_dataclass

    from grpo_fast.trainer.run_settings_help import option_table, reward_table

    if study == "training":
        from grpo_fast.study.model_training import ModelTrainingOptions
        from grpo_fast.study.training_setup import TrainingOptions

        console.print(option_table("With the demonstration's model", TrainingOptions, [each.name for each in fields(TrainingOptions)]))
        names = [each.name for each in fields(ModelTrainingOptions)]
        console.print(option_table("With a model of your own (and all settings of GRPOConfig)", ModelTrainingOptions, names))
        return
    from grpo_fast.study.sampling_setup import BATCH_SIZE, CONFIG_SETTINGS, NOT_READ, SHARED, SamplingOptions
    from grpo_fast.trainer.config import GRPOConfig

    config = make_dataclass("Config", [(each, int, value) for each, value in BATCH_SIZE.items()], bases=(GRPOConfig,))  # own defaults
    own = [each.name for each in fields(SamplingOptions) if each.name not in (*SHARED, *NOT_READ)]
    console.print(option_table("What is measured", SamplingOptions, own))
    console.print(option_table("Model, data and rewards, as for grpo-fast train", SamplingOptions, SHARED))
    console.print(option_table("Sampling, as for grpo-fast train", config, CONFIG_SETTINGS))
    console.print(reward_table())
