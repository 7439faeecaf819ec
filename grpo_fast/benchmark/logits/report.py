"""The result of the suite: summaries of the repetitions, tables, notes and figure."""

from __future__ import annotations

import statistics
from pathlib import Path

from rich.console import Console
from rich.table import Table

from grpo_fast.benchmark.harness.figure import Bar, Panel, write_bars
from grpo_fast.benchmark.harness.measure import Record
from grpo_fast.benchmark.harness.suite import Result, table
from grpo_fast.benchmark.logits.cases import IMPLEMENTATIONS, MALLOC_MODES, PASSES
from grpo_fast.benchmark.logits.implementations import LABELS
from grpo_fast.ops.environment import caption

__all__ = ["clock", "print_report", "summarise", "write_figure"]

TITLES = {"forward": "Log-probabilities, no gradient", "forward_backward": "Loss and its gradient"}
MALLOC = {"default": "default malloc, fresh pages", "touched": "pages touched before"}
PANELS = {
    "forward": "Forward: log-probabilities. 1 = one read of the logits",
    "forward_backward": "Forward + backward: loss and gradient. 1 = one copy of the logits",
}


def clock(threads: int) -> str:
    """The time of an entry that is reported, see BenchmarkSettings.clock."""
    return "cpu_ms" if threads == 1 else "wall_ms"


def summarise(measurements: list[Record], threads: int) -> list[Record]:
    """Each measurement with median, minimum, spread, and its multiples of the roofline's and of grpo_fast's time in the same case."""

    def key(entry: Record, name: str = "") -> tuple[str, ...]:
        return entry["malloc"], entry["case"], entry["step"], name or entry["implementation"]

    medians = {key(entry): statistics.median(entry[clock(threads)]) for entry in measurements}
    out = []
    for entry in measurements:
        times, median, peak = entry[clock(threads)], medians[key(entry)], entry["peak_bytes"]
        quartiles = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else [times[0]] * 3
        roofline, ours = medians.get(key(entry, "roofline")), medians.get(key(entry, "ours"))
        summary = {
            "median_ms": median,
            "min_ms": min(times),
            "iqr_ms": quartiles[2] - quartiles[0],
            "wall_median_ms": statistics.median(entry["wall_ms"]),
            "gigabytes_per_second": entry["useful_bytes"] / median / 1e6,
            "times_roofline": median / roofline if roofline else None,
            "times_ours": median / ours if ours else None,
            "peak_extra_logits": peak / entry["logits_bytes"] if peak is not None else None,
        }
        out.append({**entry, "summary": summary})
    return out


def print_report(result: Result, console: Console) -> None:
    """The tables, what was left out, the cost of a small call, and the machine."""
    for malloc in result["settings"]["malloc"]:
        for step in PASSES:
            entries = [entry for entry in result["results"] if (entry["malloc"], entry["step"]) == (malloc, step)]
            if entries:
                console.print(_table(f"\n{TITLES[step]} ({MALLOC[malloc]})", entries, memory=malloc == "default"))
    if result["overhead"] is not None:
        console.print(_overhead_table(result["overhead"]))
    for line in _notes(result):
        console.print(line, highlight=False, markup=False)


def _table(title: str, entries: list[Record], *, memory: bool) -> Table:
    out = table(title, ("ms", "min", "IQR", "GB/s", "x roofline", "x ours", *(["memory"] if memory else [])), ())
    for case in dict.fromkeys(entry["case"] for entry in entries):
        out.add_row(case, style="italic")
        of_case = [entry for entry in entries if entry["case"] == case]
        for entry in sorted(of_case, key=lambda entry: IMPLEMENTATIONS.index(entry["implementation"])):
            summary, name = entry["summary"], entry["implementation"]
            digits = 1 if summary["median_ms"] >= 10 else 3
            times = [f"{summary[field]:.{digits}f}" for field in ("median_ms", "min_ms", "iqr_ms")]
            units = ("times_roofline", "times_ours", *(["peak_extra_logits"] if memory else []))
            multiples = ["-" if summary[unit] is None else f"{summary[unit]:.2f}x" for unit in units]
            style = "bold" if name.startswith("ours") else None
            out.add_row(f"  {LABELS[name]}", *times, f"{summary['gigabytes_per_second']:.1f}", *multiples, style=style)
    return out


