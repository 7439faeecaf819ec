"""The sequences to be scored: the input of the forward passes, and the base class of a rollout of the trainer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from grpo_fast.loss.support import Support

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["COLUMN", "ForwardBatch", "ModelInputs"]

COLUMN = "column."  # before the name of a column of the dataset in ``ForwardBatch.tokens``
ModelInputs = Mapping[str, Any]  # the keyword arguments of a model's forward, which differ from model to model


@dataclass
class ForwardBatch:
    """B prompts with their completions, which have N tokens in total, and the data that the loss needs about them.

    Values per sequence are on the CPU, because they decide what is computed. Values per token are on the device of the model.

    Args:
        prompt_ids: token ids of each prompt, B lists.
        completion_ids: token ids of each completion, end token included, B lists.
        temperature: float32 [B], the temperature at which each completion was drawn and is scored.
        advantages: float32 [B].
        loss_mask: bool [B]; False excludes the completion from the loss.
        tokens: float32 [N] each, those that are needed: the log-probabilities ``"sampler"`` (reported by the sampler), ``"old"``
            (policy at sampling time) and ``"ref"`` (reference policy), and ``"weights"``, which multiply the surrogate; and, under
            ``"column."`` and its name, each column of the dataset that a custom surrogate takes.
        support: the kept sets of the N tokens, on the device of the model, if they were drawn with truncation (top-k, top-p, min-p); then
            they are scored over these sets. None = over the whole vocabulary.

    Example:
        >>> batch = ForwardBatch([[1], [1]], [[5, 6], [7]], torch.ones(2), torch.zeros(2), torch.tensor([True, True]))
        >>> batch.select([1]).completion_ids
        [[7]]
    """

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    temperature: Tensor
    advantages: Tensor
    loss_mask: Tensor
    tokens: dict[str, Tensor] = field(default_factory=dict)
    support: Support | None = None

    def __len__(self) -> int:
        return len(self.completion_ids)

    @property
    def surrogate_inputs(self) -> dict[str, Tensor] | None:
        """The columns of the dataset that a custom surrogate takes, [N] each; None if there are none."""
        return {name.removeprefix(COLUMN): x for name, x in self.tokens.items() if name.startswith(COLUMN)} or None

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of each completion."""
        return [len(ids) for ids in self.completion_ids]

    def select(self, rows: Sequence[int]) -> Self:
        """Return the sequences with these indices, in this order."""
        parts = {name: column.split(self.lengths) for name, column in self.tokens.items()}
        index = torch.tensor(rows, dtype=torch.long)
        support = None
        if self.support is not None:
            positions = torch.arange(len(self.support)).split(self.lengths)
            chosen = torch.cat([positions[row] for row in rows]) if rows else index
            support = self.support.take(chosen.to(self.support.offsets.device))
        return dataclasses.replace(
            self,
            prompt_ids=[self.prompt_ids[row] for row in rows],
            completion_ids=[self.completion_ids[row] for row in rows],
            temperature=self.temperature[index],
            advantages=self.advantages[index],
            loss_mask=self.loss_mask[index],
            support=support,
            tokens={name: torch.cat([column[row] for row in rows]) if rows else self.tokens[name][:0] for name, column in parts.items()},
        )
