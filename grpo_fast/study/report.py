"""The tables of a study: for the terminal, and as CSV. ``result`` is what the published JSON file holds."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rich import box
from rich.table import Table

from grpo_fast.study.estimates import EstimateJSON
from grpo_fast.study.options import temperature_name
from grpo_fast.study.result_files import JSONObject
from grpo_fast.study.training_gains import ALL, GainJSON
from grpo_fast.utils.files import write_atomically

__all__ = [
    "TextTable",
    "as_rich",
    "evaluation_table",
    "first_step_table",
    "gain_table",
    "sampling_tables",
    "training_table",
    "training_tables",
    "write_sampling_csv",
    "write_training_csv",
]


class TextTable(NamedTuple):
    """A table of text."""

    title: str
    headings: list[str]
    cells: list[list[str]]


CORRECTNESS = (("pass@1", "pass_at_1"), ("pass@k", "pass_at_k"), ("cons@k", "cons_at_k"))
DIVERSITY = (
    ("zero-std", "zero_std"),
    ("zero-std (correct)", "zero_std_correct"),
    ("distinct", "distinct"),
    ("entropy", "entropy"),
    ("entropy at 1", "entropy_at_1"),
)
FORM = (
    ("format", "format"),
    ("coherence", "coherence"),
    ("truncated", "truncated"),
    ("endless", "endless"),
    ("rep-n", "repetition"),
    ("length", "length"),
)


def sampling_tables(result: JSONObject) -> list[TextTable]:
    """Return three tables with a line per temperature: correctness, diversity, and form of the completions."""
    k, rows = result["options"]["samples"], result["rows"]
    size = f"{result['prompts']} prompts, {result['options']['rounds']} x {k} samples each"
    ngram = result["options"]["ngram"]
    tables: tuple[tuple[str, tuple[tuple[str, str], ...], Callable[[EstimateJSON | None], str]], ...] = (
        (f"Correctness ({size})", CORRECTNESS, _with_error),
        ("Diversity", DIVERSITY, _mean_only),
        ("Form", FORM, _mean_only),
    )
    return [
        TextTable(
            title,
            ["T", *(heading.replace("@k", f"@{k}").replace("-n", f"-{ngram}") for heading, _ in columns)],
            [[temperature_name(row["temperature"]), *(shown(row[name]) for _, name in columns)] for row in rows],
        )
        for title, columns, shown in tables
    ]


def training_tables(result: JSONObject) -> list[TextTable]:
    """Return all tables of a training study that its result has."""
    found = (evaluation_table(result), gain_table(result), training_table(result), first_step_table(result))
    return [table for table in found if table is not None]


def evaluation_table(result: JSONObject) -> TextTable:
    """Return the accuracy by training temperature (lines) and evaluation temperature (columns)."""
    places = [temperature_name(temperature) for temperature in result["options"]["eval_temperatures"]]
    cells = [[label, *(_with_error(result["evaluation"][label][place]["accuracy"]) for place in places)] for label in result["trained_at"]]
    seeds = f"{result['seeds']} seed{'' if result['seeds'] == 1 else 's'}"
    title = f"Accuracy by evaluation temperature, mean and standard error over {seeds}"
    return TextTable(title, ["trained at", *(f"at {place}" for place in places)], cells)


def training_table(result: JSONObject) -> TextTable:
    """Return the means of the learning curves over the first and the last five steps."""
    names = (("accuracy", "accuracy"), ("zero-std groups", "zero_std"), ("entropy at T", "entropy"), ("distinct", "distinct"))
    cells = [[label, *(_ends(result, label, name) for _, name in names)] for label in result["training"]]
    title = "During training, the first five steps and the last five"
    return TextTable(title, ["trained at", *(heading for heading, _ in names)], cells)


def first_step_table(result: JSONObject) -> TextTable | None:
    """Return the ratios of the policy of the loss to the policy that sampled, on the first step; None if they were not measured."""
    if "first_step" not in result:
        return None
    names = (("mean", "ratio_mean"), ("standard deviation", "ratio_std"), ("beyond 0.1 of 1", "ratio_off"))
    cells = [
        [
            label,
            *(f"{measures[name]['mean']:.4f}" for _, name in names),
            *(_ends(result, label, name) for name in ("kept_mass", "set_size")),
        ]
        for label, measures in result["first_step"].items()
    ]
    title = "Probability ratios of the first step (loss to sampler); kept sets, the first five steps and the last"
    return TextTable(title, ["trained at", *(heading for heading, _ in names), "kept mass", "set size"], cells)


def gain_table(result: JSONObject) -> TextTable | None:
    """Return the gain in accuracy over the model before training; None if the runs do not list their questions."""
    if "gains" not in result:
        return None
    places = [temperature_name(temperature) for temperature in result["options"]["eval_temperatures"]]
    cells = [[label, *(_with_error(found[place]) for place in (*places, ALL))] for label, found in result["gains"].items()]
    title = "Gain in accuracy over the model before training, with its standard error over questions and seeds"
    return TextTable(title, ["trained at", *(f"at {place}" for place in places), "mean"], cells)


def _ends(result: JSONObject, label: str, name: str) -> str:
    curves = result["training"][label]
    return f"{_mean_only(curves[name]['first'])} to {_mean_only(curves[name]['last'])}" if name in curves else "-"


def as_rich(table: TextTable) -> Table:
    """Return the table for a terminal of 80 columns."""
    rich_table = Table(title=f"\n{table.title}", title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    for i, heading in enumerate(table.headings):
        rich_table.add_column(heading, justify="left" if i == 0 else "right")
    for row in table.cells:
        rich_table.add_row(*(cell.replace(" ± ", "±") for cell in row))
    return rich_table


def write_sampling_csv(result: JSONObject, path: Path) -> None:
    """Write a line per temperature; a measure with a standard error has a second column ``<name>_error``."""
    regions = {one["temperature"]: one["region"] for one in result["advice"]["regions"]}
    lines = []
    for row in result["rows"]:
        line: dict[str, object] = {}
        for name, value in row.items():
            if name == "rewards":
                line |= {f"rewards/{reward}": mean for reward, mean in value.items()}
            elif isinstance(value, dict):
                line |= {name: value["mean"], f"{name}_error": value["error"]}
            else:
                line[name] = value
        lines.append(line | {"region": regions.get(row["temperature"], "")})
    _write_csv(lines, path)


def write_training_csv(result: JSONObject, path: Path) -> None:
    """Write a line per seed, training temperature and evaluation temperature."""
    lines = [
        {"seed": seed, "trained_at": label, "temperature": float(place)} | {name: cell["by_seed"][seed] for name, cell in measures.items()}
        for seed in range(result["seeds"])
        for label, places in result["evaluation"].items()
        for place, measures in places.items()
    ]
    _write_csv(lines, path)


def _write_csv(lines: Sequence[Mapping[str, object]], path: Path) -> None:
    names = list(dict.fromkeys(name for line in lines for name in line))

    def write(partial: Path) -> None:
        with partial.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, names, lineterminator="\n")
            writer.writeheader()
            writer.writerows(lines)

    write_atomically(path, write)


def _with_error(found: EstimateJSON | GainJSON | None) -> str:
    if found is None:
        return "-"
    error = found["error"]
    return f"{found['mean']:.3f}" if error is None else f"{found['mean']:.3f} ± {error:.3f}"


def _mean_only(found: EstimateJSON | float | None) -> str:
    """Return the mean; JSON and CSV have its error too."""
    mean = found["mean"] if isinstance(found, dict) else found
    return "-" if mean is None else f"{mean:.3f}"
