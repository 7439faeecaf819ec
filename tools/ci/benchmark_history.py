"""Adds the medians of a pytest-benchmark result to a history of one JSON line per commit, and writes the last commits as a table.

    python tools/ci/benchmark_history.py benchmark.json COMMIT history.jsonl README.md

Machines that a forge lends differ by tens of percent, so each line holds the processor and nothing fails on a slower one.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

SHOWN = 20  # commits in the table


def entry(result: dict[str, Any], commit: str) -> dict[str, Any]:
    """One line of the history: the median of each case in microseconds, with the commit, its date and the processor."""
    return {
        "commit": commit,
        "date": result["datetime"][:19],
        "processor": result["machine_info"].get("cpu", {}).get("brand_raw", "unknown"),
        "microseconds": {case["name"]: round(case["stats"]["median"] * 1e6, 2) for case in result["benchmarks"]},
    }


def add(history: Path, line: dict[str, Any]) -> list[dict[str, Any]]:
    """Append a line, in place of an earlier one of the same commit; return all."""
    lines = [json.loads(text) for text in history.read_text().splitlines()] if history.exists() else []
    lines = [each for each in lines if each["commit"] != line["commit"]] + [line]
    history.write_text("".join(json.dumps(each, sort_keys=True) + "\n" for each in lines))
    return lines


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown: a row for each of the last commits, the newest first, a column for each case of the newest."""
    newest = lines[-1]["microseconds"]
    rows = [["commit", "date", "processor", *newest], ["---"] * (3 + len(newest))]
    for line in reversed(lines[-SHOWN:]):
        rows.append([line["commit"][:12], line["date"], line["processor"], *(str(line["microseconds"].get(case, "")) for case in newest)])
    text = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return f"# Benchmark history\n\nMedian processor time in microseconds, one thread (bench/test_speed.py); lower is better.\n\n{text}\n"


def main(result: str, commit: str, history: str, page: str) -> None:
    lines = add(Path(history), entry(json.loads(Path(result).read_text()), commit))
    Path(page).write_text(table(lines))


if __name__ == "__main__":
    main(*sys.argv[1:])
