"""The figures of the two studies.

``result`` is what the JSON file holds: of `grpo_fast.study.sampling.run`, or of `grpo_fast.study.training.run`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grpo_fast.study.options import name_of
from grpo_fast.study.temperature_regions import COLD, COLLAPSE, ENTROPY_TARGET, EXPLORATION, ROBUST
from grpo_fast.utils.files import write_atomically
from grpo_fast.utils.plot_style import COLOURS, LINE_STYLES

__all__ = ["write_sampling_figure", "write_training_figure"]

SHADES = {COLD: "#dbe9f6", ROBUST: "#ddf0e4", EXPLORATION: "#fdf1d3", COLLAPSE: "#f8ddd6"}


def write_sampling_figure(result: dict[str, Any], path: Path) -> None:
    """Six panels over the sampling temperature, shaded by zone, with standard errors over the prompts."""
    k, rows = result["options"]["samples"], result["rows"]
    panels = (
        ("Right answers", "share of prompts", (("pass_at_1", "pass@1"), ("pass_at_k", f"pass@{k}"), ("cons_at_k", f"majority of {k}"))),
        (
            "Diversity and signal",
            "share",
            (
                ("distinct", "distinct in a group"),
                ("zero_std", "groups with equal rewards"),
                ("zero_std_correct", "of the judging reward alone"),
            ),
        ),
        ("Entropy", "nats a token", (("entropy", "of softmax(z/T)"), ("entropy_at_1", "of softmax(z), same tokens"))),
        (
            "Repetition",
            "share",
            (("truncated", "cut at the limit"), ("endless", "cut, in a loop"), ("repetition", "repeated n-grams")),
        ),
        ("Form", "share", (("format", "format"), ("coherence", "coherence"))),
        ("Length", "tokens", (("length", "completion"),)),
    )
    figure, axes = _figure(2, 3)
    for axis, (title, label, series) in zip(axes, panels, strict=True):
        _shade(axis, result)
        lines = [_line(axis, rows, name, words, COLOURS[i], "os^"[i]) for i, (name, words) in enumerate(series)]
        axis.set(title=title, xlabel="sampling temperature", ylabel=label)
        if label.startswith("share"):
            axis.set_ylim(-0.02, 1.02)
        elif title != "Entropy":
            axis.set_ylim(bottom=0)
        if title == "Entropy":
            axis.axhline(ENTROPY_TARGET, color="#767676", linewidth=0.8, linestyle=":", label=f"{ENTROPY_TARGET:g} (arXiv:2506.13284)")
        if any(lines):
            axis.legend(frameon=False, fontsize=8)
    options = result["options"]
    drawn = f"{result['prompts']} prompts, {options['rounds']} x {k} samples each"
    what = "The demonstration's model before GRPO" if options["model"] == "demo" else f"{options['model']} on {options['dataset']}"
    names = dict.fromkeys(zoned["zone"] for zoned in result["reading"]["zones"])
    handles = [_patch(SHADES[name]) for name in names]
    figure.suptitle(f"{what}: {drawn}; bars: standard errors over the prompts", fontsize=10)
    if handles:
        figure.legend(handles, list(names), loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    write_atomically(path, lambda partial: figure.savefig(partial, format="png"))


def write_training_figure(result: dict[str, Any], path: Path) -> None:
    """Accuracy by evaluation temperature, the matrix, and four learning curves; means over the seeds with their standard errors."""
    places = [name_of(temperature) for temperature in result["options"]["eval_temperatures"]]
    labels = result["trained_at"]
    figure, axes = _figure(2, 3)
    for i, label in enumerate(labels):
        cells = [result["matrix"][label][place]["accuracy"] for place in places]
        colour, style = _look(i)
        axes[0].errorbar(
            [float(place) for place in places],
            [cell["mean"] for cell in cells],
            [cell["error"] or 0.0 for cell in cells],
            color=colour,
            linestyle=style,
            marker="o",
            markersize=3,
            capsize=2,
            label="before GRPO" if i == 0 else f"trained at {label}",
        )
    axes[0].set(title="Accuracy", xlabel="evaluation temperature", ylabel="held-out questions", ylim=(-0.02, 1.02))
    handles, words = axes[0].get_legend_handles_labels()
    figure.legend(handles, words, loc="outside lower center", ncols=len(words), frameon=False, fontsize=9)
    _matrix(axes[1], result, places)
    curves = (
        ("accuracy", "Accuracy in training, each at its own T", "share"),
        ("zero_std", "Groups with equal rewards", "share"),
        ("entropy", "Entropy of softmax(z/T)", "nats a token"),
        ("distinct", "Distinct completions in a group", "share"),
    )
    for axis, (name, title, unit) in zip(axes[2:], curves, strict=True):
        for i, label in enumerate(labels[1:], start=1):
            runs = [run["curves"][name] for run in result["runs"] if run["trained_at"] == label and run["seed"] < result["seeds"]]
            _band(axis, runs, *_look(i))
        axis.set(title=title, xlabel="step", ylabel=unit)
        axis.set_ylim(*((-0.02, 1.02) if unit == "share" else (0, None)))
    told = result["options"]
    figure.suptitle(
        f"The demonstration's model (0.1 M parameters) trained at several temperatures: {told['steps']} steps of {told['prompts']} x "
        f"{told['group_size']} completions, {told['loss_type']}, {result['seeds']} seeds; bars and bands: standard errors over the seeds",
        fontsize=10,
    )
    write_atomically(path, lambda partial: figure.savefig(partial, format="png"))


def _figure(rows: int, columns: int) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # no pyplot: nothing global is touched, no window is opened

    figure = Figure(figsize=(4.2 * columns, 3.3 * rows + 0.5), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns).flatten()
    for axis in axes:
        axis.grid(color="#dddddd", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        axis.title.set_fontsize(10)
    return figure, axes


def _line(axis: Any, rows: Sequence[dict[str, Any]], name: str, words: str, colour: str, marker: str) -> bool:
    """A measure over T; one that is nowhere is left out."""
    there = [row for row in rows if row[name] is not None]
    if not there:
        return False
    means = [row[name]["mean"] if isinstance(row[name], dict) else row[name] for row in there]
    errors = [(row[name]["error"] or 0.0) if isinstance(row[name], dict) else 0.0 for row in there]
    look = {"color": colour, "marker": marker, "markersize": 4, "capsize": 2, "label": words}
    axis.errorbar([row["temperature"] for row in there], means, errors, **look)
    return True


def _shade(axis: Any, result: dict[str, Any]) -> None:
    """Each temperature's zone, up to halfway to its neighbours."""
    zones = result["reading"]["zones"]
    places = [zoned["temperature"] for zoned in zones]
    for i, zoned in enumerate(zones):
        left = (places[i - 1] + places[i]) / 2 if i else places[0] - 0.05
        right = (places[i] + places[i + 1]) / 2 if i + 1 < len(zones) else places[-1] + 0.05
        axis.axvspan(left, right, color=SHADES[zoned["zone"]], linewidth=0, zorder=0)


