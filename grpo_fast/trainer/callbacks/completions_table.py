"""A table of completions with their prompts, rewards and advantages."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ["completions_table", "print_completions", "read_completions"]

Messages = str | Sequence[Mapping[str, str]]  # a text, or chat messages
MAX_REWARD_COLUMNS = 3  # with more values than this they share one column, so that prompt and completion keep their width


def completions_table(
    prompts: Sequence[Messages],
    completions: Sequence[Messages],
    rewards: Mapping[str, Sequence[float | None]],
    advantages: Sequence[float],
    *,
    extra: Mapping[str, Sequence[object]] | None = None,
    step: int | None = None,
    limit: int | None = None,
    max_characters: int = 600,
) -> Table:
    """Build a rich table with one row per completion.

    Args:
        prompts: strings, or lists of chat messages, whose last message is shown.
        completions: likewise.
        rewards: name -> one number per completion, None or NaN where the reward did not apply.
        advantages: one number per completion, green above 0 and red below.
        extra: name -> one further value per completion, shown as text.
        step: shown in the title; None = no title.
        limit: largest number of rows, spread evenly from the highest advantage to the lowest; None = all rows in the given order.
        max_characters: longer texts lose their middle part, because repetition shows at the end.

    Raises:
        ValueError: the arguments do not have the same number of entries.
    """
    lengths = {"prompts": len(prompts), "completions": len(completions), "advantages": len(advantages)}
    shown = {name: [_number(value) for value in values] for name, values in rewards.items()}
    shown |= {
        name: ["–" if value is None else _shorten(str(value), max_characters) for value in values] for name, values in (extra or {}).items()
    }
    lengths |= {name: len(values) for name, values in shown.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"completions_table: {lengths}; expected as many of each, one for each completion.")
    rows = _spread_rows(advantages, limit)
    subset = "" if len(rows) == len(prompts) else f", {len(rows)} of {len(prompts)} completions, from the best to the worst"
    table = Table(title=None if step is None else f"Step {step}{subset}", show_lines=True, expand=True)
    table.add_column("prompt", ratio=2, overflow="fold")
    table.add_column("completion", ratio=3, overflow="fold")
    own_columns = len(shown) <= MAX_REWARD_COLUMNS
    for name in shown if own_columns else ("rewards",):
        table.add_column(name, justify="right", overflow="fold")
    table.add_column("advantage", justify="right")
    for row in rows:
        values = {name: column[row] for name, column in shown.items()}
        cells = list(values.values()) if own_columns else ["\n".join(f"{name} {value}" for name, value in values.items())]
        texts = (_shorten(_text(prompts[row]), max_characters), _shorten(_text(completions[row]), max_characters))
        table.add_row(*map(Text, (*texts, *cells)), _advantage_cell(float(advantages[row])))
    return table


def _spread_rows(advantages: Sequence[float], limit: int | None) -> list[int]:
    """All rows in order; or if they are more than ``limit``, that many, spread evenly from the highest advantage to the lowest."""
    count = len(advantages)
    if limit is None or limit >= count:
        return list(range(count))
    by_advantage = sorted(range(count), key=lambda row: -advantages[row])
    return [by_advantage[round(i * (count - 1) / max(limit - 1, 1))] for i in range(limit)]


def _advantage_cell(advantage: float) -> Text:
    return Text(f"{advantage:+.2f}", style="green" if advantage > 0 else "red" if advantage < 0 else "dim")


def print_completions(*columns: Any, console: Console | None = None, **options: Any) -> bool:
    """Print `completions_table` if the console is a terminal.

    Args:
        columns: positional arguments of `completions_table`.
        console: where to print; None = standard error.
        options: keyword arguments of `completions_table`.

    Returns:
        Whether it printed; nothing is written to a file or a pipe.
    """
    console = console if console is not None else Console(stderr=True)
    table = completions_table(*columns, **options)  # built in any case, so that wrong arguments raise without a terminal too
    if not console.is_terminal:
        return False
    console.print(table)
    return True


def read_completions(file: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a file of ``output_dir/completions`` (see ``GRPOConfig.log_completions``) as keyword arguments of `completions_table`."""
    rows = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]

    def by_name(column: str) -> dict[str, list[object]]:
        names = dict.fromkeys(name for row in rows for name in row.get(column, {}))
        return {name: [row.get(column, {}).get(name) for row in rows] for name in names}

    columns = {"prompts": "prompt", "completions": "completion", "advantages": "advantage"}
    found: dict[str, Any] = {argument: [row[column] for row in rows] for argument, column in columns.items()}
    return found | {"rewards": by_name("rewards"), "extra": by_name("extra")}


def _text(message: Messages) -> str:
    if isinstance(message, str):
        return message
    return str(message[-1]["content"]) if message else ""


def _shorten(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit // 2]} … {text[len(text) - limit // 2 :]}"


def _number(value: float | None) -> str:
    return "–" if value is None or value != value else f"{value:.2f}"
