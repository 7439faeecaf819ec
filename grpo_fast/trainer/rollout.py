"""A rollout (completions and the data that the loss needs about them) and its micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_fast.loss.support import Support
from grpo_fast.models.batch import ForwardBatch
from grpo_fast.trainer.checkpoint_files import CheckpointError

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
        if self.support is not None:
            table |= dict(zip(_SUPPORT_COLUMNS, (self.support.token_ids.cpu(), self.support.offsets.cpu()), strict=True))
        for name in ("temperature", "advantages", "loss_mask"):
            table[name] = getattr(self, name).contiguous()
        save_file(table, path)

    @classmethod
    def load(cls, path: Path, device: torch.device, vocab_size: int | None = None) -> Rollout:
        """Read a rollout that `save` wrote, with its values per token on ``device``.

        Args:
            path: the file, of which nothing is trusted.
            device: of the training.
            vocab_size: above every token id; None = no bound.

        Raises:
            CheckpointError: the file is not a rollout.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            table = load_file(path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}). Fix: another checkpoint.") from error
        if "counts" in table:  # the name of loss_mask in earlier checkpoints
            table["loss_mask"] = table.pop("counts")
        try:
            support = _take_support(table, vocab_size)
            problem = _problem_of(table, vocab_size)
        except ValueError as error:
            problem = str(error)
        if problem is not None:
            raise CheckpointError(f"{path} is not a rollout: {problem}. Fix: another checkpoint.")
        ragged = {}
        for name in ("prompt", "completion"):
            lengths = table.pop(f"{name}_lengths").tolist()
            ragged[name] = [ids.tolist() for ids in table.pop(f"{name}_ids").split(lengths)]
        temperature, advantages, loss_mask = (table.pop(name) for name in ("temperature", "advantages", "loss_mask"))
        tokens = {name.removeprefix("tokens."): column.to(device) for name, column in table.items()}
        return cls(
            ragged["prompt"],
            ragged["completion"],
            temperature,
            advantages,
            loss_mask,
            tokens,
            None if support is None else support.to(device),
        )


_SUPPORT_COLUMNS = ("support_token_ids", "support_offsets")
_COLUMNS = {  # of a rollout's file; those of one value per token come in addition
    **{f"{name}_{part}": torch.int64 for name in ("prompt", "completion") for part in ("ids", "lengths")},
    "temperature": torch.float32,
    "advantages": torch.float32,
    "loss_mask": torch.bool,
}


def _take_support(table: dict[str, Tensor], vocab_size: int | None) -> Support | None:
    """Remove the kept sets from the columns of a rollout's file, and return them.

    Raises:
        ValueError: they are damaged.
    """
    columns = [table.pop(name) for name in _SUPPORT_COLUMNS if name in table]
    if not columns:
        return None
    if len(columns) < len(_SUPPORT_COLUMNS):
        raise ValueError(f"it has only one of {' and '.join(_SUPPORT_COLUMNS)}")
    try:
        support = Support(*columns)
    except TypeError as error:
        raise ValueError(str(error)) from error
    if len(support) != len(table.get("completion_ids", ())):
        raise ValueError(f"it has kept sets of {len(support)} tokens; expected one for each of its completions' tokens")
    if vocab_size is not None and (support.token_ids >= vocab_size).any():
        raise ValueError(f"its kept sets hold ids up to {int(support.token_ids.max())}; expected ids of the vocabulary")
    return support


def _problem_of(table: dict[str, Tensor], vocab_size: int | None) -> str | None:
    """What is wrong with the columns of a rollout's file, or None."""
    for name, dtype in _COLUMNS.items():
        if name not in table:
            return f"it has no {name}"
        if table[name].dtype != dtype or table[name].ndim != 1:
            return f"{name} is {table[name].dtype} of shape {tuple(table[name].shape)}; expected {dtype} with one dimension"
    rows = len(table["completion_lengths"])
    for name in ("prompt", "completion"):
        lengths, ids = table[f"{name}_lengths"], table[f"{name}_ids"]
        if len(lengths) != rows or (lengths < (name == "prompt")).any() or (lengths > len(ids)).any() or int(lengths.sum()) != len(ids):
            return f"{name}_lengths do not add up to the {len(ids)} {name}_ids of {rows} rows"
        if (ids < 0).any() or (vocab_size is not None and (ids >= vocab_size).any()):
            return f"{name}_ids go from {int(ids.min())} to {int(ids.max())}; expected ids of the vocabulary"
    for name, column in table.items():
        expected = len(table["completion_ids"]) if name.startswith("tokens.") else rows
        if name not in _COLUMNS and (not name.startswith("tokens.") or not column.is_floating_point()):
            return f"unknown {name!r:.100} of {column.dtype}"
        if not name.endswith(("_ids", "_lengths")) and column.shape != (expected,):
            return f"{name} has the shape {tuple(column.shape)}; expected ({expected},)"
    if not (table["temperature"] > 0).all() or not table["temperature"].isfinite().all() or not table["advantages"].isfinite().all():
        return "a temperature is not above 0, or an advantage is not finite"
    return None


class MicroBatch(NamedTuple):
    """Some rows of a rollout, and the size of the whole optimizer step over all processes, which normalises the loss."""

    rows: Rollout
    step_tokens: int  # tokens in the loss
    step_sequences: int
    on_policy: bool  # the policy is still the one that sampled
