"""Draws the metrics files of one or several runs: ``grpo-fast plot``."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_fast.trainer.metrics_file import Record, RunError, read_run
from grpo_fast.utils.files import write_atomically
from grpo_fast.utils.plot_style import COLOURS, LINE_STYLES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["PANELS", "metric_series", "plot_runs"]

PANELS = (  # title, key of the log, label of the y axis, factor
    ("Reward", "reward", "reward", 1),
    ("Entropy of softmax(z/T)", "entropy", "nats a token", 1),
    ("Groups with equal rewards", "frac_reward_zero_std", "%", 100),
    ("Repetition", "completions/repetition", "% of n-grams", 100),
    ("Length", "completions/mean_length", "tokens", 1),
    ("Cut at the length limit", "completions/clipped_ratio", "%", 100),
    ("Clipped tokens", "clip_ratio/region_mean", "%", 100),
    ("KL to the reference", "kl", "nats a token", 1),
    ("Temperature", "temperature", "T", 1),
    ("Gradient norm", "grad_norm", "norm", 1),
    ("Speed", "tokens_per_second", "tokens/s", 1),
    ("Time of a step", "step_time", "seconds", 1),
    ("Loss", "loss", "loss", 1),
)
DOTTED = {  # title -> (pattern of further keys, drawn dotted and with their standard errors where those were logged; what they are)
    "Reward": (r"eval(_.+)?_reward", "evaluation"),
    "Length": (r"completions/mean_terminated_length", "those that ended"),
    "Time of a step": (r"step_time/generate", "sampling"),
}


def metric_series(records: Sequence[Record], key: str) -> tuple[list[float], list[float]]:
    """Steps and values of a metric, where it was logged as a finite number. If a step has several values, the last one counts."""
    points: dict[float, float] = {}
    for record in records:
        value = record.get(key)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            points[float(record.get("step", len(points)))] = float(value)
    return list(points), list(points.values())


def plot_runs(runs: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str], *, smooth: int = 1) -> list[str]:
    """Draw every metric that at least one run has logged into one figure.

    Args:
        runs: folders of runs (their ``output_dir``) or metrics files; several are drawn over each other.
        output: file name that ends in .png, .pdf or .svg. The file is written atomically.
        smooth: width of a running mean, in points; the unsmoothed curve stays visible behind it.

    Returns:
        The titles of the panels.

    Raises:
        RunError: a run is missing or empty, or has none of the metrics.
        ValueError: matplotlib cannot write a file with this suffix, or ``smooth`` is below 1.
    """
    if not runs:
        raise RunError("no run was given; expected at least one folder or metrics file.")
    if smooth < 1:
        raise ValueError(f"smooth is {smooth}; expected at least 1, which leaves the curves as they are.")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # not pyplot, which has global state and may open a window

    output = Path(output)
    file_format = output.suffix.lstrip(".").lower()
    if file_format not in FigureCanvasAgg(Figure()).get_supported_filetypes():
        raise ValueError(f"output is {str(output)!r}; expected a name that ends in .png, .pdf or .svg.")
    data = [(_run_name(run, runs), [_with_step_time(record) for record in read_run(run)]) for run in runs]
    panels = [panel for panel in PANELS if any(metric_series(records, panel[1])[0] for _, records in data)]
    if (
        len({value for _, records in data for value in metric_series(records, "temperature")[1]}) == 1
    ):  # a constant temperature needs no panel
        panels = [panel for panel in panels if panel[1] != "temperature"]
    if not panels:
        known = ", ".join(sorted({key for _, records in data for key in records[0] if key != "step"})[:12])
        raise RunError(f"{', '.join(name for name, _ in data)}: none of the metrics to draw; the first line has {known or 'only a step'}.")
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.4 * columns, 2.9 * rows + 0.4), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, panel in zip(axes, panels, strict=False):
        _draw_panel(axis, panel, data, smooth)
    for axis in axes[len(panels) :]:
        axis.remove()
    if len(data) > 1:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=min(len(data), 4), frameon=False)
    else:
        figure.suptitle(data[0][0], fontsize=11)
    write_atomically(output, lambda partial: figure.savefig(partial, format=file_format))
    return [panel[0] for panel in panels]


def _with_step_time(record: Record) -> Record:
    """Add the seconds of the whole step, the sum of its parts, to a record."""
    parts = [value for key, value in record.items() if key.startswith("step_time/") and isinstance(value, (int, float))]
    return record | ({"step_time": sum(parts)} if parts else {})


def _draw_panel(axis: Axes, panel: tuple[str, str, str, int], data: Sequence[tuple[str, list[Record]]], smooth: int) -> None:
    title, key, label, factor = panel
    pattern, dotted_what = DOTTED.get(title, ("", ""))
    dotted = False
    for number, (name, records) in enumerate(data):
        colour, style = COLOURS[number % len(COLOURS)], LINE_STYLES[number // len(COLOURS) % len(LINE_STYLES)]
        _draw_curve(axis, *metric_series(records, key), factor, colour, style, name, smooth)
        dotted |= _draw_dotted(axis, records, pattern, colour)
    axis.set(title=f"{title} (dotted: {dotted_what})" if dotted else title, xlabel="step", ylabel=label)
    axis.title.set_fontsize(10)
    if factor == 100:  # a share: the axis starts at 0, so that a flat line of zeros is at the bottom
        axis.set_ylim(0, max(axis.get_ylim()[1], 1))
    axis.grid(color="#dddddd", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)


def _draw_curve(
    axis: Axes, steps: list[float], values: list[float], factor: float, colour: str, style: str, name: str, smooth: int
) -> None:
    values = [factor * value for value in values]
    if smooth > 1:
        axis.plot(steps, values, color=colour, linewidth=0.7, alpha=0.35)
        half = smooth // 2
        windows = [values[max(i - half, 0) : i + half + 1] for i in range(len(values))]
        values = [sum(window) / len(window) for window in windows]
    marker: dict[str, Any] = {"marker": "o", "markersize": 4} if len(values) == 1 else {}
    axis.plot(steps, values, color=colour, linewidth=1.6, linestyle=style, label=name, **marker)


def _draw_dotted(axis: Axes, records: Sequence[Record], pattern: str, colour: str) -> bool:
    """Draw the metrics whose keys match a pattern, dotted. Return whether any key matches."""
    keys = dict.fromkeys(key for record in records for key in record if re.fullmatch(pattern, key))
    for key in keys:
        steps, values = metric_series(records, key)
        axis.plot(steps, values, color=colour, linewidth=1.2, linestyle=":")
        errors = dict(zip(*metric_series(records, f"{key}_se"), strict=True))
        if errors:
            axis.errorbar(steps, values, [errors.get(step, 0.0) for step in steps], fmt="o", color=colour, markersize=3, capsize=2)
    return bool(keys)


def _run_name(run: str | os.PathLike[str], runs: Sequence[str | os.PathLike[str]]) -> str:
    """The name of the run's folder, with its parent folder if several runs have the same name."""
    folders = [(Path(each) if Path(each).is_dir() else Path(each).parent).resolve() for each in runs]
    own = (Path(run) if Path(run).is_dir() else Path(run).parent).resolve()
    return own.name if sum(folder.name == own.name for folder in folders) == 1 else "/".join(own.parts[-2:])
