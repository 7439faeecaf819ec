"""Datasets of prompts: read, checked before training, encoded, and without the prompts that are too long."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from grpo_fast.data.row_checks import Prompt, Row, Rows, check_rows, column_of, names_of
from grpo_fast.data.streams import check_evaluation
from grpo_fast.data.tasks.common import TaskRows
from grpo_fast.utils.install_hints import install

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

__all__ = ["Prompts", "check_evaluation", "check_rows", "encode_prompt", "load_prompts", "read_rows"]

_LOADERS = {".json": "json", ".jsonl": "json", ".ndjson": "json", ".csv": "csv", ".parquet": "parquet"}
logger = logging.getLogger("grpo_fast")


@dataclass(frozen=True)
class Prompts:
    """What `load_prompts` returns. ``rows`` is the dataset for a trainer."""

    rows: Any  # like the input a datasets.Dataset or a list of dictionaries; with ``prompt`` and the columns that the rewards read
    conversational: bool  # prompts are lists of chat messages
    total: int  # rows before those with too long prompts were dropped
    dropped: int  # rows whose prompt was too long
    longest: int  # tokens of the longest prompt in ``rows``

    def __str__(self) -> str:
        kind = "conversations" if self.conversational else "texts"
        return (
            f"{len(self.rows)} prompts ({kind}), of up to {self.longest} tokens; {self.dropped} of {self.total} were too long and left out"
        )


def load_prompts(
    data: datasets.Dataset | datasets.DatasetDict | Sequence[Row] | str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_length: int | None = None,
    rename: Mapping[str, str] | None = None,
    split: str = "train",
    limit: int | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    as_chat: bool = False,
) -> Prompts:
    """Load the prompts of a dataset for a trainer.

    Every row is checked and its prompt encoded before training begins. Prompts longer than ``max_prompt_length`` are dropped, never
    truncated, because a truncated question is another question. Other columns are unchanged.

    Args:
        data: a ``datasets.Dataset``; a list of dictionaries; or a file, folder or name on the hub for `read_rows`. All but lists need the
            datasets package.
        tokenizer: of the model; with a chat template if prompts are lists of messages.
        max_prompt_length: maximum number of tokens, including those of the chat template; None = no limit.
        rename: columns to rename, old name to new: ``{"question": "prompt", "solution": "answer"}``. The built-in rewards read ``answer``.
        split: of a name, a file, or a dataset with splits.
        limit: maximum number of rows, taken from the beginning.
        chat_template_kwargs: keyword arguments of ``apply_chat_template``, for example ``{"enable_thinking": False}``.
        as_chat: count the tokens of a text as those of a chat; see `encode_prompt`.

    Raises:
        ValueError, TypeError: names the row or column, what it was, what was expected and the fix.

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
    for position, prompt in enumerate(column_of(rows, "prompt")):
        ids = encode_prompt(prompt, tokenizer, chat_template_kwargs, as_chat=as_chat)
        if not ids:
            raise ValueError(f"load_prompts: the prompt of row {position} has no tokens; expected a question. Fix: leave the row out.")
        lengths.append(len(ids))
    kept = [i for i, length in enumerate(lengths) if max_prompt_length is None or length <= max_prompt_length]
    if not kept:
        raise ValueError(
            f"load_prompts: max_prompt_length is {max_prompt_length}, and every one of the {len(lengths)} prompts is longer; expected at "
            f"least {min(lengths)}, the tokens of the shortest (the longest has {max(lengths)})."
        )
    dropped = len(lengths) - len(kept)
    if dropped:
        rows = type(rows)(rows[i] for i in kept) if isinstance(rows, list) else rows.select(kept)
        logger.warning("%d of %d prompts are longer than %d tokens and left out.", dropped, len(lengths), max_prompt_length)
    return Prompts(rows, conversational, len(lengths), dropped, max(lengths[i] for i in kept))


def encode_prompt(
    prompt: Prompt, tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: Mapping[str, Any] | None = None, *, as_chat: bool = False
) -> list[int]:
    """The token ids of a prompt, which a completion continues.

    A text gets the tokenizer's special tokens. Chat messages get those of the chat template only; otherwise a prompt could begin with two
    begin-of-sequence tokens. If the last message is the assistant's, it is continued; otherwise the assistant's turn is opened. With
    ``as_chat`` a text is a chat of one message of the user.

    Raises:
        ValueError: the prompt is a list of messages, or to be one, and the tokenizer has no chat template.
    """
    if isinstance(prompt, str) and as_chat:
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            "encode_prompt: tokenizer has no chat template, and prompt is a list of messages; expected a chat model's tokenizer. Fix: set "
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


def read_rows(name: str | Path, *, split: str = "train", config: str | None = None) -> datasets.Dataset:
    """Read a ``datasets.Dataset`` from a file, a folder or the hub.

    Args:
        name: a file (.jsonl, .json, .csv, .parquet); a folder, saved by ``save_to_disk`` or of data files; or a name on the hub.
        split: name of the split, optionally with a slice: ``train[:100]``. For a file, only the slice has an effect.
        config: configuration of a dataset on the hub.

    Raises:
        ValueError: it cannot be loaded; the message has the reason.
        ImportError: the datasets package is not installed.
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
    except Exception as error:  # each reader raises its own types for a wrong name, a broken file, or no network
        reason = " ".join(str(error).split())[:400].rstrip(".")
        raise ValueError(
            f"data set {str(name)!r} (split {split!r}, config {config!r}) cannot be loaded: {type(error).__name__}: {reason}. "
            "Expected a name on the hub, a folder, or a file."
        ) from error
    return _split_of(found, split)


def _rows(data: Any, split: str) -> Rows:
    if isinstance(data, (list, tuple)):
        return data[:] if isinstance(data, TaskRows) else list(data)
    data = _split_of(read_rows(data, split=split) if isinstance(data, (str, Path)) else data, split)
    if not all(hasattr(data, name) for name in ("column_names", "select", "rename_columns", "__len__")):
        raise TypeError(
            f"load_prompts: data is a {type(data).__name__}; expected a datasets.Dataset, a list of dictionaries, or where to find one. "
            "Fix for a stream: datasets.Dataset.from_list(list(itertools.islice(stream, n)))."
        )
    return data


def _split_of(data: Any, split: str) -> Any:
    if not isinstance(data, dict):  # a datasets.DatasetDict is one
        return data
    if split not in data:
        raise ValueError(f"data has the splits {', '.join(map(str, data))}; expected {split!r} among them. Fix: split=...")
    return data[split]


def _datasets(what: str) -> ModuleType:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"load_prompts needs the datasets package for {what}, which is not installed. Fix: {install('train')}") from error
    return datasets


def _renamed(rows: Rows, rename: dict[str, str]) -> Rows:
    if not rename:
        return rows
    names = names_of(rows, "load_prompts")
    for old, new in rename.items():
        if old not in names:
            raise ValueError(f"load_prompts: rename has {old!r}, which is no column; the columns are: {', '.join(names)}.")
        if new in names and new not in rename:
            raise ValueError(f"load_prompts: rename makes {old!r} into {new!r}, which is a column already. Fix: rename or remove that one.")
    if isinstance(rows, list):
        return [{rename.get(name, name): value for name, value in row.items()} for row in rows]
    return rows.rename_columns(rename)
