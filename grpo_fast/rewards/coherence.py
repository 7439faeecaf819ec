"""Coherence: agreement of the answer with the reasoning, and of the reasoning with the question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from grpo_fast.rewards.common import Completion, check_same_length, text_of, with_opening
from grpo_fast.utils.text_statistics import NUMBER_PATTERN, STEP_PATTERN, coherence

__all__ = ["CoherenceReward"]


@dataclass(frozen=True)
class CoherenceReward:
    """The coherence of a completion, from 0 to 1: the mean of three rules, see `grpo_fast.utils.text_statistics.coherence`.

    The tags are well formed; the answer agrees with the reasoning (it occurs in the last step); the reasoning agrees with the question (it
    mentions the question's keys, by default its numbers). A coherent completion may be wrong: combine this with `accuracy_reward`. The
    rules are this package's own; like DeepSeek-R1 (arXiv:2501.12948, section 2.2) it uses rules instead of a reward model.

    Args:
        key_pattern: regular expression of the parts of the question that the reasoning must mention.
        step_pattern: regular expression of what separates two steps of the reasoning.
        think_opened: the prompt ends with ``<think>``, see `FormatReward`.

    Example:
        >>> CoherenceReward()(["What is 3 + 4?"], ["<think>3 + 4; so 7</think><answer>7</answer>"])
        [1.0]
    """

    key_pattern: str = NUMBER_PATTERN
    step_pattern: str = STEP_PATTERN
    think_opened: bool = False
    __name__ = "coherence_reward"  # the name under which trainers log it

    def __call__(
        self,
        prompts: Sequence[Completion],
        completions: Sequence[Completion],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: object,
    ) -> list[float | None]:
        check_same_length(self.__name__, prompts=prompts, completions=completions)
        rules = {"key_pattern": self.key_pattern, "step_pattern": self.step_pattern}
        texts = [with_opening(completion, self.think_opened) for completion in completions]
        return [coherence(text_of(prompt), text, **rules) for prompt, text in zip(prompts, texts, strict=True)]
