"""Sort the digits of a number: ``sort 5281=`` has the answer ``1258``. A task that a model of 0.1 million parameters can learn.

``grpo-fast demo`` trains on it, with the completion format ``<think>1258;1258</think><answer>1258</answer>``, in which writing the sorted
digits a second time is the model's check of its answer. `make_tokenizer` knows only the characters of this task.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from grpo_fast.data.tasks.common import Task, TaskRows, check_instruction
from grpo_fast.rewards.accuracy import accuracy_reward
from grpo_fast.rewards.common import check_range
from grpo_fast.utils.install_hints import require_packages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["DIGITS", "make_tokenizer", "question", "solve", "sorting_task", "split_questions"]

DIGITS = 4  # length of the numbers of `split_questions`
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
CHARACTERS = "0123456789=; sort"
HELD_OUT = 1000  # of the 10,000 numbers: used for evaluation only


def sorting_task(size: int = 1000, *, seed: int = 0, digits: int = 4, instruction: str = "{question}") -> Task:
    """Sort the digits of random numbers, scored by `accuracy_reward`.

    Args:
        size: number of rows.
        seed: the same seed gives the same rows.
        digits: length of every number; a number may begin with zeros.
        instruction: the prompt; ``{question}`` is replaced by the question.

    Example:
        >>> sorting_task(1, digits=5).rows
        [{'prompt': 'sort 87425=', 'answer': '24578'}]
    """
    for name, value in (("size", size), ("digits", digits)):
        check_range("sorting_task", name, value, 1)
    check_instruction("sorting_task", instruction)
    rng = random.Random(seed)
    rows = [question("".join(rng.choices("0123456789", k=digits))) for _ in range(size)]
    return Task(TaskRows({**row, "prompt": instruction.replace("{question}", row["prompt"])} for row in rows), accuracy_reward)


def question(digits: str) -> dict[str, str]:
    """The row of one number: its ``prompt``, and the true ``answer`` as a column for the rewards."""
    return {"prompt": f"sort {digits}=", "answer": solve(digits)}


def solve(digits: str) -> str:
    """The digits in ascending order.

    Example:
        >>> solve("5281")
        '1258'
    """
    return "".join(sorted(digits))


def split_questions() -> tuple[list[str], list[str]]:
    """All numbers of `DIGITS` digits as ``(training, held out)``. The split is always the same: it does not depend on a seed."""
    numbers = [f"{number:0{DIGITS}d}" for number in range(10**DIGITS)]
    random.Random(0).shuffle(numbers)
    return numbers[HELD_OUT:], numbers[:HELD_OUT]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer for this task: one token per character and per tag, with the special tokens ``<pad>``, ``<eos>`` and ``<unk>``.

    It pads on the left, as generation needs it.

    Raises:
        ImportError: transformers or tokenizers is not installed.
    """
    require_packages("transformers", "tokenizers", extras=("demo",), needed_by="make_tokenizer")
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
