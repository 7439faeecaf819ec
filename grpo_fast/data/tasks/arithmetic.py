"""Sums and differences of random numbers. Needs no optional package."""

from __future__ import annotations

import random

from grpo_fast.data.tasks.common import INSTRUCTION, Task, TaskRows, check_instruction
from grpo_fast.rewards.accuracy import accuracy_reward
from grpo_fast.rewards.common import check_range

__all__ = ["arithmetic_task"]


def arithmetic_task(size: int = 1000, *, seed: int = 0, terms: int = 2, digits: int = 2, instruction: str = INSTRUCTION) -> Task:
    """Sums and differences of random numbers, scored by `accuracy_reward`.

    Args:
        size: number of rows.
        seed: the same seed gives the same rows.
        terms: how many numbers a question has, at least 2.
        digits: maximum number of digits of each number.
        instruction: the prompt; ``{question}`` is replaced by the question. ``"{question}"`` gives the bare question.

    Example:
        >>> arithmetic_task(1, terms=3, instruction="{question}").rows
        [{'prompt': 'What is 49 - 5 - 65?', 'answer': '-21'}]
    """
    for name, value, low in (("size", size, 1), ("terms", terms, 2), ("digits", digits, 1)):
        check_range("arithmetic_task", name, value, low)
    check_instruction("arithmetic_task", instruction)
    rng = random.Random(seed)
    rows = TaskRows()
    for _ in range(size):
        text = str(total := rng.randrange(10**digits))
        for _ in range(terms - 1):
            sign, number = rng.choice((1, -1)), rng.randrange(10**digits)
            text, total = f"{text} {'+' if sign > 0 else '-'} {number}", total + sign * number
        rows.append({"prompt": instruction.replace("{question}", f"What is {text}?"), "answer": str(total)})
    return Task(rows, accuracy_reward)
