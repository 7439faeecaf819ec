"""Reading and mending metrics files. Nothing here needs transformers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from grpo_fast.utils.files import write_text

__all__ = ["METRICS_FILE", "RunError", "drop_after", "read_run"]

METRICS_FILE = "metrics.jsonl"
_NAMED = 5  # runs, in the message that one is not there


class RunError(ValueError):
    """A run has no metrics to read: the message has the path and the cure."""


def drop_after(path: Path, step: int) -> None:
    """Leave the lines up to this step in the file, and no torn one; with step 0, none. There need be no file."""
    if not path.exists():
        return
    kept = [] if step == 0 else [record for record in _records(path) if record.get("step", 0) <= step]
    write_text(path, "".join(json.dumps(record) + "\n" for record in kept), mode=path.stat().st_mode & 0o777)


def read_run(run: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a run, given by its folder or its metrics file, in the order they were written.

    Raises:
        RunError: there is no such file, or no record in it.
    """
    path = Path(run)
    if path.is_dir():
        path = path / METRICS_FILE
    if not path.is_file():
        found = sorted(path.parent.glob(f"*/{METRICS_FILE}"), key=os.path.getmtime, reverse=True)
        names, more = [file.parent.name for file in found[:_NAMED]], len(found) - _NAMED
        near = f" Runs beside it, the latest first: {', '.join(names)}{f' and {more} more' if more > 0 else ''}." if found else ""
        raise RunError(f"there is no {path}; expected a run's folder (its output_dir) or its {METRICS_FILE}.{near}")
    records = _records(path)
    if not records:
        raise RunError(f"{path} holds no metrics; expected at least one line. The run has logged nothing yet: see its logging_steps.")
    return records


def _records(path: Path) -> list[dict[str, Any]]:
    """All whole lines. A line that is no JSON object is an error, but for the last one, which may be torn."""
    lines = path.read_text(encoding="utf-8").split("\n")
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("no object")
        except ValueError as error:
            if number >= len(lines):  # no line break behind it: the process died in the middle
                break
            raise RunError(f"{path}, line {number}: {line[:80]!r} is no JSON object ({error}); expected one in each line.") from error
        records.append(record)
    return records