def _overhead_table(overhead: Record) -> Table:
    labels = {"no_grad": "no gradient wanted", "grad": "forward, gradient wanted", "forward_backward": "forward + backward"}
    rows = [(label, f"{overhead['microseconds'][name]:.1f}") for name, label in labels.items()]
    rows += [(f"   of it {name}", f"{value:.1f}") for name, value in overhead["split_of_forward_backward"].items()]
    return table(f"\nA call at {overhead['shape']}, where there is next to nothing to compute".replace("[", r"\["), ("us",), rows)


def _notes(result: Result) -> list[str]:
    settings, machine, load = result["settings"], result["machine"], result["load_average"]["start"]
    cache, flushed = machine["largest_cache_bytes"] >> 20, settings["flush_bytes"] >> 20
    cold = f"Before each, {flushed} MiB were written to clear a cache of {cache} MiB." if settings["cold"] else "Warm caches."
    lines = [
        f"Medians of {settings['rounds']} interleaved repetitions, fresh data in each, T = {settings['temperature']:g}; "
        f"{cold} GB/s: bytes that must be moved. Memory: peak above what was there before the call, in multiples of "
        "the logits, with a gradient of their size.",
    ]
    if any(entry["implementation"] == "trl" for entry in result["results"]):
        function = "selective_log_softmax_and_entropy" if settings["entropy"] else "selective_log_softmax"
        lines.append(f"TRL: its {function} and its clipped loss; of bfloat16 logits it makes bfloat16 log-probabilities.")
    if not settings["equal_work"]:
        masked = f"{1 - settings['active_fraction']:.0%}"
        lines.append(f"NOT EQUAL WORK: {masked} of the rows are masked; grpo_fast skips them, the others compute them.")
    if not settings["entropy"]:
        lines.append("grpo_fast also computes the entropy of every row; the others do not (--entropy: they do).")
    if load is not None and load > 0.5:
        lines.append(f"The machine was busy when this began (load {load:.1f}): times may be too long, of memory-bound code in particular.")
    return lines


def write_figure(result: Result, path: Path) -> None:
    """A panel for each pass, a group of bars for each case; solid: pages touched before, outlined on top: default malloc."""
    settings = result["settings"]
    modes = [mode for mode in MALLOC_MODES if mode in settings["malloc"]]
    panels = []
    for step in PASSES:
        entries = [entry for entry in result["results"] if entry["step"] == step]
        times = {(e["implementation"], e["case"], e["malloc"]): e["summary"]["times_roofline"] for e in entries}
        bars = []
        for name, case in dict.fromkeys((name, e["case"]) for name in LABELS for e in entries):
            group = f"[{case.split()[0].replace('x', ' × ')}] {case.split()[1]}"
            first, last = (times.get((name, case, mode)) for mode in (modes[0], modes[-1]))
            if name != "roofline" and any(e["implementation"] == name for e in entries):
                bars.append(Bar(group, name, LABELS[name], last, outline=first))
        if bars:
            panels.append(Panel(PANELS[step], bars, log=True))
    both = "Solid: pages touched before. Dashed: default malloc. " if len(modes) > 1 else ""
    work = "" if settings["equal_work"] else f" NOT EQUAL WORK: {1 - settings['active_fraction']:.0%} of the rows masked."
    entropy = "" if settings["entropy"] else " grpo_fast also computes the entropy."
    text = f"{both}T = {settings['temperature']:g}, median of {settings['rounds']}.{entropy}{work}"
    machine = f"{caption(result['machine'], settings['threads'])}, {result['date'][:10]}"
    write_bars(path, "Time of the GRPO loss in multiples of the roofline (lower is better)", panels, f"{text}\n{machine}")
