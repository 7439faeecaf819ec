"""What a study shows: tables for the terminal, every row as CSV.

``result`` is what the JSON file holds: of `grpo_fast.study.sampling.run`, or of `grpo_fast.study.training.run`.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from grpo_fast.study.options import name_of
from grpo_fast.utils.files import write_atomically

__all__ = [
    "as_rich",
    "matrix_table",
    "sampling_tables",
    "training_table",
    "write_sampling_csv",
    "write_training_csv",
]

Rows = tuple[str, list[str], list[list[str]]]  # title, headings, cells

RIGHT = (("pass@1", "pass_at_1"), ("pass@k", "pass_at_k"), ("cons@k", "cons_at_k"))
DIFFERENT = (
    ("zero-std", "zero_std"),
    ("zero-std (correct)", "zero_std_correct"),
    ("distinct", "distinct"),
    ("entropy", "entropy"),
    ("entropy at 1", "entropy_at_1"),
)
WRITING = (
    ("format", "format"),
    ("coherence", "coherence"),
    ("truncated", "truncated"),
    ("endless", "endless"),
    ("rep-n", "repetition"),
    ("length", "length"),
)


def sampling_tables(result: dict[str, Any]) -> list[Rows]:
    """Three tables: what is right, how different it is, and how it is written; a line per temperature."""
    k, rows = result["options"]["samples"], result["rows"]
    what = f"{result['prompts']} prompts, {result['options']['rounds']} x {k} samples each"
    ngram = result["options"]["ngram"]
    tables = (
        (f"What is right ({what})", RIGHT, _cell),
        ("How different it is", DIFFERENT, _mean),
        ("How it is written", WRITING, _mean),
    )
    return [
        (
            title,
            ["T", *(heading.replace("@k", f"@{k}").replace("-n", f"-{ngram}") for heading, _ in columns)],
            [[name_of(row["temperature"]), *(shown(row[name]) for _, name in columns)] for row in rows],
        )
        for title, columns, shown in tables
    ]


def matrix_table(result: dict[str, Any]) -> Rows:
    """Accuracy: trained at, by evaluated at."""
    places = [name_of(temperature) for temperature in result["options"]["eval_temperatures"]]
    cells = [[label, *(_cell(result["matrix"][label][place]["accuracy"]) for place in places)] for label in result["trained_at"]]
    seeds = f"{result['seeds']} seed{'' if result['seeds'] == 1 else 's'}"
    return f"Accuracy by evaluation temperature, mean and standard error over {seeds}", ["trained at", *(f"at {p}" for p in places)], cells


def training_table(result: dict[str, Any]) -> Rows:
    """What the curves did: means of the first and of the last five steps."""
    names = (("accuracy", "accuracy"), ("zero-std groups", "zero_std"), ("entropy at T", "entropy"), ("distinct", "distinct"))
    cells = [
        [label, *(f"{_mean(curves[name]['first'])} to {_mean(curves[name]['last'])}" for _, name in names)]
        for label, curves in result["training"].items()
    ]
    return "In training, the first five steps and the last five", ["trained at", *(heading for heading, _ in names)], cells


def as_rich(rows: Rows) -> Table:
    """For a terminal: narrow enough for 80 columns."""
    title, headings, cells = rows
    table = Table(title=f"\n{title}", title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="left" if i == 0 else "right")
    for row in cells:
        table.add_row(*(cell.replace(" ± ", "±") for cell in row))
    return table


def write_sampling_csv(result: dict[str, Any], path: Path) -> None:
    """A line per temperature; a measure with an error has a second column ``<name>_error``."""
    lines = []
    for row in result["rows"]:
        line: dict[str, Any] = {}
        for name, value in row.items():
            if isinstance(value, dict) and "mean" in value:
                line |= {name: value["mean"], f"{name}_error": value["error"]}
            elif name == "rewards":
                line |= {f"rewards/{reward}": mean for reward, mean in value.items()}
            elif not isinstance(value, list):
                line[name] = value
        lines.append(line | {"zone": _zone(result, row["temperature"])})
    _write_csv(lines, path)


def write_training_csv(result: dict[str, Any], path: Path) -> None:
    """A line per seed, temperature that was trained at, and temperature that was evaluated at."""
    runs = result["runs"]
    _write_csv([{"seed": run["seed"], "trained_at": run["trained_at"], **quality} for run in runs for quality in run["table"]], path)


def _write_csv(lines: Sequence[dict[str, Any]], path: Path) -> None:
    names = list(dict.fromkeys(name for line in lines for name in line))

    def write(partial: Path) -> None:
        with partial.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, names, lineterminator="\n")
            writer.writeheader()
            writer.writerows(lines)

    write_atomically(path, write)


def _cell(found: dict[str, float | None] | None) -> str:
    if found is None:
        return "-"
    error = found["error"]
    return f"{found['mean']:.3f}" if error is None else f"{found['mean']:.3f} ± {error:.3f}"


def _mean(found: dict[str, float | None] | float | None) -> str:
    """Without its error, which JSON and CSV have."""
    mean = found["mean"] if isinstance(found, dict) else found
    return "-" if mean is None else f"{mean:.3f}"


def _zone(result: dict[str, Any], temperature: float) -> str:
    zones = {zoned["temperature"]: zoned["zone"] for zoned in result["reading"]["zones"]}
    return zones.get(temperature, "")
