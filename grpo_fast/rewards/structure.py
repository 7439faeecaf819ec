"""The format ``<think>…</think><answer>…</answer>`` of a completion: as a whole, or counted tag by tag."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from grpo_fast.rewards.common import Completion, check_same_length, with_opening
from grpo_fast.utils.text_statistics import parse_sections

__all__ = ["FormatReward", "TagCountReward", "format_reward", "tag_count_reward"]

TAGS = ("<think>", "</think>", "<answer>", "</answer>")  # what these rewards read; the trainer checks that completions have them


@dataclass(frozen=True)
class FormatReward:
    """1 for ``<think>…</think><answer>…</answer>``, each tag once, in order, nothing around it; else 0 (arXiv:2501.12948, section 2.2).

    Args:
        think_opened: the prompt ends with ``<think>``, as the chat templates of many reasoning models do, so that no completion has it.

    Example:
        >>> format_reward(["1 + 1?"] * 2, ["<think>1, 2</think><answer>2</answer>", "1, 2</think><answer>2</answer>"])
        [1.0, 0.0]
        >>> FormatReward(think_opened=True)(["1 + 1? <think>"], ["1, 2</think><answer>2</answer>"])
        [1.0]
    """

    think_opened: bool = False
    tags = TAGS
    __name__ = "format_reward"

    def __call__(
        self,
        prompts: Sequence[Completion],
        completions: Sequence[Completion],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: object,
    ) -> list[float | None]:
        check_same_length(self.__name__, prompts=prompts, completions=completions)
        return [float(parse_sections(with_opening(completion, self.think_opened)) is not None) for completion in completions]


@dataclass(frozen=True)
class TagCountReward:
    """A quarter for each of the four tags that occurs exactly once, for a model that does not yet earn `FormatReward`.

    As in open-r1. The order of the tags is ignored, so give it a small weight beside `FormatReward`.

    Args:
        think_opened: see `FormatReward`.

    Example:
        >>> tag_count_reward(["1 + 1?"] * 2, ["<think>1, 2</think><answer>2", "<answer>2</answer><answer>2</answer>"])
        [0.75, 0.0]
    """

    think_opened: bool = False
    tags = TAGS
    __name__ = "tag_count_reward"

    def __call__(
        self,
        prompts: Sequence[Completion],
        completions: Sequence[Completion],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: object,
    ) -> list[float | None]:
        check_same_length(self.__name__, prompts=prompts, completions=completions)
        texts = [with_opening(completion, self.think_opened) for completion in completions]
        return [sum(text.count(tag) == 1 for tag in TAGS) / len(TAGS) for text in texts]


format_reward = FormatReward()
tag_count_reward = TagCountReward()
