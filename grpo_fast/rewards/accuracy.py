"""Accuracy: compares the stated and the true answer as texts or plain numbers, without optional packages; `mathematics` compares LaTeX."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal

from grpo_fast.rewards.common import Completion, check_same_length, text_of

__all__ = ["accuracy_reward", "canonical_answer", "extract_answer"]

_PLAIN_NUMBER = re.compile(r"[+-]?(?:0|[1-9]\d*|[1-9]\d{0,2}(?:,\d{3})+)(?:\.\d+)?")


def accuracy_reward(
    prompts: Sequence[Completion],
    completions: Sequence[Completion],
    completion_ids: Sequence[Sequence[int]] | None = None,
    *,
    answer: Sequence[object],
    **columns: object,
) -> list[float | None]:
    """1 if the stated answer is the true one, else 0; None where the true answer is None (DeepSeek-R1's accuracy reward).

    The stated answer is what `extract_answer` finds; two answers are the same if `canonical_answer` maps them to the same value.

    Example:
        >>> accuracy_reward(["1 + 1?"] * 3, ["<answer>2.0</answer>", "2", r"\\boxed{2}"], answer=["2", "2", None])
        [1.0, 0.0, None]
    """
    check_same_length("accuracy_reward", prompts=prompts, completions=completions, answer=answer)
    stated = (extract_answer(text_of(completion)) for completion in completions)
    return [
        None if truth is None else float(text is not None and canonical_answer(text) == canonical_answer(truth))
        for text, truth in zip(stated, answer, strict=True)
    ]


def extract_answer(text: str) -> str | None:
    r"""The content of the last ``<answer>…</answer>``, else of the last ``\boxed{…}`` (braces may nest), else None."""
    # Search from the end: a regular expression takes quadratic time on a completion that repeats "<answer>" up to the length limit.
    start = text.rfind("<answer>", 0, max(text.rfind("</answer>"), 0))
    if start >= 0:
        return text[start + len("<answer>") : text.index("</answer>", start)].strip()
    _, box, rest = text.rpartition(r"\boxed{")
    depth = 1
    for position, character in enumerate(rest if box else ""):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return rest[:position].strip()
    return None


def canonical_answer(answer: object) -> str | Decimal:
    """A form in which equal answers compare equal: the value of a plain number, else the text with normalised white space.

    A number with leading zeros is a text: "0125" does not equal "125".

    Example:
        >>> canonical_answer("1,000") == canonical_answer("+1000.0"), canonical_answer("0125") == canonical_answer("125")
        (True, False)
    """
    text = " ".join(str(answer).split())
    return Decimal(text.replace(",", "")) if _PLAIN_NUMBER.fullmatch(text) else text
