"""The prompts of each rollout: a function of the seed and of the rollout's number, so that there is no position to save."""

from __future__ import annotations

import random
from typing import Any, Protocol

from grpo_fast.data.row_checks import check_kind, check_rows
from grpo_fast.utils.seeds import derived_seed

__all__ = ["PromptSource", "RowDataset", "readable_columns"]

Row = dict[str, Any]  # a row of a dataset: "prompt" and the columns that rewards read


class RowDataset(Protocol):
    """Anything with a length and rows by index: a ``datasets.Dataset`` or a list of dictionaries."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Row: ...


class PromptSource:
    """The rows of a dataset, in the order in which rollouts use them.

    Args:
        dataset: anything with a length and rows that are dictionaries with a ``prompt``.
        count: prompts per rollout. Each epoch leaves out its last rows if they are fewer than that.
        seed: of the order of the rows.
        shuffle: use a new order in each epoch.

    Raises:
        TypeError: the dataset has no length (`PromptStream` takes such data), or is no dataset.
        ValueError: it has fewer rows than a rollout needs, or rows without a valid prompt.
    """

    def __init__(self, dataset: RowDataset, count: int, *, seed: int, shuffle: bool) -> None:
        check_kind(dataset, "train_dataset")
        if len(dataset) < count:
            raise ValueError(
                f"train_dataset has {len(dataset)} rows; expected at least {count}, the prompts of one rollout "
                "(generation_batch_size / num_generations). Fix: smaller batches, or more generations per prompt."
            )
        check_rows(dataset, "train_dataset")
        self.columns = readable_columns(dataset[0])
        self.dataset, self.count, self.seed, self.shuffle = dataset, count, seed, shuffle
        self.rollouts_per_epoch = len(dataset) // count
        self._order: tuple[int, list[int]] = (-1, [])  # (epoch, row indices) of the last epoch that was requested

    def rows(self, rollout: int) -> list[Row]:
        """The rows of a rollout, given by its number, which counts from 0 over all epochs."""
        epoch, position = divmod(rollout, self.rollouts_per_epoch)
        if self._order[0] != epoch:
            order = list(range(len(self.dataset)))
            if self.shuffle:
                random.Random(derived_seed(self.seed, "epoch", epoch)).shuffle(order)
            self._order = epoch, order
        return [self.dataset[index] for index in self._order[1][position * self.count : (position + 1) * self.count]]

    def replacements(self, rollout: int, attempt: int, count: int) -> list[Row]:
        """Random rows that replace prompts whose completions all have the same reward (dynamic sampling)."""
        rng = random.Random(derived_seed(self.seed, "others", rollout, attempt))
        return [self.dataset[rng.randrange(len(self.dataset))] for _ in range(count)]


def readable_columns(row: Row) -> list[str]:
    """The columns that rewards may read."""
    return [name for name in row if name not in ("prompt", "completion", "completion_ids")]
