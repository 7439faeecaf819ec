"""What a suite is, and the envelope that the results of all suites are put into."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Generic, TypeVar

from rich.console import Console

from grpo_fast.benchmark.harness.result import SCHEMA, Result
from grpo_fast.benchmark.harness.settings import BenchmarkSettings
from grpo_fast.ops.backends import installed_version
from grpo_fast.ops.environment import describe, load_average

__all__ = ["Progress", "Result", "Suite", "run_suite"]

Progress = Callable[[str], None]  # is told what is being done
S = TypeVar("S", bound=BenchmarkSettings)


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
