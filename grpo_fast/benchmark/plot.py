"""The figure of a result: multiples of the floor, on a logarithmic scale."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_fast.benchmark.contestants import LABELS
from grpo_fast.benchmark.settings import CONTESTANTS, MALLOC_MODES, PASSES
from grpo_fast.ops.environment import caption
from grpo_fast.utils.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["write_gpu_plot", "write_plot"]

# Okabe and Ito's palette: told apart by colour-blind eyes too.
COLOURS = {
    "ours": "#0072B2",
    "ours_inplace": "#56B4E9",
    "eager": "#D55E00",
    "compile": "#E69F00",
    "trl": "#009E73",
}
TITLES = {
    "forward": "Forward: log-probabilities. 1 = one read of the logits",
    "forward_backward": "Forward + backward: loss and gradient. 1 = one copy of the logits",
}


def write_plot(result: dict[str, Any], path: Path) -> None:
    """One PNG: a panel for each pass, a group of bars for each case; solid: pages touched before, outlined on top: default malloc."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # no pyplot: nothing global is touched, no window is opened

    steps = [step for step in PASSES if any(entry["step"] == step for entry in result["results"])]
    figure = Figure(figsize=(11, 3.5 * len(steps) + 1.5), dpi=150)
    FigureCanvasAgg(figure)
    inches = figure.get_figheight()
    # Room for the caption below and the head above.
    figure.set_layout_engine("constrained", rect=(0, 0.55 / inches, 1, 1 - 1.35 / inches), h_pad=0.12)
    panels = figure.subplots(len(steps), 1, squeeze=False)[:, 0]
    handles: dict[str, Any] = {}
    for axes, step in zip(panels, steps, strict=True):
        _panel(axes, result, step)
        handles |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    labels = [LABELS[name] for name in CONTESTANTS if LABELS[name] in handles]
    title = "Time of the GRPO loss in multiples of the memory floor (lower is better)"
    figure.text(0.5, 1 - 0.25 / inches, title, ha="center", va="center", fontsize=13, fontweight="bold")
    place = {"loc": "center", "bbox_to_anchor": (0.5, 1 - 0.58 / inches)}
    figure.legend([handles[label] for label in labels], labels, ncols=len(labels), frameon=False, fontsize=9.5, **place)
    figure.text(0.5, 0.28 / inches, _caption(result), ha="center", va="center", fontsize=8.5, color="#333333")
    write_atomically(path, lambda partial: figure.savefig(partial, format="png"))


def _panel(axes: Axes, result: dict[str, Any], step: str) -> None:
    entries = [entry for entry in result["results"] if entry["step"] == step and entry["summary"]["times_floor"] is not None]
    cases = list(dict.fromkeys(entry["case"] for entry in entries))
    names = [name for name in CONTESTANTS if name != "floor" and any(entry["contestant"] == name for entry in entries)]
    height = {(entry["contestant"], entry["case"], entry["malloc"]): entry["summary"]["times_floor"] for entry in entries}
    modes = [mode for mode in MALLOC_MODES if mode in result["settings"]["malloc"]]
    solid, outlined = modes[-1], modes[0] if len(modes) > 1 else None
    width = 0.84 / max(len(names), 1)
    for number, name in enumerate(names):
        labelled = False
        for group, case in enumerate(cases):
            value, x = height.get((name, case, solid)), group + (number - (len(names) - 1) / 2) * width
            if value is None:
                continue
            axes.bar(x, value, width * 0.92, color=COLOURS[name], label=None if labelled else LABELS[name], zorder=2)
            labelled = True
            top = height.get((name, case, outlined)) if outlined else None
            if top is not None and top > value:
                outline: dict[str, Any] = {"fill": False, "edgecolor": COLOURS[name], "linestyle": (0, (2, 1)), "zorder": 3}
                axes.bar(x, top - value, width * 0.88, bottom=value, **outline)
            label: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "fontsize": 7.5}
            axes.annotate(_number(value), (x, value), (0, -2), va="top", **label, **_on(name))
            if top is not None and top > value * 1.25:
                axes.annotate(_number(top), (x, top), (0, 2), va="bottom", color="#444444", **label)
    axes.axhline(1, color="black", linewidth=1.2, zorder=1)
    axes.set_yscale("log")
    highest = max(height.values(), default=10)
    axes.set_ylim(0.7, highest * 1.6)
    ticks = [tick for tick in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if tick <= highest * 1.6]
    axes.set_yticks(ticks, [f"{tick}x" for tick in ticks])
    axes.minorticks_off()
    axes.set_xticks(range(len(cases)), [_case_label(case) for case in cases], fontsize=10)
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="y", color="#dddddd", linewidth=0.7, zorder=0)
    axes.set_axisbelow(True)
    axes.set_title(TITLES[step], loc="left", fontsize=10.5)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _on(name: str) -> dict[str, Any]:
    """Text that is read on the colour of its bar."""
    return {
        "color": "white" if name in ("ours", "eager", "trl") else "black",
        "fontweight": "bold" if name.startswith("ours") else "normal",
    }


