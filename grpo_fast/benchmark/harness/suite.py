"""What a suite is, and its results: the envelope that all share, reading of a file, summaries and tables."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Generic, TypeVar

from rich.console import Console
from rich.table import Table

from grpo_fast.benchmark.harness.settings import BenchmarkSettings
from grpo_fast.ops.backends import installed_version
from grpo_fast.ops.environment import describe, load_average

__all__ = ["SCHEMA", "Progress", "Result", "Suite", "load", "mebibytes", "run_suite", "summary", "table"]

SCHEMA = 2
Result = dict[str, Any]  # what is written to the JSON file
Progress = Callable[[str], None]  # is told what is being done
S = TypeVar("S", bound=BenchmarkSettings)

# Files of schema 1 are read with the names of schema 2.
_RENAMED = {"contestant": "implementation", "contestants": "implementations", "times_floor": "times_roofline", "side": "implementation"}


@dataclass(frozen=True)
class Suite(Generic[S]):
    """One of the comparisons, and what its command needs of it."""

    name: str  # of the command
    settings: type[S]
    run: Callable[[S, Progress], Result]  # "results" and what else belongs to the result
    print_report: Callable[[Result, Console], None]
    write_figure: Callable[[Result, Path], None] | None = None
    options: tuple[str, ...] | None = None  # the settings that are options of the command; None = all that have a help text
    quick: Mapping[str, Any] = field(default_factory=dict)  # settings of --quick; none: there is no such option
    check: Callable[[S], None] = lambda settings: None  # raises ValueError or ImportError if the suite cannot run here
    packages: tuple[str, ...] = ()  # whose versions the result has, besides those that every result has


def run_suite(suite: Suite[S], settings: S, progress: Progress) -> Result:
    """Run a suite and put its results into the envelope that all share: date, duration, machine, load and settings."""
    machine, load, start = describe(), load_average(), time.perf_counter()
    found = suite.run(settings, progress)
    return {
        "schema": SCHEMA,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - start, 1),
        "machine": {**machine, **{name: installed_version(name) for name in suite.packages}},
        "load_average": {"start": load, "end": load_average()},
        **found,
        "settings": {"suite": suite.name, **settings.as_dict(), "clock": settings.clock, **found.get("settings", {})},
    }


def summary(seconds: Iterable[float], peaks: Iterable[int | None]) -> dict[str, Any]:
    """Every repetition's time, their median, and the largest peak of memory, of an entry of "results"."""
    times = list(seconds)
    return {
        "seconds": times,
        "median": statistics.median(times),
        "peak_bytes": max((peak for peak in peaks if peak is not None), default=None),
    }


def load(path: Path, suite: str) -> Result:
    """Read the result file of a suite, of this schema or of an older one, or of bench/gpu_bench.py.

    Raises:
        ValueError: the file cannot be read, or holds no results of this suite.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"file {str(path)!r} cannot be read ({error}); expected the JSON of `grpo-fast {suite} --output`.") from error
    found = result if isinstance(result, dict) else {}
    if found.get("kind") == "gpu":  # what bench/gpu_bench.py wrote has a form of its own
        return found
    schema, kind = found.get("schema", 1), str(found.get("kind", "")).removesuffix("_stage").replace("_", "-")  # kind: in schema 1
    of_suite = found.get("settings", {}).get("suite", f"bench-{kind}".rstrip("-"))
    if not found.get("results") or schema not in (1, SCHEMA) or of_suite != suite:
        raise ValueError(
            f"file {str(path)!r} holds no results of `grpo-fast {suite}` (schema {schema}, suite {of_suite}); expected schema {SCHEMA}. "
            f"Fix: measure again with grpo-fast {suite}."
        )
    renamed: Result = found if schema == SCHEMA else _with_new_names(found)
    return renamed


def _with_new_names(value: Any) -> Any:
    if isinstance(value, dict):
        return {_RENAMED.get(key, key): _with_new_names(element) for key, element in value.items()}
    if isinstance(value, list):
        return [_with_new_names(element) for element in value]
    return "roofline" if value == "floor" else value


def table(title: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> Table:
    """A table for the console: the first column is of names, the others are of numbers."""
    out = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))  # narrow: it fits into 80 columns
    out.add_column("")
    for column in columns:
        out.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        out.add_row(*row)
    return out


def mebibytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**20:,.0f}"
