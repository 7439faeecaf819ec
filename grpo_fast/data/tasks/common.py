"""Shared by all tasks: the result type, and the instruction that asks for the format that the rewards read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from grpo_fast.rewards.common import Reward

if TYPE_CHECKING:
    import datasets

__all__ = ["INSTRUCTION", "Task", "check_instruction"]

# The template of DeepSeek-R1-Zero (arXiv:2501.12948, table 1) in one sentence: the format that `format_reward` and `extract_answer` read.
INSTRUCTION = (
    "{question}\nThink first, between <think> and </think>. Then give the answer, and nothing else, between <answer> and </answer>."
)


class Task(NamedTuple):
    """Generated rows, and the reward that scores completions of them."""

    rows: list[dict[str, Any]] | datasets.Dataset  # each row has ``prompt``, ``answer``, and the other columns that the reward reads
    reward: Reward


def check_instruction(where: str, instruction: str) -> None:
    """Check that an instruction has a place for the question.

    Raises:
        ValueError: ``{question}`` does not occur in it.
    """
    if "{question}" not in instruction:
        raise ValueError(f"{where}: instruction is {instruction!r}; expected a text with '{{question}}' where the question goes.")
