"""Results: summaries of repetitions, tables for the console, and reading of a result file."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.table import Table

__all__ = ["SCHEMA", "Result", "load", "mebibytes", "summary", "table"]

SCHEMA = 2
Result = dict[str, Any]  # what is written to the JSON file

# Files of schema 1 are read with the names of schema 2.
_RENAMED = {"contestant": "implementation", "contestants": "implementations", "times_floor": "times_roofline", "side": "implementation"}


def summary(seconds: Iterable[float], peaks: Iterable[int | None]) -> dict[str, Any]:
    """Every repetition's time, their median, and the largest peak of memory, of an entry of "results"."""
    times = list(seconds)
    return {
        "seconds": times,
        "median": statistics.median(times),
        "peak_bytes": max((peak for peak in peaks if peak is not None), default=None),
    }


def load(path: Path, suite: str) -> Result:
    """Read the result file of a suite, of this schema or of an older one.

    Raises:
        ValueError: the file cannot be read, or holds no results of this suite.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"file {str(path)!r} cannot be read ({error}); expected the JSON of `grpo-fast {suite} --output`.") from error
    found = result if isinstance(result, dict) else {}
    schema, of_suite = found.get("schema", 1), found.get("settings", {}).get("suite", suite)
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
