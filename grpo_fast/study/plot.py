"""The figures of a study. ``result`` is what the published JSON file holds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from grpo_fast.study.options import temperature_name
from grpo_fast.study.result_files import JSONObject
from grpo_fast.study.temperature_regions import COLD, COLLAPSE, ENTROPY_TARGET, EXPLORATION, ROBUST
from grpo_fast.study.training_summary import CurveJSON
from grpo_fast.utils.files import write_atomically
from grpo_fast.utils.plot_style import COLOURS, LINE_STYLES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

__all__ = ["sampling_figure", "training_figure", "training_title", "write_sampling_figure", "write_training_figure"]

LONG_LABEL, LEGEND_COLUMNS = 24, 3  # characters of a label from which on the legend has so many columns
SHADES = {COLD: "#dbe9f6", ROBUST: "#ddf0e4", EXPLORATION: "#fdf1d3", COLLAPSE: "#f8ddd6"}


def write_sampling_figure(result: JSONObject, path: Path) -> None:
    """Write `sampling_figure` as PNG."""
    figure = sampling_figure(result)
    write_atomically(path, lambda partial: figure.savefig(partial, format="png"))


def write_training_figure(result: JSONObject, path: Path) -> None:
    """Write `training_figure` as PNG."""
    figure = training_figure(result)
    write_atomically(path, lambda partial: figure.savefig(partial, format="png"))


def sampling_figure(result: JSONObject) -> Figure:
    """Draw six panels over the sampling temperature, shaded by region, with standard errors over the prompts."""
    k, rows = result["options"]["samples"], result["rows"]
    panels = (
        ("Correct answers", "share of prompts", (("pass_at_1", "pass@1"), ("pass_at_k", f"pass@{k}"), ("cons_at_k", f"majority of {k}"))),
        (
            "Diversity and gradient",
            "share",
            (
                ("distinct", "distinct in a group"),
                ("zero_std", "groups with equal rewards"),
                ("zero_std_correct", "of the correctness reward alone"),
            ),
        ),
        ("Entropy", "nats per token", (("entropy", "of softmax(z/T)"), ("entropy_at_1", "of softmax(z), same tokens"))),
        (
            "Repetition",
            "share",
            (("truncated", "truncated"), ("endless", "truncated, in a loop"), ("repetition", "repeated n-grams")),
        ),
        ("Form", "share", (("format", "format"), ("coherence", "coherence"))),
        ("Length", "tokens", (("length", "completion"),)),
    )
    figure, axes = _figure(2, 3)
    for axis, (title, label, series) in zip(axes, panels, strict=True):
        _shade(axis, result)
        lines = [_draw_measure(axis, rows, name, words, COLOURS[i], "os^"[i]) for i, (name, words) in enumerate(series)]
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
    size = f"{result['prompts']} prompts, {options['rounds']} x {k} samples each"
    model = "The demonstration's model before GRPO" if options["model"] == "demo" else f"{options['model']} on {options['dataset']}"
    names = dict.fromkeys(one["region"] for one in result["advice"]["regions"])
    handles = [_patch(SHADES[name]) for name in names]
    figure.suptitle(f"{model}: {size}; bars: standard errors over the prompts", fontsize=10)
    if handles:
        figure.legend(handles, list(names), loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    return figure


def training_figure(result: JSONObject) -> Figure:
    """Draw accuracy by evaluation temperature, as lines and as a table, and four learning curves; means over the seeds with errors."""
    places = [temperature_name(temperature) for temperature in result["options"]["eval_temperatures"]]
    labels = result["trained_at"]
    figure, axes = _figure(2, 3)
    for i, label in enumerate(labels):
        cells = [result["evaluation"][label][place]["accuracy"] for place in places]
        colour, style = _line_style(i)
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
    columns = len(words) if max(map(len, words)) < LONG_LABEL else LEGEND_COLUMNS
    figure.legend(handles, words, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    _draw_accuracy_table(axes[1], result, places)
    curves = (
        ("accuracy", "Accuracy in training, each at its own T", "share"),
        ("zero_std", "Groups with equal rewards", "share"),
        ("entropy", "Entropy of softmax(z/T)", "nats per token"),
        ("distinct", "Distinct completions in a group", "share"),
    )
    for axis, (name, title, unit) in zip(axes[2:], curves, strict=True):
        for i, label in enumerate(labels[1:], start=1):
            if name in result["learning_curves"][label]:
                _draw_band(axis, result["learning_curves"][label][name], *_line_style(i))
        axis.set(title=title, xlabel="step", ylabel=unit)
        axis.set_ylim(*((-0.02, 1.02) if unit == "share" else (0, None)))
    figure.suptitle(f"{training_title(result)}, {result['seeds']} seeds; bars and bands: standard errors", fontsize=10)
    return figure


def training_title(result: JSONObject) -> str:
    """Return what was trained on what, and for how long."""
    options = result["options"]
    if "model" not in options:
        return (
            f"The demonstration's model (0.1 M parameters) trained at several temperatures, {options['steps']} steps of "
            f"{options['prompts']} x {options['group_size']} completions, {options['loss_type']}"
        )
    return f"{Path(options['model']).name} trained on {Path(options['dataset']).name}, {options['max_steps']} steps"


def _figure(rows: int, columns: int) -> tuple[Figure, Sequence[Axes]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # not pyplot, which has global state and may open a window

    figure = Figure(figsize=(4.2 * columns, 3.3 * rows + 0.5), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns).flatten()
    for axis in axes:
        axis.grid(color="#dddddd", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        axis.title.set_fontsize(10)
    return figure, axes


def _draw_measure(axis: Axes, rows: Sequence[JSONObject], name: str, label: str, colour: str, marker: str) -> bool:
    """Draw a measure over the temperature. Return whether any temperature has it."""
    present = [row for row in rows if row[name] is not None]
    if not present:
        return False
    means = [row[name]["mean"] if isinstance(row[name], dict) else row[name] for row in present]
    errors = [(row[name]["error"] or 0.0) if isinstance(row[name], dict) else 0.0 for row in present]
    temperatures = [row["temperature"] for row in present]
    axis.errorbar(temperatures, means, errors, color=colour, marker=marker, markersize=4, capsize=2, label=label)
    return True


def _shade(axis: Axes, result: JSONObject) -> None:
    """Shade each temperature by its region, up to halfway to its neighbours."""
    regions = result["advice"]["regions"]
    places = [one["temperature"] for one in regions]
    for i, one in enumerate(regions):
        left = (places[i - 1] + places[i]) / 2 if i else places[0] - 0.05
        right = (places[i] + places[i + 1]) / 2 if i + 1 < len(regions) else places[-1] + 0.05
        axis.axvspan(left, right, color=SHADES[one["region"]], linewidth=0, zorder=0)


def _patch(colour: str) -> Patch:
    from matplotlib.patches import Patch

    return Patch(facecolor=colour)


def _draw_accuracy_table(axis: Axes, result: JSONObject, places: Sequence[str]) -> None:
    labels = result["trained_at"]
    values = [[result["evaluation"][label][place]["accuracy"]["mean"] for place in places] for label in labels]
    axis.imshow(values, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            axis.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=8, color="black" if value > 0.6 else "white")
    axis.grid(visible=False)
    axis.set_xticks(range(len(places)), places)
    axis.set_yticks(range(len(labels)), [label.replace(", ", "\n") for label in labels])
    if any(", " in label for label in labels):
        axis.tick_params(axis="y", labelsize=6)
    axis.set(title="Accuracy: trained at, evaluated at", xlabel="evaluation temperature", ylabel="training temperature")


def _draw_band(axis: Axes, curve: CurveJSON, colour: str, style: str) -> None:
    """Draw the mean over the seeds, and a band of one standard error around it."""
    steps = range(1, len(curve["mean"]) + 1)
    axis.plot(steps, curve["mean"], color=colour, linestyle=style, linewidth=1.6)
    band = [(mean - error, mean + error) for mean, error in zip(curve["mean"], curve["error"], strict=True) if error is not None]
    if band:
        low, high = zip(*band, strict=True)
        axis.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)


def _line_style(i: int) -> tuple[str, str]:
    """Return colour and line style of the i-th training; 0 is the model before training, in black."""
    if i == 0:
        return COLOURS[-1], "--"
    row, column = divmod(i - 1, len(COLOURS) - 1)
    return COLOURS[column], LINE_STYLES[row % len(LINE_STYLES)]
