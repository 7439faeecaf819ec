"""What is sampled and trained on: a rollout and its rows, the prompts it is made of, and the seeds that make it repeatable."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grpo_fast.data.prompts import check_rows

__all__ = ["PromptSource", "Rollout", "derived_seed"]


def derived_seed(*parts: object) -> int:
    """A number that depends on all parts and on nothing else: the same on every machine, in every process and after a resumption.

    Example:
        >>> derived_seed(0, "rollout", 3) == derived_seed(0, "rollout", 3) != derived_seed(0, "rollout", 4)
        True
    """
    return random.Random("/".join(map(str, parts))).getrandbits(63)


class PromptSource:
    """The rows of a data set in the order in which rollouts take them: a function of seed and rollout, with no position to lose.

    Args:
        dataset: anything with a length and rows that are dictionaries with a ``prompt``.
        count: prompts per rollout. What is left of an epoch when it is too few for a rollout is passed over.
        shuffle: a new order each epoch.
    """

    def __init__(self, dataset: Any, count: int, *, seed: int, shuffle: bool) -> None:
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise TypeError(
                f"train_dataset is a {type(dataset).__name__} without a length; expected a Dataset or a list of dictionaries. "
                "Cure for a stream: datasets.Dataset.from_generator, or list(itertools.islice(stream, n))."
            )
        if len(dataset) < count:
            raise ValueError(
                f"train_dataset has {len(dataset)} rows; expected at least {count}, the prompts of one rollout "
                "(generation_batch_size / num_generations). Take smaller batches, or more generations per prompt."
            )
        check_rows(dataset, "train_dataset")
        self.columns = [name for name in dataset[0] if name not in ("prompt", "completion", "completion_ids")]  # what rewards may read
        self.dataset, self.count, self.seed, self.shuffle = dataset, count, seed, shuffle
        self.per_epoch = len(dataset) // count  # rollouts
        self._order: tuple[int, list[int]] = (-1, [])  # of the last epoch asked for

    def rows(self, rollout: int) -> list[dict[str, Any]]:
        """The prompts of a rollout, counted from 0 over all epochs."""
        epoch, position = divmod(rollout, self.per_epoch)
        if self._order[0] != epoch:
            order = list(range(len(self.dataset)))
            if self.shuffle:
                random.Random(derived_seed(self.seed, "epoch", epoch)).shuffle(order)
            self._order = epoch, order
        return [self.dataset[index] for index in self._order[1][position * self.count : (position + 1) * self.count]]

    def others(self, rollout: int, attempt: int, count: int) -> list[dict[str, Any]]:
        """Prompts to put in the place of those without signal."""
        rng = random.Random(derived_seed(self.seed, "others", rollout, attempt))
        return [self.dataset[rng.randrange(len(self.dataset))] for _ in range(count)]


@dataclass
class Rollout:
    """Completions and all that the loss needs to know of them: B rows, whose completions hold N tokens together.

    What there is one of per row lies on the CPU, where it decides what is computed; what there is one of per token lies on the device.

    Example:
        >>> rollout = Rollout([[1], [1]], [[5, 6], [7]], torch.ones(2), torch.zeros(2), torch.tensor([True, True]))
        >>> rollout.select([1]).completion_ids
        [[7]]
    """

    prompt_ids: list[list[int]]  # B
    completion_ids: list[list[int]]  # B, with their end tokens
    temperature: Tensor  # [B] float32: each was drawn at, and is scored at
    advantages: Tensor  # [B] float32
    counts: Tensor  # [B] bool; False: left out of the loss
    tokens: dict[str, Tensor] = field(default_factory=dict)  # float32 [N] each: "sampler", "old", "ref" log-probabilities, and "weights"

    def __len__(self) -> int:
        return len(self.completion_ids)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each completion."""
        return [len(ids) for ids in self.completion_ids]

    def lengths_that_count(self) -> Tensor:
        """[B] int64: tokens of each completion, 0 where it is left out."""
        return torch.tensor(self.lengths) * self.counts

    def tokens_that_count(self) -> int:
        return int(self.lengths_that_count().sum())

    def select(self, rows: Sequence[int]) -> Rollout:
        """Some of the rows."""
        parts = {name: column.split(self.lengths) for name, column in self.tokens.items()}
        index = torch.tensor(rows, dtype=torch.long)
        return Rollout(
            [self.prompt_ids[row] for row in rows],
            [self.completion_ids[row] for row in rows],
            self.temperature[index],
            self.advantages[index],
            self.counts[index],
            {name: torch.cat([column[row] for row in rows]) if rows else self.tokens[name][:0] for name, column in parts.items()},
        )

    def scattered(self, values: Tensor, rows: Sequence[int]) -> Tensor:  # values float32 [n], of the tokens of these rows; [N]
        """Values of some rows' tokens as a column of the rollout, 0 for the others."""
        starts = torch.tensor([0, *self.lengths]).cumsum(0).tolist()
        column = values.new_zeros(starts[-1])
        if rows:
            column[torch.cat([torch.arange(starts[row], starts[row + 1]) for row in rows]).to(values.device)] = values
        return column

    def save(self, path: Path) -> None:
        """As safetensors, which hold numbers and no code."""
        from safetensors.torch import save_file

        table = {f"tokens.{name}": column.cpu().contiguous() for name, column in self.tokens.items()}
        for name, ragged in (("prompt", self.prompt_ids), ("completion", self.completion_ids)):
            table[f"{name}_ids"] = torch.tensor([token for ids in ragged for token in ids], dtype=torch.long)
            table[f"{name}_lengths"] = torch.tensor([len(ids) for ids in ragged], dtype=torch.long)
        for name in ("temperature", "advantages", "counts"):
            table[name] = getattr(self, name).contiguous()
        save_file(table, path)

    @classmethod
    def load(cls, path: Path, device: torch.device) -> Rollout:
        """What `save` wrote."""
        from safetensors.torch import load_file

        table = load_file(path)
        ragged = {}
        for name in ("prompt", "completion"):
            lengths = table.pop(f"{name}_lengths").tolist()
            ragged[name] = [ids.tolist() for ids in table.pop(f"{name}_ids").split(lengths)]
        temperature, advantages, counts = (table.pop(name) for name in ("temperature", "advantages", "counts"))
        tokens = {name.removeprefix("tokens."): column.to(device) for name, column in table.items()}
        return cls(ragged["prompt"], ragged["completion"], temperature, advantages, counts, tokens)
