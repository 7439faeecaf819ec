"""A result of the heads as tables on the terminal and as a figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from grpo_fast.benchmark.head.contestants import LABELS
from grpo_fast.ops.environment import caption
from grpo_fast.utils.files import write_atomically

__all__ = ["markdown", "print_report", "write_plot"]

_COLOURS = {  # Okabe and Ito's palette
    "ours": "#0072B2",
    "full": "#56B4E9",
    "eager": "#D55E00",
    "trl": "#009E73",
    "liger": "#E69F00",
    "cce": "#CC79A7",
}


def print_report(result: dict[str, Any], console: Console) -> None:
    """A table per case: seconds, multiples of the bare products, operations, extra memory."""
    for tokens, dtype, trainable in _cases(result):
        title = f"{tokens} tokens x {result['settings']['width']} x {result['settings']['vocabulary']}, {dtype}, "
        table = Table(title=title + ("trainable head" if trainable else "frozen head"), title_justify="left")
        for column in ("", "active", "seconds", "x bare products", "operations, N D V", "extra memory, MiB"):
            table.add_column(column, justify="left" if not column else "right")
        for entry in _of(result, tokens, dtype, trainable):
            times, peak = entry["times_floor"], entry["peak_bytes"]
            table.add_row(
                LABELS[entry["contestant"]],
                f"{entry['active']:.0%}",
                f"{entry['median']:.3g}",
                "" if times is None else f"{times:.2f}",
                f"{entry['flop_multiple']:.3g}",
                "" if peak is None else f"{peak / 2**20:.0f}",
            )
        console.print(table)
    for entry in result["skipped"]:
        console.print(f"[yellow]not there: {entry['contestant']}: {entry['reason']}[/yellow]")
    console.print(caption(result["machine"], result["settings"]["threads"]))
    console.print(f"{result['settings']['clock']}; the run took {result['settings']['minutes']:.0f} minutes.")


def markdown(result: dict[str, Any]) -> list[str]:
    """The rows of the README's table: in each case seconds, multiples of the bare products, extra memory."""
    cells: dict[tuple[str, float], list[str]] = {}
    for case in _cases(result):
        for entry in _of(result, *case):
            if entry["contestant"] != "floor":
                cell = f"{entry['median']:.1f} s ({entry['times_floor']:.2f}x), {entry['peak_bytes'] / 2**30:.2f} GiB"
                cells.setdefault((entry["contestant"], entry["active"]), []).append(cell)
    rows = []
    for (contestant, active), found in cells.items():
        name = LABELS[contestant] + ("" if active == 1 else f", {active:.0%} active")
        bold = "**" if contestant == "ours" else ""
        rows.append(f"| {bold}{name}{bold} | {' | '.join(found)} |")
    return rows


def write_plot(result: dict[str, Any], path: Path) -> None:
    """Time in multiples of the bare products, and memory, for each case at full activity; grpo_fast at the others too."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # no pyplot: nothing global is touched, no window is opened

    cases = _cases(result)
    figure = Figure(figsize=(11, 1.2 + 2.6 * len(cases)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    for row, (tokens, dtype, trainable) in zip(figure.subplots(len(cases), 2, squeeze=False), cases, strict=True):
        entries = [entry for entry in _of(result, tokens, dtype, trainable) if entry["contestant"] != "floor"][::-1]
        names = [LABELS[e["contestant"]] + ("" if e["active"] == 1 else f", {e['active']:.0%} active") for e in entries]
        colours = [_COLOURS[entry["contestant"]] for entry in entries]
        columns = [(entry["times_floor"] or 0.0, (entry["peak_bytes"] or 0) / 2**30) for entry in entries]
        for axes, values, form in zip(row, zip(*columns, strict=True), ("{:.2f}", "{:.2f} GiB"), strict=True):
            bars = axes.barh(names, values, color=colours)
            axes.bar_label(bars, [form.format(value) for value in values], padding=3, fontsize=8)
            axes.margins(x=0.18)
            axes.tick_params(labelsize=8)
            axes.spines[["top", "right"]].set_visible(False)
        row[0].axvline(1, color="#333333", linewidth=0.8)
        row[0].set_title(f"{tokens} tokens, {dtype}, {'trainable' if trainable else 'frozen'} head", fontsize=9, loc="left")
        row[1].set_yticklabels([])
    figure.suptitle("Loss and gradients from hidden states: time in multiples of the bare matrix products, extra memory", fontsize=12)
    figure.supxlabel(caption(result["machine"], result["settings"]["threads"]), fontsize=8)
    write_atomically(path, lambda partial: figure.savefig(partial, format="png"))


def _cases(result: dict[str, Any]) -> list[tuple[int, str, bool]]:
    return list(dict.fromkeys((e["tokens"], e["dtype"], e["trainable"]) for e in result["results"]))


def _of(result: dict[str, Any], tokens: int, dtype: str, trainable: bool) -> list[dict[str, Any]]:
    order = list(LABELS)
    found = [e for e in result["results"] if (e["tokens"], e["dtype"], e["trainable"]) == (tokens, dtype, trainable)]
    return sorted(found, key=lambda e: (order.index(e["contestant"]), -e["active"]))
