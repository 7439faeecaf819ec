"""The checks of rows before training: the kind of the data, its columns, and the prompt of each row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from grpo_fast.rewards.common import TRAINER_ARGUMENTS

if TYPE_CHECKING:
    import datasets

__all__ = ["Prompt", "Row", "Rows", "check_kind", "check_rows", "column_of", "names_of"]

# Names that the trainer uses for arguments of rewards. (Columns "completion" and "completion_ids" are not passed to rewards, as in TRL.)
_RESERVED = ("prompts", "completions", "extras", *TRAINER_ARGUMENTS)
_COPYING_FORMATS = ("pandas", "polars", "arrow")  # of a Dataset whose rows are no dictionaries
_EXPECTED = "expected a Dataset or a list of dictionaries"

Row: TypeAlias = dict[str, Any]
Rows: TypeAlias = "list[Row] | datasets.Dataset"
Prompt: TypeAlias = "str | Sequence[Mapping[str, Any]]"  # a text, or chat messages


def check_rows(rows: Any, who: str, *, start: int = 0) -> bool:
    """Check before training that all rows have the same columns and prompts of one kind.

    Args:
        rows: a list of dictionaries or a ``datasets.Dataset``. Of another sequence, which may make its rows on demand, only the first row
            is checked.
        who: the caller; messages begin with it.
        start: the number of the first row, in messages.

    Returns:
        whether the prompts are conversations.

    Raises:
        ValueError, TypeError: names the row or column, what it was, what was expected and the fix.
    """
    check_kind(rows, who)
    if len(rows) == 0:
        raise ValueError(f"{who}: there are no rows; expected at least one prompt.")
    if not isinstance(rows, list) and not hasattr(rows, "column_names"):
        rows = list(rows) if isinstance(rows, tuple) else [rows[0]]
    names = names_of(rows, who, start)
    _check_columns(names, who)
    first = None
    for position, prompt in enumerate(column_of(rows, "prompt"), start):
        kind = _is_conversation(prompt, position, who)
        _check_text(prompt, position, who)
        first = kind if first is None else first
        if kind != first:
            kinds = f"{_describe_kind(kind)}, and that of row 0 {_describe_kind(first)}"
            raise ValueError(f"{who}: the prompt of row {position} is {kinds}; expected one kind.")
    return bool(first)


def names_of(rows: Rows, who: str, start: int = 0) -> list[str]:
    """The names of the columns.

    Raises:
        TypeError: a row is no dictionary.
        ValueError: the rows have different columns.
    """
    if not isinstance(rows, list):
        return list(rows.column_names)
    for position, row in enumerate(rows, start):
        if not isinstance(row, Mapping):
            raise TypeError(f"{who}: row {position} is a {type(row).__name__}; expected a dictionary with a 'prompt'.")
        if row.keys() != rows[0].keys():
            raise ValueError(
                f"{who}: row {position} has the columns {', '.join(map(str, row))}, and row 0 {', '.join(map(str, rows[0]))}; expected the "
                "same in every row."
            )
    return list(rows[0]) if rows else []


def column_of(rows: Rows, name: str) -> Iterable[Any]:
    """The values of a column."""
    return (row[name] for row in rows) if isinstance(rows, list) else rows[name]


def check_kind(data: Any, who: str) -> None:
    """Check that data has a length and rows by number, and that it is no text, dictionary or DataFrame.

    Raises:
        TypeError: says what it was, what was expected and the fix.
    """
    kind = type(data).__name__
    if hasattr(data, "iloc"):  # a DataFrame has a length, and its rows by number are something else
        raise TypeError(f"{who} is a {kind}; {_EXPECTED}. Fix: Dataset.from_pandas(frame).")
    if isinstance(data, (str, bytes)):
        raise TypeError(f"{who} is the text {data!r:.100}; {_EXPECTED}. Fix: grpo_fast.data.load_prompts(name, tokenizer).rows.")
    if isinstance(data, Mapping):
        is_split = any(hasattr(each, "column_names") for each in data.values())
        what, fix = ("splits", "data[SPLIT]") if is_split else ("columns", "datasets.Dataset.from_dict(columns)")
        raise TypeError(f"{who} is a {kind} of the {what} {', '.join(map(str, data))}; {_EXPECTED}. Fix: {fix}.")
    form = getattr(data, "format", None)
    if isinstance(form, dict) and form.get("type") in _COPYING_FORMATS:
        raise TypeError(f"{who} has the format {form['type']!r}; {_EXPECTED}. Fix: {who}.with_format(None).")
    if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
        raise TypeError(
            f"{who} is a {kind} without a length; {_EXPECTED}. Fix for a stream: the function that makes it, not what it returns, or "
            "list(itertools.islice(stream, n))."
        )


def _check_columns(names: Sequence[object], who: str) -> None:
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"{who}: the column {name!r} has a {type(name).__name__} as its name; expected a text. Fix: rename it.")
    if "prompt" not in names:
        raise ValueError(
            f"{who}: there is no column 'prompt'; the columns are: {', '.join(map(str, names))}. Fix: rename the one that holds the "
            "questions (load_prompts has rename={'...': 'prompt'})."
        )
    reserved = [name for name in names if name in _RESERVED]
    if reserved:
        raise ValueError(f"{who}: the column {reserved[0]!r} has a name that rewards know for something else. Fix: rename or remove it.")


def _is_conversation(prompt: Any, position: int, who: str) -> bool:
    if isinstance(prompt, str):
        return False
    if isinstance(prompt, (list, tuple)) and prompt and all(isinstance(m, Mapping) and "role" in m and "content" in m for m in prompt):
        return True
    text = repr(prompt)
    raise ValueError(
        f"{who}: the prompt of row {position} is {text if len(text) <= 60 else text[:57] + '...'}; expected a text, or a list of "
        "messages {'role': ..., 'content': ...}."
    )


def _check_text(prompt: Prompt, position: int, who: str) -> None:
    texts = [prompt] if isinstance(prompt, str) else [text for message in prompt for text in _texts(message, position, who)]
    if not any(texts) and not (isinstance(prompt, (list, tuple)) and any(message.get("tool_calls") for message in prompt)):
        raise ValueError(f"{who}: the prompt of row {position} has no tokens: it is empty; expected a question. Fix: leave the row out.")
    for text in texts:
        try:
            if not text.isascii():
                text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{who}: the prompt of row {position} has {text[error.start]!r} at character {error.start}, half of a surrogate "
                "pair, which tokenizers do not take. Fix: read the data in its encoding, or text.encode('utf-8', 'replace').decode()."
            ) from None


def _texts(message: Mapping[str, Any], position: int, who: str) -> Iterable[str]:
    """The texts of a message's content, which is a text, a list of parts with texts, or None, as in a message of tool calls."""
    content = message["content"]
    for part in content if isinstance(content, (list, tuple)) else [content]:
        text = part.get("text") if isinstance(part, Mapping) else part
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        if kind != "text":
            raise ValueError(
                f"{who}: the prompt of row {position} has a part of the type {kind!r}; expected texts: models that read images or sounds "
                "cannot be trained. Fix: leave the row out."
            )
        if isinstance(text, str):
            yield text
        elif text is not None or isinstance(part, Mapping):
            raise ValueError(
                f"{who}: the prompt of row {position} has a content that is a {type(text).__name__}; expected a text, or a list of "
                "{'type': 'text', 'text': ...}."
            )


def _describe_kind(conversation: bool) -> str:
    return "a list of messages" if conversation else "a text"
