"""Rewards by rule: correctness, format, coherence, repetition. No model judges, so there is none to be fooled.

DeepSeek-R1 (arXiv:2501.12948, section 2.2) trains its reasoning on such rules alone, since a neural reward model invites reward hacking.

Every reward is called as in TRL, ``reward(prompts, completions, completion_ids, **columns) -> list[float | None]``: one number per
completion, None where the rule does not apply. A completion is a string, or a list of chat messages of which the last one counts. The
columns are lists as long as ``prompts``. Rewards with settings are frozen dataclasses: they can be pickled for reward workers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, TypeAlias

import torch
from torch import Tensor

from grpo_fast.metrics import NUMBER, STEP, coherence, parse_sections, repeated_ngrams

__all__ = ["CoherenceReward", "RepetitionPenalty", "accuracy_reward", "extract_answer", "format_reward", "reward_matrix"]

Completion: TypeAlias = "str | Sequence[dict[str, str]]"
Reward: TypeAlias = Callable[..., "list[float | None]"]

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_PLAIN_NUMBER = re.compile(r"[+-]?(?:0|[1-9]\d*|[1-9]\d{0,2}(?:,\d{3})+)(?:\.\d+)?")


def accuracy_reward(
    prompts: Sequence[Completion],
    completions: Sequence[Completion],
    completion_ids: Sequence[Sequence[int]] | None = None,
    *,
    answer: Sequence[str | None],
    **columns: Any,
) -> list[float | None]:
    """1 if the stated answer is the true one, else 0; None where the true answer is None (DeepSeek-R1's accuracy reward).

    The stated answer is what `extract_answer` finds. Two answers are the same if they are the same text but for white space, or plain
    numbers of equal value ("1,000" and "1000.0"). A number with leading zeros is no plain number: "0125" is a text, and not "125".
    """
    _same_length("accuracy_reward", prompts=prompts, completions=completions, answer=answer)
    return [None if truth is None else float(_same(extract_answer(_text(c)), truth)) for c, truth in zip(completions, answer, strict=True)]


def format_reward(
    prompts: Sequence[Completion], completions: Sequence[Completion], completion_ids: Sequence[Sequence[int]] | None = None, **columns: Any
) -> list[float | None]:
    """1 for ``<think>…</think><answer>…</answer>``, each tag once, in order, nothing around it; else 0 (DeepSeek-R1's format reward)."""
    _same_length("format_reward", prompts=prompts, completions=completions)
    return [float(parse_sections(_text(c)) is not None) for c in completions]


@dataclass(frozen=True)
class CoherenceReward:
    """From 0 to 1: does the completion hang together? The mean of three rules, see `grpo_fast.metrics.coherence`.

    Tags well formed; the answer agrees with the reasoning (it stands in its last step); the reasoning agrees with the question (it
    takes up the question's keys, by default its numbers). Coherent is not correct: pair it with `accuracy_reward`.

    Args:
        key_pattern: regular expression of what the reasoning must take up from the question.
        step_pattern: regular expression of what separates two steps of the reasoning.
    """

    key_pattern: str = NUMBER
    step_pattern: str = STEP
    __name__ = "coherence_reward"  # the name under which trainers log it

    def __call__(
        self,
        prompts: Sequence[Completion],
        completions: Sequence[Completion],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        _same_length(self.__name__, prompts=prompts, completions=completions)
        rules = {"key_pattern": self.key_pattern, "step_pattern": self.step_pattern}
        return [coherence(_text(p), _text(c), **rules) for p, c in zip(prompts, completions, strict=True)]


@dataclass(frozen=True)
class RepetitionPenalty:
    """From ``-max_penalty`` to 0: minus the share of token n-grams that occurred before (arXiv:2502.03373, appendix C.2).

    The paper charges the repeating tokens; here the charge is one number per completion, as a group advantage needs it.

    Args:
        ngram_size: length of the n-grams, in tokens. Longer than what an honest answer repeats, shorter than a loop.
        max_penalty: the penalty of a completion that is nothing but repetition, at least 0.
    """

    ngram_size: int = 4
    max_penalty: float = 1.0
    __name__ = "repetition_penalty"

    def __post_init__(self) -> None:
        if self.ngram_size < 1:
            raise ValueError(f"RepetitionPenalty: ngram_size is {self.ngram_size}; expected at least 1.")
        if not self.max_penalty >= 0 or math.isinf(self.max_penalty):
            raise ValueError(f"RepetitionPenalty: max_penalty is {self.max_penalty}; expected a finite number >= 0 (it is subtracted).")

    def __call__(
        self, prompts: Sequence[Completion], completions: Sequence[Completion], completion_ids: Sequence[Sequence[int]], **columns: Any
    ) -> list[float | None]:
        _same_length(self.__name__, prompts=prompts, completions=completions, completion_ids=completion_ids)
        return [-self.max_penalty * repeated_ngrams(ids, self.ngram_size) for ids in completion_ids]


def reward_matrix(
    rewards: Sequence[Reward],
    prompts: Sequence[Completion],
    completions: Sequence[Completion],
    completion_ids: Sequence[Sequence[int]],
    **columns: Sequence[Any],
) -> Tensor:
    """All rewards of all completions as float32 ``[B, R]``, NaN where a reward does not apply: what `grpo_fast.group_advantages` takes."""
    _same_length("reward_matrix", prompts=prompts, completions=completions, completion_ids=completion_ids, **columns)
    table = torch.empty(len(prompts), len(rewards), dtype=torch.float32)
    for column, reward in enumerate(rewards):
        values = reward(prompts=prompts, completions=completions, completion_ids=completion_ids, **columns)
        name = getattr(reward, "__name__", type(reward).__name__)
        if len(values) != len(prompts):
            raise ValueError(
                f"reward_matrix: reward {name!r} returned {len(values)} values for {len(prompts)} completions; "
                "expected one per completion. Return None where it does not apply."
            )
        table[:, column] = torch.tensor([math.nan if value is None else value for value in values], dtype=torch.float32)
    return table


def extract_answer(text: str) -> str | None:
    r"""The content of the last ``<answer>…</answer>``, else of the last ``\boxed{…}`` (braces may nest), else None."""
    tagged = _ANSWER.findall(text)
    if tagged:
        return str(tagged[-1]).strip()
    _, box, rest = text.rpartition(r"\boxed{")
    depth = 1
    for position, character in enumerate(rest if box else ""):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return rest[:position].strip()
    return None


def _same(stated: str | None, truth: str) -> bool:
    if stated is None:
        return False
    stated, truth = " ".join(stated.split()), " ".join(str(truth).split())
    if _PLAIN_NUMBER.fullmatch(stated) and _PLAIN_NUMBER.fullmatch(truth):
        return Decimal(stated.replace(",", "")) == Decimal(truth.replace(",", ""))
    return stated == truth


def _text(completion: Completion) -> str:
    if isinstance(completion, str):
        return completion
    return completion[-1]["content"] if completion else ""


def _same_length(where: str, **lists: Sequence[Any]) -> None:
    lengths = {name: len(values) for name, values in lists.items()}
    expected = lengths["prompts"]
    for name, length in lengths.items():
        if length != expected:
            raise ValueError(
                f"{where}: {name} has {length} items; expected {expected}, one per prompt. "
                "Repeat each prompt and each column once per completion of its group."
            )
