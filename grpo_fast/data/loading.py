"""Tasks, datasets, rewards and the tokenizer, loaded by the names that settings files and the command line use for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from grpo_fast.data.chats import sends_as_chat
from grpo_fast.data.tasks import Task, arithmetic_task, reasoning_gym_task, sorting_task
from grpo_fast.data.tasks.common import as_dataset, as_users_own
from grpo_fast.rewards import Reward, RewardRunner, load_reward
from grpo_fast.rewards.loading import parse_call
from grpo_fast.utils.errors import SettingsError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

__all__ = ["DataOptions", "load_rewards", "load_tokenizer", "make_task", "prompt_rows", "shape_prompts"]

TASKS: dict[str, Callable[..., Task]] = {"arithmetic": arithmetic_task, "sorting": sorting_task}
REASONING_GYM = "reasoning_gym:"  # prefix of the tasks of that package


class DataOptions(Protocol):
    """The settings that are read here; `grpo_fast.trainer.run_settings.TrainOptions` describes them."""

    model: str | None
    tokenizer: str | None
    rewards: list[str] | None
    dataset_config: str | None
    max_prompt_length: int | None
    prompt_column: str | None
    prompt_template: str | None
    system_prompt: str | None


def make_task(name: str, *, size: int = 1000, seed: int = 0) -> Task | None:
    """Make a task by its name: ``arithmetic``, ``sorting`` or ``reasoning_gym:TASK``; settings as in ``sorting(digits=3)``.

    Args:
        name: the name, with or without settings in parentheses.
        size: number of rows.
        seed: the same seed gives the same rows.

    Returns:
        None if the name is not that of a task, but of a dataset.

    Raises:
        SettingsError: there is no such task, or it does not take these settings.
    """
    kind = name.partition("(")[0].strip()
    if kind not in TASKS and not kind.startswith(REASONING_GYM):
        return None
    make = TASKS.get(kind) or partial(reasoning_gym_task, kind.removeprefix(REASONING_GYM))
    try:
        _, settings = parse_call(name)
        return make(size=size, seed=seed, **(settings or {}))
    except (TypeError, ValueError) as error:
        raise SettingsError(
            f"dataset {name!r}: {str(error).rstrip('.')}. Expected {', '.join(TASKS)} or {REASONING_GYM}TASK, with settings as in "
            "TASK(name=1)."
        ) from error


def shape_prompts(rows: Dataset, *, column: str | None = None, template: str | None = None, system: str | None = None) -> Dataset:
    """Give a dataset its column ``prompt``: rename a column, fill in a template, or add a system prompt.

    Args:
        rows: the dataset.
        column: the column to rename to ``prompt``. At most one of ``column`` and ``template`` may be given.
        template: text with the names of columns in braces.
        system: system prompt; the prompts become chats of a system and a user message.

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
        rows = as_users_own(rows.map(lambda row: {"prompt": template.format(**row)}))
    elif column is not None and column != "prompt":
        if column not in rows.column_names:
            raise SettingsError(f"prompt_column is {column!r}; expected one of {columns}.")
        rows = rows.remove_columns("prompt") if "prompt" in rows.column_names else rows
        rows = as_users_own(rows.rename_column(column, "prompt"))
    if "prompt" not in rows.column_names:
        raise SettingsError(
            f"the dataset has no column 'prompt', but {columns}. Fix: prompt_column: NAME, or prompt_template: '... {{NAME}}'."
        )
    if system is not None:
        if not isinstance(rows[0]["prompt"], str):
            raise SettingsError("system_prompt is set, but the prompts are chats already. Fix: leave it out.")
        rows = rows.map(lambda row: {"prompt": [_message("system", system), _message("user", row["prompt"])]})
    return rows


def load_rewards(names: Sequence[str] | None, task: Task | None) -> list[Reward]:
    """Load reward functions by name (`grpo_fast.rewards.load_reward`); ``"task"`` is the reward of the task, and the default of a task.

    Raises:
        SettingsError, ValueError: no reward is named, or there is none of that name.
    """
    rewards = [_load_reward(name, task) for name in (names or (["task"] if task is not None else []))]
    if not rewards:
        raise SettingsError("rewards is not set; expected at least one, in the settings file or as --rewards. See --help.")
    return rewards


def prompt_rows(
    name: str,
    split: str,
    task: Task | None,
    options: DataOptions,
    tokenizer: PreTrainedTokenizerBase,
    runner: RewardRunner,
    *,
    chat: str | bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    limit: int | None = None,
) -> Dataset:
    """Load the rows of a dataset or a task, give them their prompts, and check that the rewards find their columns.

    Args:
        name: of the dataset, see `read_rows`; not read if ``task`` is given.
        split: of the dataset.
        task: what `make_task` returned for the name.
        options: how the prompts are made, and their maximum length.
        tokenizer: of the model.
        runner: the rewards.
        chat: whether texts become chats, see `sends_as_chat`.
        chat_template_kwargs: keyword arguments of ``apply_chat_template``.
        limit: maximum number of rows.

    Raises:
        SettingsError, ValueError, TypeError: names the setting, what it was, what was expected and the fix.
    """
    from grpo_fast.data.prompts import load_prompts, read_rows

    rows = task.rows if task is not None else read_rows(name, split=split, config=options.dataset_config)
    rows = as_dataset(rows) if isinstance(rows, list) else rows
    rows = shape_prompts(rows, column=options.prompt_column, template=options.prompt_template, system=options.system_prompt)
    runner.check_columns([column for column in rows.column_names if column != "prompt"])
    as_chat = sends_as_chat(chat, rows, tokenizer, name, tell=False)
    return load_prompts(
        rows,
        tokenizer,
        max_prompt_length=options.max_prompt_length,
        chat_template_kwargs=chat_template_kwargs,
        as_chat=as_chat,
        limit=limit,
    ).rows


def load_tokenizer(options: DataOptions) -> PreTrainedTokenizerBase:
    """Load the tokenizer, which pads on the left. It is loaded before the model because a wrong name then shows within seconds.

    Raises:
        SettingsError: it cannot be loaded; the message has the reason.
    """
    from transformers import AutoTokenizer

    name = options.tokenizer or options.model
    if name is not None and name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise SettingsError(f"{'tokenizer' if options.tokenizer else 'model'} is {name!r}; there is no such folder.")
    try:
        return AutoTokenizer.from_pretrained(name, padding_side="left")
    except Exception as error:  # each library raises its own types for a wrong name, a broken file, or no network
        reason = " ".join(str(error).split())[:400].rstrip(".")
        raise SettingsError(f"the tokenizer of {name!r} cannot be loaded: {type(error).__name__}: {reason}. Is the name right?") from error


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _load_reward(name: str, task: Task | None) -> Reward:
    if name == "task":
        if task is None:
            raise SettingsError("rewards has 'task', but the dataset is not a task with its own reward; expected other rewards.")
        return task.reward
    return load_reward(name)
