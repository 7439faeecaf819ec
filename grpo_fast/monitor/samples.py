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


def completions_table(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    rewards: Mapping[str, Sequence[float | None]],
    advantages: Sequence[float],
    *,
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
        step: for the title.
        limit: rows, at most, from the largest advantage to the smallest; None = all, as they are.
        max_characters: of a text; the middle of a longer one is left out, for a loop shows at the end.
    """
    lengths = {"prompts": len(prompts), "completions": len(completions), "advantages": len(advantages)}
    lengths |= {f"rewards[{name!r}]": len(values) for name, values in rewards.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"completions_table: {lengths}; expected as many of each, one for each completion.")
    count = len(prompts)
    shown = list(range(count))
    if limit is not None and limit < count:
        by_advantage = sorted(shown, key=lambda index: -advantages[index])
        shown = [by_advantage[round(i * (count - 1) / max(limit - 1, 1))] for i in range(limit)]
    of = "" if len(shown) == count else f", {len(shown)} of {count} completions, from the best to the worst"
    table = Table(title=None if step is None else f"Step {step}{of}", show_lines=True, expand=True)
    table.add_column("prompt", ratio=2, overflow="fold")
    table.add_column("completion", ratio=3, overflow="fold")
    for name in rewards:
        table.add_column(name, justify="right", overflow="fold")
    table.add_column("advantage", justify="right")
    for index in shown:
        advantage = float(advantages[index])
        colour = "green" if advantage > 0 else "red" if advantage < 0 else "dim"
        table.add_row(
            Text(_shorten(_text(prompts[index]), max_characters)),
            Text(_shorten(_text(completions[index]), max_characters)),
            *(_number(values[index]) for values in rewards.values()),
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


def read_completions(file: str | os.PathLike[str]) -> tuple[list[str], list[str], dict[str, list[float | None]], list[float]]:
    """What `completions_table` takes, of a file of ``output_dir/completions`` (GRPOConfig's log_completions)."""
    rows = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
    names = list(rows[0]["rewards"]) if rows else []
    rewards = {name: [row["rewards"].get(name) for row in rows] for name in names}
    return [row["prompt"] for row in rows], [row["completion"] for row in rows], rewards, [row["advantage"] for row in rows]


def _text(message: Any) -> str:
    if isinstance(message, str):
        return message
    return str(message[-1]["content"]) if message else ""


def _shorten(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit // 2]} … {text[len(text) - limit // 2 :]}"


def _number(value: float | None) -> str:
    return "–" if value is None or value != value else f"{value:.2f}"
