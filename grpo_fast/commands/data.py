"""Rows to train on: those of a generator of tasks, and any, shaped to have a column ``prompt``."""

from __future__ import annotations

from functools import partial
from typing import Any

from grpo_fast.commands.settings import SettingsError
from grpo_fast.rewards.loading import spelled
from grpo_fast.tasks import Task, arithmetic_task, reasoning_gym_task, sorting_task

__all__ = ["make_task", "shape_prompts"]

TASKS: dict[str, Any] = {"arithmetic": arithmetic_task, "sorting": sorting_task}
GYM = "reasoning_gym:"


def make_task(name: str, *, size: int = 1000, seed: int = 0) -> Task | None:
    """Generated rows and their own reward, for ``arithmetic``, ``sorting`` or ``reasoning_gym:TASK``, each with settings or without, as in
    ``reasoning_gym:chain_sum(min_terms=2)``; None if the name is not one of these.

    Raises:
        SettingsError: a task or a setting that there is not.
    """
    what = name.partition("(")[0].strip()
    if what not in TASKS and not what.startswith(GYM):
        return None
    make = TASKS.get(what) or partial(reasoning_gym_task, what.removeprefix(GYM))
    try:
        _, settings = spelled(name)
        found: Task = make(size=size, seed=seed, **(settings or {}))
    except (TypeError, ValueError) as error:
        raise SettingsError(
            f"dataset {name!r}: {str(error).rstrip('.')}. Expected {', '.join(TASKS)} or {GYM}TASK, with settings as in TASK(name=1)."
        ) from error
    return found


def shape_prompts(rows: Any, *, column: str | None = None, template: str | None = None, system: str | None = None) -> Any:
    """Rows with a column ``prompt``: renamed, made from a template, or made a chat.

    Raises:
        SettingsError: there are no rows, or no such column.
    """
    if len(rows) == 0:
        raise SettingsError("the dataset has no rows; expected at least one. Look at its split.")
    columns = ", ".join(rows.column_names)
    if column is not None and template is not None:
        raise SettingsError("prompt_column and prompt_template are both set; expected one of them.")
    if template is not None:
        try:
            template.format(**rows[0])
        except (AttributeError, KeyError, IndexError, ValueError) as error:
            raise SettingsError(f"prompt_template is {template!r}; expected columns in braces ({error}). There are: {columns}.") from error
        rows = rows.map(lambda row: {"prompt": template.format(**row)})
    elif column is not None and column != "prompt":
        if column not in rows.column_names:
            raise SettingsError(f"prompt_column is {column!r}; expected one of {columns}.")
        rows = rows.remove_columns("prompt") if "prompt" in rows.column_names else rows
        rows = rows.rename_column(column, "prompt")
    if "prompt" not in rows.column_names:
        raise SettingsError(
            f"the dataset has no column 'prompt', but {columns}. Cure: prompt_column: NAME, or prompt_template: '... {{NAME}}'."
        )
    if system is not None:
        if not isinstance(rows[0]["prompt"], str):
            raise SettingsError("system_prompt is set, and the prompts are chats already. Cure: leave it out.")
        rows = rows.map(lambda row: {"prompt": [_message("system", system), _message("user", row["prompt"])]})
    return rows


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
