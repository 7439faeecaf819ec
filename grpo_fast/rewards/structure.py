"""Does a completion have the form ``<think>…</think><answer>…</answer>``? All of it, or tag by tag."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from grpo_fast.metrics import parse_sections
from grpo_fast.rewards.common import Completion, check_same_length, text_of

__all__ = ["format_reward", "tag_count_reward"]

TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def format_reward(
    prompts: Sequence[Completion], completions: Sequence[Completion], completion_ids: Sequence[Sequence[int]] | None = None, **columns: Any
) -> list[float | None]:
    """1 for ``<think>…</think><answer>…</answer>``, each tag once, in order, nothing around it; else 0 (arXiv:2501.12948, section 2.2).

    Example:
        >>> format_reward(["1 + 1?"] * 2, ["<think>1, 2</think><answer>2</answer>", "<answer>2</answer>"])
        [1.0, 0.0]
    """
    check_same_length("format_reward", prompts=prompts, completions=completions)
    return [float(parse_sections(text_of(completion)) is not None) for completion in completions]


def tag_count_reward(
    prompts: Sequence[Completion], completions: Sequence[Completion], completion_ids: Sequence[Sequence[int]] | None = None, **columns: Any
) -> list[float | None]:
    """A quarter for each of the four tags that occurs exactly once: a way up to `format_reward` for a model that never earns it yet.

    Known from open-r1. Order does not count, so weigh it lightly, beside `format_reward`.

    Example:
        >>> tag_count_reward(["1 + 1?"] * 2, ["<think>1, 2</think><answer>2", "<answer>2</answer><answer>2</answer>"])
        [0.75, 0.0]
    """
    check_same_length("tag_count_reward", prompts=prompts, completions=completions)
    texts = [text_of(completion) for completion in completions]
    return [sum(text.count(tag) == 1 for tag in TAGS) / len(TAGS) for text in texts]
