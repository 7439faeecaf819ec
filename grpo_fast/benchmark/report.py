"""What a run shows and leaves: every number as JSON, the summary as tables."""

from __future__ import annotations

import json
import statistics
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from grpo_fast.benchmark.contestants import LABELS
from grpo_fast.benchmark.schedule import Outcome, flush_bytes
from grpo_fast.benchmark.settings import CONTESTANTS, PASSES, Settings
from grpo_fast.ops.environment import caption

__all__ = ["SCHEMA", "as_json", "load", "print_report", "summarise"]

SCHEMA = 1
TITLES = {"forward": "Log-probabilities, no gradient", "forward_backward": "Loss and its gradient"}
MALLOC = {"default": "default malloc, fresh pages", "touched": "pages touched before"}


def as_json(settings: Settings, machine: dict[str, Any], outcome: Outcome, *, loads: list[float | None], seconds: float) -> dict[str, Any]:
    """The whole result."""
    return {
        "schema": SCHEMA,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "machine": machine,
        "load_average": {"start": loads[0], "end": loads[1]},
        "settings": {
            **settings.as_dict(),
            "clock": clock(settings.threads),
            "flush_bytes": flush_bytes(settings),
            "equal_work": settings.active_fraction == 1,
        },
        "results": summarise(outcome.measurements, clock(settings.threads)),
        "gates": outcome.gates,
        "skipped": outcome.skipped,
        "overhead": outcome.overhead,
    }


def clock(threads: int) -> str:
    """CPU time of the thread is not disturbed by others on the machine; of several threads it is not the time that passes."""
    return "cpu_ms" if threads == 1 else "wall_ms"


def summarise(measurements: list[dict[str, Any]], clock_name: str) -> list[dict[str, Any]]:
    """Each measurement with median, minimum, spread, and what follows from comparing it to the floor and to grpo_fast of the same set."""
    middle = {_key(entry): statistics.median(entry[clock_name]) for entry in measurements}
    out = []
    for entry in measurements:
        times = entry[clock_name]
        quartiles = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else [times[0]] * 3
        median = middle[_key(entry)]
        peak = entry["peak_bytes"]
        floor, ours = middle.get(_key(entry, "floor")), middle.get(_key(entry, "ours"))
        summary = {
            "median_ms": median,
            "min_ms": min(times),
            "iqr_ms": quartiles[2] - quartiles[0],
            "wall_median_ms": statistics.median(entry["wall_ms"]),
            "gigabytes_per_second": entry["useful_bytes"] / median / 1e6,
            "times_floor": median / floor if floor else None,
            "times_ours": median / ours if ours else None,
            "peak_extra_logits": peak / entry["logits_bytes"] if peak is not None else None,
        }
        out.append({**entry, "summary": summary})
    return out


def _key(entry: dict[str, Any], contestant: str | None = None) -> tuple[str, str, str, str]:
    return entry["malloc"], entry["case"], entry["step"], contestant or entry["contestant"]