def _patch(colour: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(facecolor=colour)


def _matrix(axis: Any, result: dict[str, Any], places: list[str]) -> None:
    labels = result["trained_at"]
    values = [[result["matrix"][label][place]["accuracy"]["mean"] for place in places] for label in labels]
    axis.imshow(values, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            axis.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=8, color="black" if value > 0.6 else "white")
    axis.grid(visible=False)
    axis.set_xticks(range(len(places)), places)
    axis.set_yticks(range(len(labels)), labels)
    axis.set(title="Accuracy: trained at, evaluated at", xlabel="evaluation temperature", ylabel="training temperature")


def _band(axis: Any, runs: Sequence[Sequence[float]], colour: str, style: str) -> None:
    columns = list(zip(*runs, strict=True))
    means = [math.fsum(column) / len(column) for column in columns]
    steps = range(1, len(means) + 1)
    axis.plot(steps, means, color=colour, linestyle=style, linewidth=1.6)
    if len(runs) > 1:
        from grpo_fast.study.estimates import estimate

        errors = [estimate(column).error for column in columns]
        low, high = ([mean + sign * error for mean, error in zip(means, errors, strict=True)] for sign in (-1, 1))
        axis.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)


def _look(i: int) -> tuple[str, str]:
    """Black for what it was before."""
    return (
        (COLOURS[-1], "--")
        if i == 0
        else (COLOURS[(i - 1) % (len(COLOURS) - 1)], LINE_STYLES[(i - 1) // (len(COLOURS) - 1) % len(LINE_STYLES)])
    )
