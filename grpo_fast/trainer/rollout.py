"""A rollout (completions and the data that the loss needs about them) and its micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_fast.models.batch import ForwardBatch

__all__ = ["MicroBatch", "Rollout"]


@dataclass
class Rollout(ForwardBatch):
    """B completions with N tokens in total, and the data that the loss needs about them.

    Values per completion are on the CPU, because they decide which rows are computed. Values per token are on the training device.

    The fields are those of `ForwardBatch`.
    """

    def loss_lengths(self) -> Tensor:
        """Number of tokens of each completion in the loss, int64 [B]: 0 where ``loss_mask`` is False."""
        return torch.tensor(self.lengths) * self.loss_mask

    def num_loss_tokens(self) -> int:
        """Number of tokens in the loss."""
        return int(self.loss_lengths().sum())

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


class MicroBatch(NamedTuple):
    """Some rows of a rollout, and the size of the whole optimizer step over all processes, which normalises the loss."""

    rows: Rollout
    step_tokens: int  # tokens in the loss
    step_sequences: int
    on_policy: bool  # the policy is still the one that sampled
