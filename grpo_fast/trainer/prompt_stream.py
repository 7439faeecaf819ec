"""The prompts of each rollout, read from a stream: like `PromptSource` a function of the seed and the rollout's number."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, cast

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from grpo_fast.data.streams import RowStream, Stream, is_stream, read_all
from grpo_fast.trainer.config_checks import bad_setting
from grpo_fast.trainer.prompt_source import PromptSource, Row, RowDataset, readable_columns
from grpo_fast.utils.seeds import derived_seed

if TYPE_CHECKING:
    from grpo_fast.trainer.config import GRPOConfig

__all__ = ["PromptStream", "evaluation_rows", "make_prompts"]


def make_prompts(dataset: RowDataset | Stream, args: GRPOConfig) -> PromptSource | PromptStream:
    """The prompts of a trainer's rollouts, from a dataset or a stream.

    Raises:
        ValueError, TypeError: the data is not valid, or the settings need to know the length of a stream.
    """
    if not is_stream(dataset):
        return PromptSource(cast(RowDataset, dataset), args.prompts_per_rollout, seed=args.prompt_seed, shuffle=args.shuffle_dataset)
    kind = f"train_dataset is a {type(dataset).__name__} without a length"
    if args.max_steps <= 0:
        raise bad_setting(
            "max_steps", args.max_steps, f"a number of optimizer steps above 0: {kind}, so that epochs cannot be counted ahead"
        )
    for name in ("eval_strategy", "save_strategy", "logging_strategy"):
        if getattr(args, name) == "epoch":
            raise bad_setting(name, "epoch", f"'steps' or 'no': {kind}, and the end of an epoch is not known")
    seed, shuffle, buffer_size = args.prompt_seed, args.shuffle_dataset, args.shuffle_buffer_size
    return PromptStream(dataset, args.prompts_per_rollout, seed=seed, shuffle=shuffle, buffer_size=buffer_size)


def evaluation_rows(dataset: RowDataset | Stream) -> RowDataset:
    """The rows of an evaluation dataset: a stream is read to its end, by the main process. Every process must call it.

    Raises:
        ValueError, TypeError: a row of the stream is not valid, or it has too many.
    """
    if not is_stream(dataset):
        return cast(RowDataset, dataset)
    stream: Stream = dataset
    return _from_main_process(lambda: read_all(stream, "eval_dataset"))


class PromptStream:
    """The rows of a stream, in the order in which rollouts use them.

    The main process reads the stream in blocks, shuffles each block, and sends the rows of a rollout to the others, so that all have the
    same. A run that is resumed skips the rows before its position. At the end of the stream another pass begins; as with
    `PromptSource`, the rows at the end of a pass that do not fill a rollout are left out.

    Args:
        dataset: see `RowStream`. Each pass must have as many rows as the first.
        count: prompts per rollout.
        seed: of the order of the rows in a block.
        shuffle: shuffle the blocks; else the order is that of the stream.
        buffer_size: rows of a block. It is rounded down to a multiple of ``count``, and at least ``count``.

    Raises:
        ValueError, TypeError: see `RowStream`.
    """

    rollouts_per_epoch: int | None = None  # not known before the end of the first pass

    def __init__(self, dataset: Stream, count: int, *, seed: int, shuffle: bool, buffer_size: int) -> None:
        self._stream = RowStream(dataset, "train_dataset")
        self.dataset = [self._stream.first]  # what can be looked at before training
        self.columns = readable_columns(self._stream.first)
        self.count, self.seed, self.shuffle = count, seed, shuffle
        self._per_block = max(1, buffer_size // count)  # rollouts
        self._rows: Iterator[Row] = iter(())
        self._place = (-1, -1)  # (epoch, block) of _block
        self._block: list[Row] = []

    def rows(self, rollout: int) -> list[Row]:
        """The rows of a rollout, given by its number, which counts from 0 over all epochs. Every process must call it.

        Raises:
            ValueError, TypeError: the stream has too few rows, or one that is not valid, or cannot be read again.
        """
        return _from_main_process(lambda: self._read(rollout))

    def replacements(self, rollout: int, attempt: int, count: int) -> list[Row]:
        """Random rows of the current block, which replace prompts whose completions all have the same reward (dynamic sampling)."""
        rng = random.Random(derived_seed(self.seed, "others", rollout, attempt))
        return _from_main_process(lambda: [self._block[rng.randrange(len(self._block))] for _ in range(count)])

    def epoch(self, rollouts: int) -> float:
        """Passes over the stream that a number of rollouts has used: 0 in the first one, whose length is not known before its end."""
        return rollouts / self.rollouts_per_epoch if self.rollouts_per_epoch else 0.0

    def _read(self, rollout: int) -> list[Row]:
        epoch, number = self._split(rollout)
        block, position = divmod(number, self._per_block)
        self._load(epoch, block)
        rows = self._block[position * self.count : (position + 1) * self.count]
        if len(rows) == self.count:
            return rows
        if self.rollouts_per_epoch is not None:
            raise ValueError(
                f"train_dataset has fewer rows in its pass {epoch + 1} than in the first, in which it had at least "
                f"{self.rollouts_per_epoch * self.count}; expected the same in each pass. Fix: a stream without an end, or a fixed one."
            )
        total = block * self._per_block * self.count + len(self._block) if self._block else self._count_rows()
        if total < self.count:
            raise ValueError(
                f"train_dataset is a stream of {total} rows; expected at least {self.count}, the prompts of one rollout "
                "(generation_batch_size / num_generations). Fix: smaller batches, or more generations per prompt."
            )
        self.rollouts_per_epoch = total // self.count
        return self._read(rollout)

    def _split(self, rollout: int) -> tuple[int, int]:
        """The epoch of a rollout, and its number in this epoch."""
        return (0, rollout) if self.rollouts_per_epoch is None else divmod(rollout, self.rollouts_per_epoch)

    def _load(self, epoch: int, block: int) -> None:
        """Read and shuffle a block, unless it is the current one."""
        if self._place == (epoch, block):
            return
        size = self._per_block * self.count
        if self._place != (epoch, block - 1):
            self._rows = self._stream.open(epoch, skip=block * size)
        rows = list(islice(self._rows, size))
        if rows:
            self._stream.check(rows, block * size)
        if self.shuffle:
            random.Random(derived_seed(self.seed, "block", epoch, block)).shuffle(rows)
        self._place, self._block = (epoch, block), rows

    def _count_rows(self) -> int:
        """The rows of a pass, for a run that is resumed in a later one."""
        self._place = (-1, -1)
        return sum(1 for _ in self._stream.open())


def _from_main_process(read: Callable[[], list[Row]]) -> list[Row]:
    """What the main process reads, in every process."""
    state = PartialState()
    if state.num_processes == 1:
        return read()
    error: Exception | None = None
    sent: list[list[Row] | str | None] = [None]
    if state.is_main_process:
        try:
            sent = [read()]
        except Exception as caught:  # the other processes would wait for this one forever
            error, sent = caught, [f"{type(caught).__name__}: {caught}"]
    broadcast_object_list(sent)
    if error is not None:
        raise error
    if not isinstance(sent[0], list):
        raise ValueError(f"the main process could not read the rows: {sent[0]}")
    return sent[0]
