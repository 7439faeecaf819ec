"""Shared by all rewards: the types, the text and the reasoning of a completion, and the checks of lengths and settings."""

from __future__ import annotations

import math
import re
from collections.abc import Awaitable, Callable, Sequence, Sized
from typing import TYPE_CHECKING, Any, TypeAlias

from grpo_fast.utils.text_statistics import parse_sections

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "TRAINER_ARGUMENTS",
    "Completion",
    "Reward",
    "SyncReward",
    "check_range",
    "check_same_length",
    "name_of",
    "reasoning_of",
    "rows_of",
    "text_of",
    "with_opening",
]

Completion: TypeAlias = "str | Sequence[dict[str, str]]"
SyncReward: TypeAlias = Callable[..., "Sequence[float | None]"]
Reward: TypeAlias = "SyncReward | Callable[..., Awaitable[Sequence[float | None]]]"
TokenValues: TypeAlias = "Tensor | Sequence[Sequence[float] | Tensor | None]"  # [B, T], one number per token; None = no numbers

# Values that the trainer passes to a reward that has a parameter of this name, in addition to the columns of the dataset.
TRAINER_ARGUMENTS = ("trainer_state", "log_extra", "log_metric", "logprobs", "ref_logprobs")

_TAG = re.compile(r"</?(?:think|answer)>")
_ANSWER_SECTION = re.compile(r"<answer>.*?(?:</answer>|\Z)", re.DOTALL)


def text_of(completion: Completion) -> str:
    """The text of a completion: a string itself, or the content of the last chat message."""
    if isinstance(completion, str):
        return completion
    content: Any = completion[-1]["content"] if completion else ""
    if isinstance(content, (list, tuple)):  # in parts, as in the chats of vision-language models
        return "".join(part.get("text") or "" for part in content)
    return content or ""


def with_opening(completion: Completion, think_opened: bool) -> str:
    """The text of a completion, with ``<think>`` in front if the prompt already ends with that tag."""
    return f"<think>{text_of(completion)}" if think_opened else text_of(completion)


def reasoning_of(text: str) -> str:
    """The reasoning of a completion: the content of ``<think>``, closed or not; without that tag, everything but the answer."""
    sections = parse_sections(text)
    if sections is not None:
        return sections.reasoning
    _, tag, rest = text.partition("<think>")
    if tag:
        return rest.partition("</think>")[0]
    before, tag, _ = text.partition("</think>")  # many chat templates put the opening tag into the prompt
    return before if tag else _TAG.sub(" ", _ANSWER_SECTION.sub(" ", text))


def name_of(reward: object) -> str:
    """The name under which a reward is logged: its ``__name__``, that of the function in a `functools.partial`, or its class's name."""
    reward = getattr(reward, "func", reward)
    return str(getattr(reward, "__name__", type(reward).__name__))


def rows_of(where: str, name: str, rows: TokenValues | None, completion_ids: Sequence[Sequence[int]]) -> list[list[float] | None]:
    """The numbers of each completion's tokens (``logprobs``, ``ref_logprobs``) without padding; None where there are none.

    Args:
        where: the reward, for messages.
        name: of the argument, for messages.
        rows: a tensor or array [B, T], or a list of sequences; values beyond the length of a completion are padding.
        completion_ids: B lists of token ids.

    Raises:
        ValueError: there are too few rows, or too few numbers in a row.
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


def check_same_length(where: str, /, **lists: Sized) -> None:
    """Check that all lists have as many items as ``prompts``, which must be among them.

    Raises:
        ValueError: names the list and the lengths.
    """
    lengths = {name: len(values) for name, values in lists.items()}
    expected = lengths["prompts"]
    for name, length in lengths.items():
        if length != expected:
            raise ValueError(
                f"{where}: {name} has {length} items; expected {expected}, one per prompt. "
                "Repeat each prompt and each column once per completion of its group."
            )


def check_range(where: str, name: str, value: object, low: float, high: float = math.inf, *, what: str = "", above: bool = False) -> None:
    """Check that a setting is a finite number from ``low`` to ``high``; with ``above``, greater than ``low``.

    Raises:
        TypeError: it is no number.
        ValueError: it is outside of the range.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{where}: {name} is {value!r} ({type(value).__name__}); expected a number.")
    if not (low < value if above else low <= value) or not value <= high or math.isinf(value):
        bounds = f"{'above' if above else 'at least'} {low:g}" + (f" and at most {high:g}" if high < math.inf else "")
        raise ValueError(f"{where}: {name} is {value}; expected a finite number of {bounds}{f', {what}' if what else ''}.")
