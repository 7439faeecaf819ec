"""Completions to look at: prompt, completion, rewards, advantage, in a table."""

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

MOST_COLUMNS = 3  # beside prompt, completion and advantage: more would leave the texts no room, and go into one column


def completions_table(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    rewards: Mapping[str, Sequence[float | None]],
    advantages: Sequence[float],
    *,
    extra: Mapping[str, Sequence[Any]] | None = None,
    step: int | None = None,
    limit: int | None = None,
    max_characters: int = 600,
) -> Table:
    """A rich table, one row for each completion.

    Args:
        prompts: text, or chat messages, of which the last one is shown.
        completions: likewise.
        rewards: name -> one number for each completion, None where it did not apply.
        advantages: one for each completion; green above 0, red below.
        extra: name -> whatever else is to be shown of each completion.
        step: for the title.
        limit: rows, at most, from the largest advantage to the smallest; None = all, as they are.
        max_characters: of a text; the middle of a longer one is left out, for a loop shows at the end.
    """
    lengths = {"prompts": len(prompts), "completions": len(completions), "advantages": len(advantages)}
    shown = {name: [_number(value) for value in values] for name, values in rewards.items()}
    shown |= {
        name: ["–" if value is None else _shorten(str(value), max_characters) for value in values] for name, values in (extra or {}).items()
    }
    lengths |= {name: len(values) for name, values in shown.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"completions_table: {lengths}; expected as many of each, one for each completion.")
    count = len(prompts)
    rows = list(range(count))
    if limit is not None and limit < count:
        by_advantage = sorted(rows, key=lambda row: -advantages[row])
        rows = [by_advantage[round(i * (count - 1) / max(limit - 1, 1))] for i in range(limit)]
    of = "" if len(rows) == count else f", {len(rows)} of {count} completions, from the best to the worst"
    table = Table(title=None if step is None else f"Step {step}{of}", show_lines=True, expand=True)
    table.add_column("prompt", ratio=2, overflow="fold")
    table.add_column("completion", ratio=3, overflow="fold")
    apart = len(shown) <= MOST_COLUMNS
    for name in shown if apart else ("rewards",):
        table.add_column(name, justify="right", overflow="fold")
    table.add_column("advantage", justify="right")
    for row in rows:
        advantage = float(advantages[row])
        colour = "green" if advantage > 0 else "red" if advantage < 0 else "dim"
        values = (
            [column[row] for column in shown.values()] if apart else ["\n".join(f"{name} {column[row]}" for name, column in shown.items())]
        )
        table.add_row(
            Text(_shorten(_text(prompts[row]), max_characters)),
            Text(_shorten(_text(completions[row]), max_characters)),
            *map(Text, values),
            Text(f"{advantage:+.2f}", style=colour),
        )
    return table


def print_completions(*columns: Any, console: Console | None = None, **options: Any) -> bool:
    """Print `completions_table` if a terminal is there to look at it. Returns whether it did; a file or a pipe gets nothing."""
    console = console if console is not None else Console(stderr=True)
    table = completions_table(*columns, **options)  # made in any case: a mistake shows everywhere
    if not console.is_terminal:
        return False
    console.print(table)
    return True


def read_completions(file: str | os.PathLike[str]) -> dict[str, Any]:
    """The arguments of `completions_table`, of a file of ``output_dir/completions`` (GRPOConfig's log_completions)."""
    rows = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]

    def by_name(column: str) -> dict[str, list[Any]]:
        names = dict.fromkeys(name for row in rows for name in row.get(column, {}))
        return {name: [row.get(column, {}).get(name) for row in rows] for name in names}

    plain = {"prompts": "prompt", "completions": "completion", "advantages": "advantage"}
    found: dict[str, Any] = {argument: [row[column] for row in rows] for argument, column in plain.items()}
    return found | {"rewards": by_name("rewards"), "extra": by_name("extra")}


def _text(message: Any) -> str:
    if isinstance(message, str):
        return message
    return str(message[-1]["content"]) if message else ""


def _shorten(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit // 2]} … {text[len(text) - limit // 2 :]}"


def _number(value: float | None) -> str:
    return "–" if value is None or value != value else f"{value:.2f}"
