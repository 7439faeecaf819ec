"""The reward of the questions in ``questions.jsonl``: whether a completion names the capital."""

from __future__ import annotations

from collections.abc import Sequence

from grpo_fast.rewards.common import Completion, text_of


def names_capital(completions: Sequence[Completion], answer: Sequence[str], **columns: object) -> list[float]:
    """1 for a completion that contains one of the spellings of its answer, which are separated by ``|``, in any case of letters; else 0.

    Example:
        >>> names_capital(["It is Kiev.", "I do not know."], ["Kyiv|Kiev", "Kyiv|Kiev"])
        [1.0, 0.0]
    """
    texts = [text_of(completion).lower() for completion in completions]
    return [float(any(name.lower() in text for name in names.split("|"))) for text, names in zip(texts, answer, strict=True)]
