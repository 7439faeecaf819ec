"""Streams of rows: data that is read from the beginning to the end, without a length and without rows by number."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import Any, TypeAlias, TypeGuard

from grpo_fast.data.row_checks import Row, check_rows

__all__ = ["MAX_EVALUATION_ROWS", "RowStream", "Stream", "check_evaluation", "is_stream", "read_all"]

Stream: TypeAlias = "Iterable[Row] | Callable[[], Iterable[Row]]"

MAX_EVALUATION_ROWS = 100_000  # an evaluation of a stream without an end would never end


def is_stream(data: object) -> TypeGuard[Stream]:
    """Whether data is read as a stream: an iterable without rows by number, or a function that returns one.

    Example:
        >>> is_stream(iter([{"prompt": "2 + 2?"}])), is_stream([{"prompt": "2 + 2?"}])
        (True, False)
    """
    if isinstance(data, (str, bytes, Mapping)) or hasattr(data, "iloc"):
        return False
    if any(
        each.__name__ == "IterableDataset" for each in type(data).__mro__
    ):  # torch's has __getitem__, which raises, and may have __len__
        return True
    if callable(data):
        return not isinstance(data, type) and not hasattr(data, "__len__")
    return hasattr(data, "__iter__") and not (hasattr(data, "__len__") and hasattr(data, "__getitem__"))


class RowStream:
    """Reads a stream, once or several times.

    Args:
        data: an iterable of rows, or a function without arguments that returns one: ``datasets.IterableDataset``, a generator function, a
            generator. A generator (any iterator) can be read once.
        who: the argument's name; messages begin with it.

    Raises:
        TypeError: it is no stream.
        ValueError: it has no rows, or its first row is not valid.

    Example:
        >>> stream = RowStream(lambda: ({"prompt": f"{n} + {n}?"} for n in range(4)), "train_dataset")
        >>> [row["prompt"] for row in stream.open(skip=2)]
        ['2 + 2?', '3 + 3?']
    """

    def __init__(self, data: Stream, who: str) -> None:
        if not is_stream(data):
            raise TypeError(f"{who} is a {type(data).__name__}; expected an iterable, or a function that returns one.")
        self.data, self.who = data, who
        self.once = not callable(data) and hasattr(data, "__next__")
        self._used = False
        self._rest: Iterator[Row] | None = None  # of an iterator, with the first row in front
        iterator = self._iterate(0)
        first = list(islice(iterator, 1))
        if not first:
            why = (
                "it has been read to its end before, or never had one. Fix: pass the function that makes it" if self.once else "it is empty"
            )
            raise ValueError(f"{who} is a {type(data).__name__} without a row; expected at least one: {why}.")
        check_rows(first, who)
        self.first: Row = first[0]
        if self.once:
            self._rest = chain(first, iterator)

    def open(self, epoch: int = 0, *, skip: int = 0) -> Iterator[Row]:
        """The rows of a pass over the stream, from the beginning or after ``skip`` rows.

        Args:
            epoch: number of the pass; ``set_epoch`` of a ``datasets.IterableDataset`` is called with it.
            skip: rows to leave out. ``skip`` of a ``datasets.IterableDataset`` is used, which may not need to read them.

        Raises:
            ValueError: an iterator has been read before.
        """
        if self._rest is not None:
            if self._used:
                raise ValueError(
                    f"{self.who} is a {type(self.data).__name__}, which can be read once, and a second time is needed; expected what can "
                    "be read again. Fix: pass the function that makes it, not what it returns, or more data."
                )
            self._used = True
            return islice(self._rest, skip, None)
        return self._iterate(epoch, skip)

    def check(self, rows: list[Row], position: int) -> None:
        """Check rows as they are read.

        Args:
            rows: rows of the stream.
            position: number of the first of them in the pass.

        Raises:
            ValueError, TypeError: names the row, what it was, what was expected and the fix; see `check_rows`.
        """
        check_rows([self.first, *rows], self.who, start=position - 1)

    def _iterate(self, epoch: int, skip: int = 0) -> Iterator[Row]:
        data: Any = self.data
        if callable(data) and not hasattr(data, "__iter__"):
            data = data()
            if not hasattr(data, "__iter__"):
                raise TypeError(f"{self.who} is a function that returned a {type(data).__name__}; expected an iterable of rows.")
        if hasattr(data, "set_epoch"):
            data.set_epoch(epoch)
        if skip and callable(getattr(data, "skip", None)):
            return iter(data.skip(skip))
        return islice(iter(data), skip, None)


def read_all(data: Stream, who: str) -> list[Row]:
    """All rows of a stream that has an end, checked.

    Raises:
        ValueError, TypeError: a row is not valid; there are none; or there are more than `MAX_EVALUATION_ROWS`.
    """
    stream = RowStream(data, who)
    rows = list(islice(stream.open(), MAX_EVALUATION_ROWS + 1))
    if len(rows) > MAX_EVALUATION_ROWS:
        raise ValueError(f"{who} is a stream of more than {MAX_EVALUATION_ROWS} rows; expected fewer. Fix: .take(n), or islice(stream, n).")
    stream.check(rows, 0)
    return rows


def check_evaluation(dataset: Any, strategy: str) -> dict[str, list[str]]:
    """Check a trainer's evaluation data with `check_rows`, and the first row of a stream.

    Args:
        dataset: one dataset or stream, a dictionary of several, or None.
        strategy: ``eval_strategy``; None is an error unless it is "no".

    Returns:
        the columns of each dataset, by the argument's name.

    Raises:
        ValueError, TypeError: see `check_rows`; or a stream can be read only once.
    """
    if dataset is None:
        if strategy != "no":
            raise ValueError(f"eval_dataset is None, and eval_strategy is {strategy!r}; expected one, to evaluate on.")
        return {}
    parts = {f"eval_dataset[{name!r}]": part for name, part in dataset.items()} if isinstance(dataset, dict) else {"eval_dataset": dataset}
    columns = {}
    for who, part in parts.items():
        if is_stream(part) and not hasattr(part, "__next__"):
            columns[who] = list(RowStream(part, who).first)
        else:
            check_rows(part, who)
            columns[who] = list(part[0])
    return columns
