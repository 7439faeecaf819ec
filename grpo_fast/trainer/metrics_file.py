"""Reading the metrics file of a run, and removing steps from it. Nothing here needs transformers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from grpo_fast.utils.files import write_text

__all__ = ["METRICS_FILE", "Record", "RunError", "drop_later_steps", "read_run"]

METRICS_FILE = "metrics.jsonl"
Record = dict[str, Any]  # the metrics of a log call, and its "step"
_RUNS_NAMED = 5  # how many existing runs the error for a missing run lists


class RunError(ValueError):
    """A run has no metrics to read. The message names the path and how to fix it."""


def drop_later_steps(path: Path, step: int) -> None:
    """Remove the records of steps after ``step``, and an incomplete last line, from a metrics file. Step 0 removes every record.

    Args:
        path: a metrics file; if it does not exist, nothing happens.
        step: the last step to keep.
    """
    if not path.exists():
        return
    kept = [] if step == 0 else [record for record in _records(path) if record.get("step", 0) <= step]
    write_text(path, "".join(json.dumps(record) + "\n" for record in kept), mode=path.stat().st_mode & 0o777)


def read_run(run: str | os.PathLike[str]) -> list[Record]:
    """Read the records of a run in the order in which they were written.

    Args:
        run: the run's folder (its ``output_dir``) or its metrics file.

    Raises:
        RunError: the file does not exist, holds no record, or has a line that is not a JSON object.
    """
    path = Path(run)
    if path.is_dir():
        path = path / METRICS_FILE
    if not path.is_file():
        found = sorted(path.parent.glob(f"*/{METRICS_FILE}"), key=os.path.getmtime, reverse=True)
        names, more = [file.parent.name for file in found[:_RUNS_NAMED]], len(found) - _RUNS_NAMED
        near = f" Runs beside it, the latest first: {', '.join(names)}{f' and {more} more' if more > 0 else ''}." if found else ""
        raise RunError(f"there is no {path}; expected a run's folder (its output_dir) or its {METRICS_FILE}.{near}")
    records = _records(path)
    if not records:
        raise RunError(f"{path} holds no metrics; expected at least one line. The run has logged nothing yet: see its logging_steps.")
    return records


def _records(path: Path) -> list[Record]:
    """All records. A line that is not a JSON object is an error, except an unterminated last line, which a killed process may leave."""
    lines = path.read_text(encoding="utf-8").split("\n")
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("not an object")
        except ValueError as error:
            if number >= len(lines):  # no line break follows: the process was killed while it wrote this line
                break
            raise RunError(f"{path}, line {number}: {line[:80]!r} is no JSON object ({error}); expected one in each line.") from error
        records.append(record)
    return records