def load(path: Path) -> dict[str, Any]:
    """A result that `write_json` wrote.

    Raises:
        ValueError: the file is not there, or is not one.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"file {str(path)!r} cannot be read ({error}); expected the JSON of `grpo-fast bench --output`.") from error
    if not isinstance(result, dict) or result.get("schema") != SCHEMA or not result.get("results"):
        found = result.get("schema") if isinstance(result, dict) else type(result).__name__
        raise ValueError(f"file {str(path)!r} has schema {found!r}; expected {SCHEMA} with results. Measure again: grpo-fast bench.")
    return result


def print_report(result: dict[str, Any], console: Console) -> None:
    """The tables, who is missing, what a small call costs, and the machine."""
    settings = result["settings"]
    for malloc in settings["malloc"]:
        for step in PASSES:
            entries = [entry for entry in result["results"] if entry["malloc"] == malloc and entry["step"] == step]
            if entries:
                console.print(f"\n[bold]{TITLES[step]}[/bold] ({MALLOC[malloc]})", highlight=False)
                console.print(_table(entries, memory=malloc == "default"))
    for line in _skipped(result["skipped"]):
        console.print(line, highlight=False, markup=False, style="yellow")
    if result["overhead"] is not None:
        _print_overhead(result["overhead"], console)
    console.print()
    for line in _notes(result):
        console.print(line, highlight=False, markup=False)


def _table(entries: list[dict[str, Any]], *, memory: bool) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0))  # narrow: it fits into 80 columns
    table.add_column("")
    for heading in ("ms", "min", "IQR", "GB/s", "x floor", "x ours", *(["memory"] if memory else [])):
        table.add_column(heading, justify="right", no_wrap=True, min_width=6)
    for case in dict.fromkeys(entry["case"] for entry in entries):
        table.add_row(case, style="italic")
        for entry in sorted(
            (entry for entry in entries if entry["case"] == case), key=lambda entry: CONTESTANTS.index(entry["contestant"])
        ):
            summary = entry["summary"]
            digits = 1 if summary["median_ms"] >= 10 else 3
            table.add_row(
                f"  {LABELS[entry['contestant']]}",
                *(f"{summary[name]:.{digits}f}" for name in ("median_ms", "min_ms", "iqr_ms")),
                f"{summary['gigabytes_per_second']:.1f}",
                _times(summary["times_floor"]),
                _times(summary["times_ours"]),
                *([_times(summary["peak_extra_logits"])] if memory else []),
                style="bold" if entry["contestant"].startswith("ours") else None,
            )
    return table


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def _skipped(skipped: list[dict[str, Any]]) -> list[str]:
    """A line for each reason, not for each place."""
    where: dict[tuple[str, str], int] = {}
    for entry in skipped:
        key = entry["contestant"], entry["reason"]
        where[key] = where.get(key, 0) + 1
    return [f"Left out {count}x: {LABELS[name]}: {reason}" for (name, reason), count in where.items()]


def _print_overhead(overhead: dict[str, Any], console: Console) -> None:
    rows, vocabulary = overhead["shape"]
    console.print(f"\n[bold]A call at [{rows}, {vocabulary}][/bold], where there is next to nothing to compute", highlight=False)
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("")
    table.add_column("us", justify="right")
    labels = {"no_grad": "no gradient wanted", "grad": "forward, gradient wanted", "forward_backward": "forward + backward"}
    for name, label in labels.items():
        table.add_row(label, f"{overhead['microseconds'][name]:.1f}")
    for name, value in overhead["split_of_forward_backward"].items():
        table.add_row(f"   of it {name}", f"{value:.1f}")
    console.print(table)


def _notes(result: dict[str, Any]) -> list[str]:
    settings, machine = result["settings"], result["machine"]
    time_is = "CPU time of the one thread" if settings["clock"] == "cpu_ms" else "wall time"
    cache, flushed = machine["largest_cache_bytes"] >> 20, settings["flush_bytes"] >> 20
    cold = f"Before each, {flushed} MiB were written to clear a cache of {cache} MiB." if settings["cold"] else "Warm caches."
    lines = [
        caption(machine, settings["threads"]),
        f"Medians of {settings['rounds']} interleaved repetitions, fresh data in each, T = {settings['temperature']:g}; {time_is}. {cold} "
        "GB/s: bytes that must be moved. Memory: peak of what came on top, in multiples of the logits, with a gradient of their size.",
    ]
    if any(entry["contestant"] == "trl" for entry in result["results"]):
        function = "selective_log_softmax_and_entropy" if settings["entropy"] else "selective_log_softmax"
        lines.append(f"TRL: its {function} and its clipped loss; of bfloat16 logits it makes bfloat16 log-probabilities.")
    if not settings["equal_work"]:
        masked = f"{1 - settings['active_fraction']:.0%}"
        lines.append(f"NOT EQUAL WORK: {masked} of the rows are masked; grpo_fast skips them, the others compute them.")
    if not settings["entropy"]:
        lines.append("grpo_fast also computes the entropy of every row; the others do not (--entropy: they do).")
    load = result["load_average"]["start"]
    if load is not None and load > 0.5:
        lines.append(f"The machine was busy when this began (load {load:.1f}): times may be too long, of memory-bound code in particular.")
    return lines
