"""What ``grpo-fast train`` and ``grpo-fast study`` name, loaded and checked: rows with a column ``prompt``, rewards, the tokenizer."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from grpo_fast.data.tasks import Task, arithmetic_task, reasoning_gym_task, sorting_task
from grpo_fast.rewards import RewardRunner, load_reward
from grpo_fast.rewards.loading import spelled
from grpo_fast.trainer.run_settings import SettingsError, TrainOptions

__all__ = ["load_tokenizer", "make_task", "named_rewards", "prompt_rows", "shape_prompts"]

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


def named_rewards(options: TrainOptions, task: Task | None) -> list[Any]:
    """The rewards that are asked for; a task brings its own, which is the default there.

    Raises:
        SettingsError, ValueError: there is none, or none of that name.
    """
    rewards = [_reward(name, task) for name in (options.rewards or (["task"] if task is not None else []))]
    if not rewards:
        raise SettingsError("rewards is not set; expected at least one, in the settings file or as --rewards. See --help.")
    return rewards


def prompt_rows(
    name: str,
    split: str,
    task: Task | None,
    options: TrainOptions,
    tokenizer: Any,
    runner: RewardRunner,
    *,
    chat: Any = None,
    limit: int | None = None,
) -> Any:
    """The rows of a data set or of a task, shaped as the options say, with the columns that the rewards need; the first ``limit`` of them.

    Raises:
        SettingsError, ValueError, TypeError: name the setting, what it was, what was expected and the cure.
    """
    from datasets import Dataset

    from grpo_fast.data.prompts import load_prompts, read_rows

    rows = task.rows if task is not None else read_rows(name, split=split, config=options.dataset_config)
    rows = Dataset.from_list(rows) if isinstance(rows, list) else rows
    rows = shape_prompts(rows, column=options.prompt_column, template=options.prompt_template, system=options.system_prompt)
    runner.check_columns([column for column in rows.column_names if column != "prompt"])
    length = options.max_prompt_length
    return load_prompts(rows, tokenizer, max_prompt_length=length, chat_template_kwargs=chat, limit=limit).rows


def load_tokenizer(options: TrainOptions) -> Any:
    """Loaded before the model: it is quick, and shows that the name is right."""
    from transformers import AutoTokenizer

    name = options.tokenizer or options.model
    if name is not None and name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise SettingsError(f"{'tokenizer' if options.tokenizer else 'model'} is {name!r}; there is no such folder.")
    try:
        return AutoTokenizer.from_pretrained(name, padding_side="left")
    except Exception as error:  # no such name, no network, a broken file: each library raises its own
        reason = " ".join(str(error).split())[:400].rstrip(".")
        raise SettingsError(f"the tokenizer of {name!r} cannot be loaded: {type(error).__name__}: {reason}. Is the name right?") from error


def _reward(name: str, task: Task | None) -> Any:
    if name == "task":
        if task is None:
            raise SettingsError("rewards has 'task', and the dataset is no task, which brings its own reward; expected other rewards.")
        return task.reward
    return load_reward(name)
