"""The task: sort the digits of a number, thinking aloud. With its tokenizer, and a teacher whose habits are bad on purpose.

    sort 5281=  ->  <think>1258;1258</think><answer>1258</answer>

Writing the sorted digits again is the model's way to check itself. The teacher has the habits a language model brings to GRPO: it likes to
repeat its line (so that greedy decoding never ends), sometimes answers without thinking, and slips when it copies its result. Every habit
is one that a rule can see; sampling shows the right way often enough to be found.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from grpo_fast.utils.install_hints import require_packages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

DIGITS = 4
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
CHARACTERS = "0123456789=; sort"
HELD_OUT = 1000  # of the 10,000 questions, these many are kept from both trainings and used by the evaluation only


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


def solve(digits: str) -> str:
    return "".join(sorted(digits))


def question(digits: str) -> dict[str, str]:
    """A row of the data set: ``prompt``, and the true ``answer`` as a column for the rewards."""
    return {"prompt": f"sort {digits}=", "answer": solve(digits)}


def split_questions() -> tuple[list[str], list[str]]:
    """All digit strings, shuffled once and for all, as ``(training, held out)``: the split is the same for every seed."""
    numbers = [f"{number:0{DIGITS}d}" for number in range(10**DIGITS)]
    random.Random(0).shuffle(numbers)
    return numbers[HELD_OUT:], numbers[:HELD_OUT]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character and per tag; ``<pad>`` and ``<eos>`` are the special tokens. Pads on the left, as generation needs it."""
    require_packages("transformers", "tokenizers", extras=("demo",), needed_by="The demo")
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate(("<pad>", "<eos>", "<unk>", *TAGS, *dict.fromkeys(CHARACTERS)))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("|".join((*TAGS, "."))), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
