"""What every reward reads: the text of a completion, its question, its reasoning, and checks of lengths and settings."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from grpo_fast.utils.text_statistics import parse_sections

__all__ = [
    "TRAINER_ARGUMENTS",
    "Completion",
    "Reward",
    "check_range",
    "check_same_length",
    "name_of",
    "reasoning_of",
    "rows_of",
    "text_of",
    "with_opening",
]

Completion: TypeAlias = "str | Sequence[dict[str, str]]"
Reward: TypeAlias = Callable[..., "list[float | None]"]

# What the trainer passes to a reward that has a parameter of this name, in addition to the columns of the dataset.
TRAINER_ARGUMENTS = ("trainer_state", "log_extra", "log_metric", "logprobs", "ref_logprobs")

_TAG = re.compile(r"</?(?:think|answer)>")
_ANSWER_SECTION = re.compile(r"<answer>.*?(?:</answer>|\Z)", re.DOTALL)


def text_of(completion: Completion) -> str:
    """A string is itself; of chat messages the last one counts."""
    if isinstance(completion, str):
        return completion
    content: Any = completion[-1]["content"] if completion else ""
    if isinstance(content, (list, tuple)):  # in parts, as models that see images have it
        return "".join(part.get("text") or "" for part in content)
    return content or ""


def with_opening(completion: Completion, think_opened: bool) -> str:
    """The text of a completion, with the ``<think>`` that the prompt has opened, if it has."""
    return f"<think>{text_of(completion)}" if think_opened else text_of(completion)


def reasoning_of(text: str) -> str:
    """What a completion says before its answer: the content of ``<think>``, also if broken off; without that tag, all but the answer."""
    sections = parse_sections(text)
    if sections is not None:
        return sections.reasoning
    _, tag, rest = text.partition("<think>")
    if tag:
        return rest.partition("</think>")[0]
    before, tag, _ = text.partition("</think>")  # the chat template of many models opens the tag within the prompt
    return before if tag else _TAG.sub(" ", _ANSWER_SECTION.sub(" ", text))


def name_of(reward: Any) -> str:
    """The name under which a reward is logged: its ``__name__``, that of what a `functools.partial` wraps, or its class."""
    reward = getattr(reward, "func", reward)
    return str(getattr(reward, "__name__", type(reward).__name__))


def rows_of(where: str, name: str, rows: Sequence[Any] | None, completion_ids: Sequence[Sequence[int]]) -> list[list[float] | None]:
    """Per completion its tokens' numbers (``logprobs``, ``ref_logprobs``), without padding; None where there are none.

    ``rows`` is a tensor or array [B, T], or a list of sequences; what lies beyond a completion's length is padding.
    """
    if rows is None:
        return [None] * len(completion_ids)
    check_same_length(where, prompts=completion_ids, **{name: rows})
    result: list[list[float] | None] = []
    for i, (row, ids) in enumerate(zip(rows, completion_ids, strict=True)):
        if row is None:
            result.append(None)
            continue
        values = row.tolist() if hasattr(row, "tolist") else list(row)
        if len(values) < len(ids):
            raise ValueError(
                f"{where}: {name}[{i}] has {len(values)} numbers; expected at least {len(ids)}, one per token of the completion."
            )
        result.append(values[: len(ids)])
    return result


def check_same_length(where: str, **lists: Sequence[Any]) -> None:
    lengths = {name: len(values) for name, values in lists.items()}
    expected = lengths["prompts"]
    for name, length in lengths.items():
        if length != expected:
            raise ValueError(
                f"{where}: {name} has {length} items; expected {expected}, one per prompt. "
                "Repeat each prompt and each column once per completion of its group."
            )


def check_range(where: str, name: str, value: Any, low: float, high: float = math.inf, *, what: str = "", above: bool = False) -> None:
    """Refuse a setting that is no finite number from ``low`` to ``high``; ``above``: ``low`` itself is refused too."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{where}: {name} is {value!r} ({type(value).__name__}); expected a number.")
    if not (low < value if above else low <= value) or not value <= high or math.isinf(value):
        bounds = f"{'above' if above else 'at least'} {low:g}" + (f" and at most {high:g}" if high < math.inf else "")
        raise ValueError(f"{where}: {name} is {value}; expected a finite number of {bounds}{f', {what}' if what else ''}.")
