"""Draws the bars of gpu.json: python bench/plot_gpu.py gpu.json [gpu.png]. Milliseconds over those of a copy of the logits."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(source: Path, target: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    result = json.loads(source.read_text())
    entries = [e for e in result.get("bench", []) if e.get("times_copy") is not None]
    if not entries:
        raise SystemExit(f"{source}: no times in it; expected the JSON that bench/gpu.sh bench writes")
    cases = list(dict.fromkeys((e["rows"], e["vocabulary"]) for e in entries))
    names = list(dict.fromkeys(e["name"] for e in entries))
    figure = Figure(figsize=(max(7, 1.3 * len(cases)), 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for i, name in enumerate(names):
        at = {(e["rows"], e["vocabulary"]): e["times_copy"] for e in entries if e["name"] == name}
        places = [n + (i - (len(names) - 1) / 2) * 0.8 / len(names) for n, case in enumerate(cases) if case in at]
        axes.bar(places, [at[case] for case in cases if case in at], 0.8 / len(names), label=name)
    axes.axhline(1, color="black", linewidth=1)
    axes.set_yscale("log")
    axes.set_xticks(range(len(cases)), [f"{n} × {v}" for n, v in cases], fontsize=8)
    axes.set_ylabel("multiples of a copy")
    axes.set_title(f"GRPO loss and gradient, {result['machine']['device']}", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(target)
    print(f"Drawn: {target}")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) == 3 else Path(sys.argv[1]).with_suffix(".png"))