def _number(value: float) -> str:
    return f"{value:.1f}" if value < 9.95 else f"{value:.0f}"


def _case_label(case: str) -> str:
    shape, dtype = case.split()
    return f"[{shape.replace('x', ' × ')}] {dtype}"


def _caption(result: dict[str, Any]) -> str:
    settings = result["settings"]
    both = "Solid: pages touched before. Dashed: default malloc. " if len(settings["malloc"]) > 1 else ""
    work = "" if settings["equal_work"] else f" NOT EQUAL WORK: {1 - settings['active_fraction']:.0%} of the rows masked."
    entropy = "" if settings["entropy"] else " grpo_fast also computes the entropy."
    return (
        f"{both}T = {settings['temperature']:g}, median of {settings['rounds']}.{entropy}{work}\n"
        f"{caption(result['machine'], settings['threads'])}, {result['date'][:10]}"
    )


def write_gpu_plot(result: dict[str, Any], path: Path) -> None:
    """One PNG of a result of bench/gpu_bench.py: loss and gradient in multiples of a copy, over the rows, a panel for each vocabulary.

    Raises:
        ValueError: there are no times in it.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    together = result.get("bench", []) + [e for e in result.get("cluster", []) if e["name"].startswith("ours")]
    entries = [e for e in together if e["step"] == "loss" and e.get("times_copy") is not None]
    if not entries:
        raise ValueError("result has no times of loss and gradient; expected what `bench/gpu.sh bench` writes on a GPU.")
    vocabularies = sorted({e["vocabulary"] for e in entries})
    names = list(dict.fromkeys(e["name"] for e in entries))
    figure = Figure(figsize=(1.5 + 2.9 * len(vocabularies), 4.3), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(vocabularies), sharey=True, squeeze=False)[0]
    lines: dict[str, Any] = {}
    for panel, vocabulary in zip(panels, vocabularies, strict=True):
        for name in names:
            found = sorted((e["rows"], e["times_copy"]) for e in entries if (e["name"], e["vocabulary"]) == (name, vocabulary))
            if not found:
                continue
            coarse = any(e.get("less_precise") for e in entries if e["name"] == name)
            style = {"marker": "o", "markersize": 4, "fillstyle": "none" if coarse else "full"}
            style |= {"linewidth": 2 if name.startswith("ours") else 1, "color": colormaps["tab20"](names.index(name))}
            (lines[name],) = panel.plot(*zip(*found, strict=True), **style)
        rows = sorted({e["rows"] for e in entries if e["vocabulary"] == vocabulary})
        panel.axhline(1, color="black", linewidth=1)
        panel.set(xscale="log", yscale="log", title=f"{vocabulary} logits", xlabel="rows")
        panel.set_xticks(rows, [str(n) for n in rows], fontsize=7, rotation=45)
        panel.minorticks_off()
    panels[0].set_ylabel("multiples of a copy of the logits")
    figure.suptitle(f"GRPO loss and gradient, {result['machine']['device']} (hollow: less precise than the gate asks of ours)", fontsize=10)
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", frameon=False, fontsize=8, ncols=6)
    write_atomically(path, lambda partial: figure.savefig(partial, format="png"))
