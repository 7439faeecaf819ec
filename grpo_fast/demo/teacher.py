"""The task: sort the digits of a number, thinking aloud. With its tokenizer, and a teacher whose habits are bad on purpose.

    sort 5281=  ->  <think>1258;1258</think><answer>1258</answer>

Writing the sorted digits again is the model's way to check itself. The teacher has the habits a language model brings to GRPO: it likes to
repeat its line (so that greedy decoding never ends), sometimes answers without thinking, and slips when it copies its result. Every habit
is one that a rule can see; sampling shows the right way often enough to be found.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from grpo_fast.data.tasks.sorting import DIGITS, solve


@dataclass(frozen=True)
class Teacher:
    """The warm start's habits, as probabilities. Looping is likelier than not and slipping is not: hence cold sampling loops."""

    skip: float = 0.38  # answers without thinking, and copies the question
    loop: float = 0.64  # writes its line once more, again and again
    slip: float = 0.47  # swaps two digits of the answer

    def complete(self, digits: str, rng: random.Random) -> str:
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
