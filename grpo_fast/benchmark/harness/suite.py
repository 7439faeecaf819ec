"""What a suite is: its settings, each declared once with default, help text and bounds; its results, their file, summaries and tables."""

from __future__ import annotations

import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from rich.console import Console
from rich.table import Table

from grpo_fast.benchmark.harness.measure import Record
from grpo_fast.ops.backends import installed_version
from grpo_fast.ops.environment import caption, describe, load_average

__all__ = ["DTYPES", "SCHEMA", "BenchmarkSettings", "Progress", "Result", "Suite"]
__all__ += ["load", "mebibytes", "print_result", "require", "require_whole_groups", "run_suite", "setting", "summary", "table"]

SCHEMA = 2
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Result = Record  # what is written to the JSON file
Progress = Callable[[str], None]  # is told what is being done
S = TypeVar("S", bound="BenchmarkSettings")


def setting(
    default: Any, help: str = "", *, option: str = "", least: int | None = None, choices: tuple[str, ...] = (), parse: Any = None
) -> Any:
    """A field of a settings dataclass.

    Args:
        default: its value unless given. A tuple becomes an option that may be repeated.
        help: text of the command-line option; without it there is no option.
        option: name of the option, and of the setting in error messages, where it differs from the field's, as "shape" for ``shapes``.
        least: the smallest number that is accepted.
        choices: the names that are accepted.
        parse: turns the text of a repeated option into an element.
    """
    return field(default=default, metadata={"help": help, "option": option, "least": least, "choices": choices, "parse": parse})


def require(ok: bool, name: str, value: object, expected: str) -> None:
    """Raise a ValueError that names the setting, its value and what was expected, unless ``ok``."""
    if not ok:
        raise ValueError(f"{name} is {value!r}; expected {expected}.")


def require_whole_groups(shares: Iterable[float], groups: int) -> None:
    """Raise a ValueError that names the setting ``active`` unless each share is a whole number of so many groups, above 0."""
    for share in shares:
        whole = 0 < share <= 1 and (share * groups) % 1 == 0
        require(whole, "active", share, f"a share above 0 that is a whole number of {groups} groups")


@dataclass(frozen=True, kw_only=True)
class BenchmarkSettings:
    """What every suite is told.

    Raises:
        ValueError: a setting is outside of its bounds; names it, its value and what was expected.
    """

    rounds: int = setting(3, "Repetitions after a warm-up.", least=1)
    threads: int = setting(1, "One thread is timed by its CPU time, several by the wall clock.", least=1)
    seed: int = setting(0)

    def __post_init__(self) -> None:
        for each in fields(self):
            value, least, choices = getattr(self, each.name), each.metadata.get("least"), each.metadata.get("choices")
            name = each.metadata.get("option") or each.name
            values = value if isinstance(value, tuple) else (value,)
            require(len(values) > 0, name, "empty", f"at least one of {', '.join(choices)}" if choices else "at least one")
            for element in values:
                require(least is None or element >= least, name, element, f"at least {least}")
                require(not choices or element in choices, name, element, f"one of {', '.join(choices or ())}")
            require(len(set(values)) == len(values), name, ", ".join(map(str, values)), f"each {'name' if choices else 'value'} once")

    @property
    def clock(self) -> str:
        """What is reported as the time of a repetition: other processes do not disturb the CPU time of a thread; the CPU time of several
        threads is not the time that passes."""
        return "CPU time of the thread" if self.threads == 1 else "wall time"


@dataclass(frozen=True)
class Suite(Generic[S]):
    """One of the comparisons, and what its command needs of it."""

    name: str  # of the command
    help: str  # of the command
    settings: type[S]
    run: Callable[[S, Progress], Result]  # "results" and what else belongs to the result
    print_report: Callable[[Result, Console], None]
    write_figure: Callable[[Result, Path], None] | None = None
    options: tuple[str, ...] | None = None  # the settings that are options of the command; None = all that have a help text
    quick: Mapping[str, Any] = field(default_factory=dict)  # settings of --quick; none: there is no such option
    check: Callable[[S], None] = lambda settings: None  # raises ValueError or ImportError if the suite cannot run here
    packages: tuple[str, ...] = ()  # whose versions the result has, besides those that every result has

    @property
    def output(self) -> str:
        """Where the result goes unless the command line says otherwise, as runs/bench/head_cpu.json."""
        return f"runs/bench/{'_'.join([*self.name.split('-')[1:], 'cpu.json'])}"


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
        "settings": {"suite": suite.name, **asdict(settings), "clock": settings.clock, **found.get("settings", {})},
    }


def summary(seconds: Iterable[float], peaks: Iterable[int | None]) -> Record:
    """Every repetition's time, their median, and the largest peak of memory, of an entry of "results"."""
    times = list(seconds)
    return {
        "seconds": times,
        "median": statistics.median(times),
        "peak_bytes": max((peak for peak in peaks if peak is not None), default=None),
    }


def load(path: Path, suite: str) -> Result:
    """Read the result file of a suite, or of bench/gpu_bench.py.

    Raises:
        ValueError: the file cannot be read, or holds no results of this suite.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"file {str(path)!r} cannot be read ({error}); expected the JSON of `grpo-fast {suite} --output`.") from error
    found: Result = result if isinstance(result, dict) else {}
    if found.get("kind") == "gpu":  # what bench/gpu_bench.py wrote has a form of its own
        return found
    of_suite = found.get("settings", {}).get("suite")
    if not found.get("results") or found.get("schema") != SCHEMA or of_suite != suite:
        raise ValueError(
            f"file {str(path)!r} holds no results of `grpo-fast {suite}` (schema {found.get('schema')}, suite {of_suite}); expected schema "
            f"{SCHEMA}. Fix: measure again with grpo-fast {suite}."
        )
    return found


def print_result(suite: Suite[S], result: Result, console: Console) -> None:
    """Print the suite's own report, what was left out and why, and the machine."""
    suite.print_report(result, console)
    for (name, reason), count in Counter((entry["implementation"], entry["reason"]) for entry in result.get("skipped", [])).items():
        console.print(f"Left out {count}x: {name}: {reason}", highlight=False, markup=False, style="yellow")
    settings, minutes = result["settings"], result["seconds"] / 60
    console.print(f"{caption(result['machine'], settings['threads'])}. {settings['clock']}; the run took {minutes:.0f} minutes.")


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
