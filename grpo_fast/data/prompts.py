"""Prompts to train on: rows from wherever they are, checked, encoded once and in one way, those that are too long left out and counted."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_fast.rewards.common import TRAINER_ARGUMENTS
from grpo_fast.utils.install_hints import install

__all__ = ["Prompts", "check_evaluation", "check_rows", "encode_prompt", "load_prompts", "read_rows"]

_LOADERS = {".json": "json", ".jsonl": "json", ".ndjson": "json", ".csv": "csv", ".parquet": "parquet"}
# What the trainer itself passes to rewards. (Columns of the names completion and completion_ids reach no reward, here as in TRL.)
_TAKEN = ("prompts", "completions", "extras", *TRAINER_ARGUMENTS)

logger = logging.getLogger("grpo_fast")


@dataclass(frozen=True)
class Prompts:
    """What `load_prompts` returns. ``rows`` goes to a trainer as its data set."""

    rows: Any  # a datasets.Dataset, or a list of dictionaries: each with a ``prompt`` and whatever columns the rewards read
    conversational: bool  # prompts are lists of chat messages
    total: int  # rows there were
    dropped: int  # rows whose prompt was too long
    longest: int  # tokens of the longest prompt that was kept

    def __str__(self) -> str:
        kind = "conversations" if self.conversational else "texts"
        return (
            f"{len(self.rows)} prompts ({kind}), of up to {self.longest} tokens; {self.dropped} of {self.total} were too long and left out"
        )


def load_prompts(
    data: Any,
    tokenizer: Any,
    *,
    max_prompt_length: int | None = None,
    rename: Mapping[str, str] | None = None,
    split: str = "train",
    limit: int | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Prompts:
    """The prompts of a data set, as a trainer takes them.

    Every row is checked (before training, and not in its tenth hour), and its prompt is encoded to see how long it is. Prompts beyond
    ``max_prompt_length`` are dropped, never cut: a question without its beginning or end is another question. Other columns
    stay as they are.

    Args:
        data: a ``datasets.Dataset``; a list of dictionaries; or where `read_rows` finds one: a file, a folder, a name on the hub. All but
            lists need the datasets package.
        tokenizer: of the model; with a chat template, if prompts are lists of messages.
        max_prompt_length: tokens, with the chat template's; None = any.
        rename: columns to rename, old name to new: ``{"question": "prompt", "solution": "answer"}``. The built-in rewards read ``answer``.
        split: of a name, a file, or a data set with splits.
        limit: take no more than the first so many rows.
        chat_template_kwargs: of ``apply_chat_template``, ``{"enable_thinking": False}`` for one.

    Raises:
        ValueError, TypeError: naming the row or column, what it was, what was expected and the cure.

    Example:
        >>> from grpo_fast.data.tasks.sorting import make_tokenizer
        >>> print(load_prompts([{"prompt": "sort 21=", "answer": "12"}, {"prompt": "sort 4321=", "answer": "1234"}], make_tokenizer(),
        ...                    max_prompt_length=8))
        1 prompts (texts), of up to 8 tokens; 1 of 2 were too long and left out
    """
    for name, value in (("max_prompt_length", max_prompt_length), ("limit", limit)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"load_prompts: {name} is {value!r}; expected an integer of at least 1, or None.")
    rows = _rows(data, split)
    if limit is not None:
        rows = rows[:limit] if isinstance(rows, list) else rows.select(range(min(limit, len(rows))))
    rows = _renamed(rows, dict(rename or {}))
    conversational = check_rows(rows, "load_prompts")

    lengths = []
    for position, prompt in enumerate(_column(rows, "prompt")):
        ids = encode_prompt(prompt, tokenizer, chat_template_kwargs)
        if not ids:
            raise ValueError(f"load_prompts: the prompt of row {position} has no tokens; expected a question. Cure: leave the row out.")
        lengths.append(len(ids))
    kept = [i for i, length in enumerate(lengths) if max_prompt_length is None or length <= max_prompt_length]
    if not kept:
        raise ValueError(
            f"load_prompts: max_prompt_length is {max_prompt_length}, and every one of the {len(lengths)} prompts is longer; expected at "
            f"least {min(lengths)}, the tokens of the shortest (the longest has {max(lengths)})."
        )
    dropped = len(lengths) - len(kept)
    if dropped:
        rows = [rows[i] for i in kept] if isinstance(rows, list) else rows.select(kept)
        logger.warning("%d of %d prompts are longer than %d tokens and left out.", dropped, len(lengths), max_prompt_length)
    return Prompts(rows, conversational, len(lengths), dropped, max(lengths[i] for i in kept))


def check_rows(rows: Any, who: str) -> bool:
    """Look at every row before anything is trained: the same columns, and prompts of one kind; whether they are conversations.

    Args:
        rows: a list of dictionaries or a ``datasets.Dataset``. Of any other sequence, which may make its rows when it is asked for one, the
            first is looked at.
        who: wants to know; the errors begin with it.

    Raises:
        ValueError, TypeError: naming the row or column, what it was, what was expected and the cure.
    """
    if len(rows) == 0:
        raise ValueError(f"{who}: there are no rows; expected at least one prompt.")
    if not isinstance(rows, list) and not hasattr(rows, "column_names"):
        rows = [rows[0]]
    names = _names(rows, who)
    if "prompt" not in names:
        raise ValueError(
            f"{who}: there is no column 'prompt'; the columns are: {', '.join(names)}. Cure: rename the one that holds the questions "
            "(load_prompts has rename={'...': 'prompt'})."
        )
    taken = [name for name in names if name in _TAKEN]
    if taken:
        raise ValueError(f"{who}: the column {taken[0]!r} has a name that rewards know for something else. Cure: rename or remove it.")
    prompts = enumerate(_column(rows, "prompt"))
    first = _is_conversation(next(prompts)[1], 0, who)
    for position, prompt in prompts:
        kind = _is_conversation(prompt, position, who)
        if kind != first:
            raise ValueError(f"{who}: the prompt of row {position} is {_what(kind)}, and that of row 0 {_what(first)}; expected one kind.")
    return first


def check_evaluation(dataset: Any, strategy: str) -> None:
    """The same of what a trainer evaluates on: one data set, a dictionary of several, or none where ``strategy`` is "no"."""
    if dataset is None and strategy != "no":
        raise ValueError(f"eval_dataset is None, and eval_strategy is {strategy!r}; expected one, to evaluate on.")
    if isinstance(dataset, dict):
        for name, rows in dataset.items():
            check_rows(rows, f"eval_dataset[{name!r}]")
    elif dataset is not None:
        check_rows(dataset, "eval_dataset")


def encode_prompt(
    prompt: str | Sequence[Mapping[str, Any]], tokenizer: Any, chat_template_kwargs: Mapping[str, Any] | None = None
) -> list[int]:
    """The token ids that a completion continues.

    A text gets the tokenizer's special tokens. Chat messages get the chat template, which writes its own: adding the tokenizer's to its
    text is how a prompt comes to begin with two begin-of-sequence tokens. If the last message is the assistant's, it is continued;
    otherwise the assistant's turn is opened.
    """
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            "encode_prompt: tokenizer has no chat template, and prompt is a list of messages; expected a chat model's tokenizer. Cure: set "
            "tokenizer.chat_template, or write the prompts as plain texts."
        )
    continued = prompt[-1]["role"] == "assistant"
    ids = tokenizer.apply_chat_template(
        list(prompt),
        add_generation_prompt=not continued,
        continue_final_message=continued,
        tokenize=True,
        return_dict=False,
        **dict(chat_template_kwargs or {}),
    )
    return list(ids)


def read_rows(name: str | Path, *, split: str = "train", config: str | None = None) -> Any:
    """A ``datasets.Dataset``, by where it is.

    Args:
        name: a file (.jsonl, .json, .csv, .parquet); a folder, saved by ``save_to_disk`` or of data files; or a name on the hub.
        split: with a slice, if wanted: ``train[:100]``. Of a file only the slice counts.
        config: of a data set on the hub.

    Raises:
        ValueError: it cannot be had; the message has the reason and the cure.
    """
    datasets = _datasets(repr(str(name)))
    path = Path(name).expanduser()
    if path.is_file() and path.suffix not in _LOADERS:
        raise ValueError(f"data set {str(name)!r}: files that end in {path.suffix!r} are not read; expected {', '.join(_LOADERS)}.")
    if not path.exists() and (isinstance(name, Path) or path.suffix in _LOADERS or str(name).startswith((".", "/", "~"))):
        raise ValueError(f"data set {str(name)!r}: there is no such file or folder.")
    try:
        if path.is_file():
            whole = "train" + (f"[{split.partition('[')[2]}" if "[" in split else "")
            return datasets.load_dataset(_LOADERS[path.suffix], data_files=str(path), split=whole)
        if not any((path / file).is_file() for file in ("state.json", "dataset_dict.json")):
            return datasets.load_dataset(str(name), config, split=split)
        found = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever the readers raise: a typing error, a broken file, no network
        reason = " ".join(str(error).split())[:400].rstrip(".")
        raise ValueError(
            f"data set {str(name)!r} (split {split!r}, config {config!r}) cannot be loaded: {type(error).__name__}: {reason}. "
            "Expected a name on the hub, a folder, or a file."
        ) from error
    return _split_of(found, split)


def _rows(data: Any, split: str) -> Any:
    """A list of dictionaries, or a datasets.Dataset."""
    if isinstance(data, (list, tuple)):
        return list(data)
    data = _split_of(read_rows(data, split=split) if isinstance(data, (str, Path)) else data, split)
    if not all(hasattr(data, name) for name in ("column_names", "select", "rename_columns", "__len__")):
        raise TypeError(
            f"load_prompts: data is a {type(data).__name__}; expected a datasets.Dataset, a list of dictionaries, or where to find one. "
            "Cure for a stream: datasets.Dataset.from_list(list(itertools.islice(stream, n)))."
        )
    return data


def _split_of(data: Any, split: str) -> Any:
    if not isinstance(data, dict):  # a datasets.DatasetDict is one
        return data
    if split not in data:
        raise ValueError(f"data has the splits {', '.join(map(str, data))}; expected {split!r} among them. Cure: split=...")
    return data[split]


def _datasets(what: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"load_prompts needs the datasets package for {what}, which is not installed. Cure: {install('train')}"
        ) from error
    return datasets


def _renamed(rows: Any, rename: dict[str, str]) -> Any:
    if not rename:
        return rows
    names = _names(rows, "load_prompts")
    for old, new in rename.items():
        if old not in names:
            raise ValueError(f"load_prompts: rename has {old!r}, which is no column; the columns are: {', '.join(names)}.")
        if new in names and new not in rename:
            raise ValueError(
                f"load_prompts: rename makes {old!r} into {new!r}, which is a column already. Cure: rename or remove that one."
            )
    if isinstance(rows, list):
        return [{rename.get(name, name): value for name, value in row.items()} for row in rows]
    return rows.rename_columns(rename)


def _names(rows: Any, who: str) -> list[str]:
    if not isinstance(rows, list):
        return list(rows.column_names)
    for position, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise TypeError(f"{who}: row {position} is a {type(row).__name__}; expected a dictionary with a 'prompt'.")
        if row.keys() != rows[0].keys():
            raise ValueError(
                f"{who}: row {position} has the columns {', '.join(row)}, and row 0 {', '.join(rows[0])}; expected the same in every row."
            )
    return list(rows[0]) if rows else []


def _column(rows: Any, name: str) -> Any:
    return (row[name] for row in rows) if isinstance(rows, list) else rows[name]


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


def _what(conversation: bool) -> str:
    return "a list of messages" if conversation else "a text"
