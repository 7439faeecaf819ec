"""A rollout: completions and everything that the loss needs to know about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["Rollout"]


@dataclass
class Rollout:
    """B completions with N tokens in total, and what the loss needs to know about them.

    Values per completion are on the CPU, because they decide which rows are computed. Values per token are on the training device.

    Args:
        prompt_ids: token ids of each prompt, B lists.
        completion_ids: token ids of each completion, end token included, B lists.
        temperature: float32 [B], the temperature at which each completion was drawn and is scored.
        advantages: float32 [B].
        loss_mask: bool [B]; False leaves the completion out of the loss.
        tokens: float32 [N] each, as far as they are needed: the log-probabilities ``"sampler"`` (reported by the sampler), ``"old"``
            (policy at sampling time) and ``"ref"`` (reference policy), and ``"weights"``, which multiply the surrogate.

    Example:
        >>> rollout = Rollout([[1], [1]], [[5, 6], [7]], torch.ones(2), torch.zeros(2), torch.tensor([True, True]))
        >>> rollout.select([1]).completion_ids
        [[7]]
    """

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    temperature: Tensor
    advantages: Tensor
    loss_mask: Tensor
    tokens: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.completion_ids)

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of each completion."""
        return [len(ids) for ids in self.completion_ids]

    def loss_lengths(self) -> Tensor:
        """Number of tokens of each completion in the loss, int64 [B]: 0 where ``loss_mask`` is False."""
        return torch.tensor(self.lengths) * self.loss_mask

    def num_loss_tokens(self) -> int:
        """Number of tokens in the loss."""
        return int(self.loss_lengths().sum())

    def select(self, rows: Sequence[int]) -> Rollout:
        """The given rows as a rollout of their own."""
        parts = {name: column.split(self.lengths) for name, column in self.tokens.items()}
        index = torch.tensor(rows, dtype=torch.long)
        return Rollout(
            [self.prompt_ids[row] for row in rows],
            [self.completion_ids[row] for row in rows],
            self.temperature[index],
            self.advantages[index],
            self.loss_mask[index],
            {name: torch.cat([column[row] for row in rows]) if rows else self.tokens[name][:0] for name, column in parts.items()},
        )

    def scatter_tokens(self, values: Tensor, rows: Sequence[int]) -> Tensor:
        """Expand values for the tokens of some rows to all tokens, with 0 for the tokens of the other rows.

        Args:
            values: float32 [n], one per token of ``rows``, in their order.
            rows: row indices.

        Returns:
            float32 [N].
        """
        starts = torch.tensor([0, *self.lengths]).cumsum(0).tolist()
        column = values.new_zeros(starts[-1])
        if rows:
            column[torch.cat([torch.arange(starts[row], starts[row + 1]) for row in rows]).to(values.device)] = values
        return column

    def save(self, path: Path) -> None:
        """Write the rollout as safetensors, a format that cannot hold code."""
        from safetensors.torch import save_file

        table = {f"tokens.{name}": column.cpu().contiguous() for name, column in self.tokens.items()}
        for name, ragged in (("prompt", self.prompt_ids), ("completion", self.completion_ids)):
            table[f"{name}_ids"] = torch.tensor([token for ids in ragged for token in ids], dtype=torch.long)
            table[f"{name}_lengths"] = torch.tensor([len(ids) for ids in ragged], dtype=torch.long)
        for name in ("temperature", "advantages", "loss_mask"):
            table[name] = getattr(self, name).contiguous()
        save_file(table, path)

    @classmethod
    def load(cls, path: Path, device: torch.device) -> Rollout:
        """Read a rollout that `save` wrote, with its values per token on ``device``."""
        from safetensors.torch import load_file

        table = load_file(path)
        ragged = {}
        for name in ("prompt", "completion"):
            lengths = table.pop(f"{name}_lengths").tolist()
            ragged[name] = [ids.tolist() for ids in table.pop(f"{name}_ids").split(lengths)]
        if "counts" in table:  # the name of loss_mask in earlier checkpoints
            table["loss_mask"] = table.pop("counts")
        temperature, advantages, loss_mask = (table.pop(name) for name in ("temperature", "advantages", "loss_mask"))
        tokens = {name.removeprefix("tokens."): column.to(device) for name, column in table.items()}
        return cls(ragged["prompt"], ragged["completion"], temperature, advantages, loss_mask, tokens)
