"""Shared by all tasks: the result type, and the instruction that asks for the format that the rewards read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, SupportsIndex, overload

from grpo_fast.rewards.common import Reward

if TYPE_CHECKING:
    import datasets

__all__ = ["INSTRUCTION", "Task", "TaskRows", "as_dataset", "as_users_own", "check_instruction", "is_generated"]

_BUILDER = "grpo_fast.tasks"  # in the info of a datasets.Dataset

# The template of DeepSeek-R1-Zero (arXiv:2501.12948, table 1) in one sentence: the format that `format_reward` and `extract_answer` read.
INSTRUCTION = (
    "{question}\nThink first, between <think> and </think>. Then give the answer, and nothing else, between <answer> and </answer>."
)


class TaskRows(list[dict[str, Any]]):
    """The rows of a task, which are told apart from a user's own by their type; a part of them is of the same type."""

    @overload
    def __getitem__(self, index: SupportsIndex, /) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice, /) -> TaskRows: ...
    def __getitem__(self, index: SupportsIndex | slice, /) -> dict[str, Any] | TaskRows:
        return TaskRows(super().__getitem__(index)) if isinstance(index, slice) else super().__getitem__(index)


class Task(NamedTuple):
    """Generated rows, and the reward that scores completions of them."""

    rows: TaskRows | datasets.Dataset  # each row has ``prompt``, ``answer``, and the other columns that the reward reads
    reward: Reward


def as_dataset(rows: Sequence[dict[str, Any]]) -> datasets.Dataset:
    """The rows of a task as a ``datasets.Dataset``, whose info says that they are generated, as `is_generated` reads it.

    Raises:
        ImportError: the package is not installed.
    """
    from datasets import Dataset, DatasetInfo

    return Dataset.from_list(list(rows), info=DatasetInfo(builder_name=_BUILDER))


def as_users_own(rows: datasets.Dataset) -> datasets.Dataset:
    """Rows of which the user has made the prompts, from those of a task or any others."""
    rows.info.builder_name = None
    return rows


def is_generated(rows: object) -> bool:
    """Whether a dataset has the prompts of a task of ours."""
    return isinstance(rows, TaskRows) or getattr(getattr(rows, "info", None), "builder_name", None) == _BUILDER


def check_instruction(where: str, instruction: str) -> None:
    """Check that an instruction has a place for the question.

    Raises:
        ValueError: ``{question}`` does not occur in it.
    """
    if "{question}" not in instruction:
        raise ValueError(f"{where}: instruction is {instruction!r}; expected a text with '{{question}}' where the question goes.")
