"""Rewards of the completion length, in tokens. None of them rewards length for its own sake."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from grpo_fast.rewards.accuracy import accuracy_reward
from grpo_fast.rewards.common import Completion, SyncReward, check_range, check_same_length

__all__ = ["CosineLengthReward", "LengthReward", "SoftOverlongPunishment"]


@dataclass(frozen=True)
class LengthReward:
    """From -0.5 to 0.5, higher for shorter correct answers to the same question (Kimi k1.5, arXiv:2501.12599, "length penalty")::

        x = 0.5 - (length - shortest) / (longest - shortest)        reward = x if right, min(0, x) if wrong

    Shortest and longest are those of the completions of the same prompt in the same call: of several processes each sees its own, so let
    ``per_device_train_batch_size * steps_per_generation`` be a multiple of ``num_generations``. All 0 where they are equally long. None
    where the true answer is None. Kimi begins training without it and adds it later: from the start, it slows learning.

    Args:
        correct: the reward that says what is right (above 0). A module's function or a frozen dataclass, so that it can be pickled.

    Example:
        >>> right, wrong = "<answer>2</answer>", "<answer>3</answer>"
        >>> LengthReward()(["1 + 1?"] * 3, [right, right, wrong], [[1], [1, 2, 3], [1]], answer=["2"] * 3)
        [0.5, -0.5, 0.0]
    """

    correct: SyncReward = accuracy_reward
    __name__ = "length_reward"

    def __call__(
        self, prompts: Sequence[Completion], completions: Sequence[Completion], completion_ids: Sequence[Sequence[int]], **columns: object
    ) -> list[float | None]:
        right = _judged(self.__name__, self.correct, prompts, completions, completion_ids, columns)
        lengths = defaultdict(list)
        keys = [prompt if isinstance(prompt, str) else repr(prompt) for prompt in prompts]
        for key, ids in zip(keys, completion_ids, strict=True):
            lengths[key].append(len(ids))
        result: list[float | None] = []
        for key, ids, is_right in zip(keys, completion_ids, right, strict=True):
            shortest, longest = min(lengths[key]), max(lengths[key])
            x = 0.0 if longest == shortest else 0.5 - (len(ids) - shortest) / (longest - shortest)
            result.append(None if is_right is None else x if is_right else min(0.0, x))
        return result


@dataclass(frozen=True)
class CosineLengthReward:
    """Right answers are worth more if short, wrong ones cost less if long (more thinking might have helped): arXiv:2502.03373, app. C.1::

        value(length) = end + (start - end) (1 + cos(pi length / max_length)) / 2        from start at 0 to end at max_length

    with start and end by whether the answer is right; ``exceeded`` from ``max_length`` tokens on. None where the true answer is None. It
    holds the accuracy reward within it: use it in place of that, with a repetition penalty, as the paper does, since a wrong answer
    gains by being drawn out. The defaults are this package's own.

    Args:
        max_length: tokens, at least 1: the length limit of generation.
        right: (start, end) for a right answer.
        wrong: (start, end) for a wrong one.
        exceeded: the reward of a completion that ran into the limit.
        correct: the reward that says what is right (above 0).

    Example:
        >>> right, wrong = "<answer>2</answer>", "<answer>3</answer>"
        >>> CosineLengthReward(4)(["1 + 1?"] * 4, [right, wrong] * 2, [[1, 2], [1, 2], [1] * 4, []], answer=["2"] * 4)
        [0.75, -0.75, -1.0, -1.0]
    """

    max_length: int
    right: tuple[float, float] = (1.0, 0.5)
    wrong: tuple[float, float] = (-1.0, -0.5)
    exceeded: float = -1.0
    correct: SyncReward = accuracy_reward
    __name__ = "cosine_length_reward"

    def __post_init__(self) -> None:
        check_range("CosineLengthReward", "max_length", self.max_length, 1)
        for name in ("right", "wrong"):
            pair = tuple(getattr(self, name))
            if len(pair) != 2:
                raise ValueError(f"CosineLengthReward: {name} is {pair}; expected two numbers, the rewards at length 0 and at max_length.")
            for value in pair:
                check_range("CosineLengthReward", name, value, -math.inf)
            object.__setattr__(self, name, pair)  # a list, as a file of settings has it, would not hash
        check_range("CosineLengthReward", "exceeded", self.exceeded, -math.inf)

    def __call__(
        self, prompts: Sequence[Completion], completions: Sequence[Completion], completion_ids: Sequence[Sequence[int]], **columns: object
    ) -> list[float | None]:
        right = _judged(self.__name__, self.correct, prompts, completions, completion_ids, columns)
        return [None if is_right is None else self._value(len(ids), is_right) for ids, is_right in zip(completion_ids, right, strict=True)]

    def _value(self, length: int, is_right: bool) -> float:
        if length >= self.max_length:
            return self.exceeded
        start, end = self.right if is_right else self.wrong
        return end + (start - end) * (1 + math.cos(math.pi * length / self.max_length)) / 2


@dataclass(frozen=True)
class SoftOverlongPunishment:
    """From -1 to 0: a slope in front of the length limit instead of a cliff (DAPO, arXiv:2503.14476, equation 13)::

        0 up to max_length - margin;   (max_length - margin - length) / margin up to max_length;   -1 beyond

    Args:
        max_length: tokens; what is longer gets -1.
        margin: tokens over which the punishment grows, from 1 to ``max_length``. The paper: 20,480 and 4,096.

    Example:
        >>> SoftOverlongPunishment(max_length=10, margin=4)(["?"] * 4, [""] * 4, [[0] * 6, [0] * 7, [0] * 10, [0] * 11])
        [0.0, -0.25, -1.0, -1.0]
    """

    max_length: int
    margin: int
    __name__ = "soft_overlong_punishment"

    def __post_init__(self) -> None:
        check_range("SoftOverlongPunishment", "max_length", self.max_length, 1)
        check_range("SoftOverlongPunishment", "margin", self.margin, 1, self.max_length, what="a part of max_length")

    def __call__(
        self, prompts: Sequence[Completion], completions: Sequence[Completion], completion_ids: Sequence[Sequence[int]], **columns: object
    ) -> list[float | None]:
        check_same_length(self.__name__, prompts=prompts, completions=completions, completion_ids=completion_ids)
        free = self.max_length - self.margin
        return [-min(max((len(ids) - free) / self.margin, 0.0), 1.0) + 0.0 for ids in completion_ids]


def _judged(
    where: str, correct: SyncReward, prompts: Any, completions: Any, completion_ids: Any, columns: dict[str, Any]
) -> list[bool | None]:
    check_same_length(where, prompts=prompts, completions=completions, completion_ids=completion_ids)
    values = correct(prompts=prompts, completions=completions, completion_ids=completion_ids, **columns)
    check_same_length(f"{where}: what its `correct` returned", prompts=prompts, values=values)
    return [None if value is None else value > 0 for value in values]
