"""Figures of results: bars in groups."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from grpo_fast.benchmark.harness.measure import Record
from grpo_fast.utils.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Bar", "Panel", "write_bars", "write_gpu_figure"]

# The palette of Okabe and Ito, which colour-blind readers can tell apart.
COLOURS = {
    "ours": "#0072B2",
    "ours_inplace": "#56B4E9",
    "full": "#56B4E9",
    "eager": "#D55E00",
    "compile": "#E69F00",
    "liger": "#F0E442",
    "trl": "#009E73",
    "cce": "#CC79A7",
    "ours_cluster": "#004060",
    "ours_cluster_inplace": "#7FA0B0",
    "quack": "#999999",
    "trl_entropy": "#66C2A5",
    "verl": "#CC79A7",
    "kept": "#0072B2",
    "gather": "#D55E00",
    "logits": "#56B4E9",
    "masked": "#E69F00",
    "apart": "#0072B2",
    "chunks": "#999999",
}
_TICKS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


@dataclass(frozen=True)
class Bar:
    """One bar. Bars of a group stand side by side; bars of a label are one entry of the legend."""

    group: str
    name: str  # of COLOURS
    label: str
    value: float | None  # None: its place stays empty
    outline: float | None = None  # a second value, drawn as an outline on top where it is larger
    alpha: float = 1.0


@dataclass(frozen=True)
class Panel:
    """Bars in groups under one title."""

    title: str
    bars: list[Bar]
    log: bool = False  # a logarithmic scale
    line: float | None = 1.0  # where a horizontal line is drawn: the unit
    number: str = ""  # format of the numbers; default: two digits


def write_bars(path: Path, title: str, panels: list[Panel], text: str) -> None:
    """Write a PNG of panels below each other, with a legend above and ``text``, two lines, below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # not pyplot, which keeps global state and may open a window

    inches = 3.5 * len(panels) + 1.5
    figure = Figure(figsize=(11, inches), dpi=150)
    FigureCanvasAgg(figure)
    figure.set_layout_engine("constrained", rect=(0, 0.55 / inches, 1, 1 - 1.35 / inches), h_pad=0.12)
    handles: Record = {}
    drawn = zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True)
    for axes, panel in sorted(drawn, key=lambda pair: -len(pair[1].bars)):  # the fullest panel decides the order of the legend
        handles |= _draw_panel(axes, panel)
    figure.text(0.5, 1 - 0.25 / inches, title, ha="center", va="center", fontsize=13, fontweight="bold")
    columns = len(handles) if sum(map(len, handles)) < 80 else 4  # one line, unless the labels are too long for it
    place: Record = {"loc": "center", "bbox_to_anchor": (0.5, 1 - 0.62 / inches), "ncols": columns}
    figure.legend(handles.values(), handles.keys(), frameon=False, fontsize=9, **place)
    figure.text(0.5, 0.28 / inches, text, ha="center", va="center", fontsize=8.5, color="#333333")
    write_atomically(path, lambda partial: figure.savefig(partial, format="png"))


def _draw_panel(axes: Axes, panel: Panel) -> Record:
    """Draw the bars; return a handle for the legend for each label."""
    groups, labels = list(dict.fromkeys(bar.group for bar in panel.bars)), list(dict.fromkeys(bar.label for bar in panel.bars))
    width, highest = 0.84 / max(len(labels), 1), 1.0
    handles: Record = {}
    style: Record = {"textcoords": "offset points", "ha": "center", "fontsize": 7.5}
    above: Record = {"xytext": (0, 2), "va": "bottom"}
    for bar in panel.bars:
        if bar.value is None:
            continue
        x = groups.index(bar.group) + (labels.index(bar.label) - (len(labels) - 1) / 2) * width
        value, top, colour = bar.value, max(bar.value, bar.outline or bar.value), COLOURS[bar.name]
        handles[bar.label], highest = axes.bar(x, value, width * 0.92, color=colour, alpha=bar.alpha, zorder=2), max(highest, top)
        if top > value:
            axes.bar(x, top - value, width * 0.88, bottom=value, fill=False, edgecolor=colour, linestyle=(0, (2, 1)), zorder=3)
        inside = {"xytext": (0, -2), "va": "top", "color": "white" if bar.name in ("ours", "eager", "trl") else "black"}
        axes.annotate(_number(value, panel), (x, value), **style, **(above if top == value else inside))
        if top > value * 1.25:
            axes.annotate(_number(top, panel), (x, top), **style, **above)
    if panel.line is not None:
        axes.axhline(panel.line, color="black", linewidth=1.2, zorder=1)
    if panel.log:
        axes.set_yscale("log")
        axes.set_ylim(0.7, highest * 1.6)
        ticks = [tick for tick in _TICKS if tick <= highest * 1.6]
        axes.set_yticks(ticks, [f"{tick}x" for tick in ticks])
        axes.minorticks_off()
    else:
        axes.margins(y=0.12)
    axes.set_xticks(range(len(groups)), groups, fontsize=10)
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="y", color="#dddddd", linewidth=0.7, zorder=0)
    axes.set_axisbelow(True)
    axes.set_title(panel.title, loc="left", fontsize=10.5)
    axes.spines[["top", "right"]].set_visible(False)
    return handles


def _number(value: float, panel: Panel) -> str:
    return format(value, panel.number or (".1f" if value < 9.95 else ".0f"))


def write_gpu_figure(result: Record, path: Path) -> None:
    """One PNG of a result of bench/gpu_bench.py: loss and gradient in multiples of a copy, a panel for each vocabulary, a group of bars for
    each number of rows; pale: less precise than the gate asks of grpo_fast.

    Raises:
        ValueError: there are no times in it.
    """
    together = result.get("bench", []) + [e for e in result.get("cluster", []) if e["name"].startswith("ours")]
    entries = [e for e in together if e["step"] == "loss" and e.get("times_copy") is not None]
    if not entries:
        raise ValueError("result has no times of loss and gradient; expected what `bench/gpu.sh bench` writes on a GPU.")
    times = {(e["name"], e["vocabulary"], e["rows"]): e["times_copy"] for e in entries}
    rows, coarse = sorted({e["rows"] for e in entries}), {e["name"] for e in entries if e.get("less_precise")}
    names = dict.fromkeys(e["name"] for e in entries)
    panels = []
    for vocabulary in sorted({e["vocabulary"] for e in entries}):
        cells = [(name, count, times.get((name, vocabulary, count))) for name in names for count in rows]
        bars = [Bar(f"{count} rows", name, name, value, alpha=0.5 if name in coarse else 1.0) for name, count, value in cells]
        panels.append(Panel(f"{vocabulary} logits. 1 = one copy of them", bars, log=True))
    text = f"{result['machine']['device']}\nPale: less precise than the gate asks of grpo_fast."
    write_bars(path, "GRPO loss and gradient on a GPU, in multiples of a copy of the logits", panels, text)
