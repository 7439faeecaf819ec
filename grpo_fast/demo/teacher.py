"""The teacher whose completions the model imitates before GRPO; its habits are bad on purpose.

    sort 5281=  ->  <think>1258;1258</think><answer>1258</answer>

It tends to repeat its line (so that greedy decoding never ends), sometimes answers without reasoning, and makes mistakes when it copies
its result. A rule can detect each habit, and correct completions are frequent enough for sampling to find them.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from grpo_fast.data.tasks.sorting import DIGITS, solve

__all__ = ["Teacher"]


@dataclass(frozen=True)
class Teacher:
    """Probabilities of the habits. Repeating is above one half, so that greedy decoding loops; copying mistakes are below."""

    skip: float = 0.38  # answers without reasoning, with the digits of the question
    loop: float = 0.64  # repeats its line, again after each repetition
    slip: float = 0.47  # swaps two digits of the answer

    def complete(self, digits: str, rng: random.Random) -> str:
        """Write a completion for the question ``sort {digits}=``."""
        if rng.random() < self.skip:
            return f"<answer>{digits}</answer>"
        truth = solve(digits)
        lines, answer = [truth], truth
        while rng.random() < self.loop:
            lines.append(truth)
        if rng.random() < self.slip:
            i, j = rng.sample(range(DIGITS), 2)
            swapped = list(truth)
            swapped[i], swapped[j] = swapped[j], swapped[i]
            answer = "".join(swapped)
        return f"<think>{';'.join(lines)}</think><answer>{answer}</answer>"
