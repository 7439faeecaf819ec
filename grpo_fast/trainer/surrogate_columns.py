"""Columns of the dataset that a custom surrogate takes: one number for each row, which all tokens of its completions share."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from grpo_fast.loss.config import LossConfig
from grpo_fast.models.batch import COLUMN
from grpo_fast.trainer.rollout import Rollout

if TYPE_CHECKING:
    from grpo_fast.trainer.completions import GeneratedCompletion

__all__ = ["add_columns", "columns_of"]


def columns_of(config: LossConfig, row: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a row that the surrogate has parameters for; none without a custom surrogate.

    Raises:
        ValueError: the row lacks a column, or its value is no finite number; names the column and the surrogate.
    """
    if config.custom is None:
        return {}
    found = {}
    for name in config.custom.columns:
        expected = f"a finite number, since the surrogate {config.custom.name} has a parameter {name}"
        if name not in row:
            columns = ", ".join(map(repr, row))
            fix = "Fix: add the column, or give the parameter a default"
            raise ValueError(f"the dataset has no column {name!r}, only {columns}; expected {expected}. {fix}.")
        value = row[name]
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise ValueError(f"column {name!r} of the dataset is {value!r:.100} in a row; expected {expected}.")
        found[name] = float(value)
    return found


def add_columns(rollout: Rollout, completions: Sequence[GeneratedCompletion], device: torch.device) -> None:
    """Add the columns of the completions' rows to the rollout, one number per token."""
    lengths = torch.tensor(rollout.lengths)
    for name in completions[0].columns if completions else ():
        of_rows = torch.tensor([each.columns[name] for each in completions], dtype=torch.float32)
        rollout.tokens[COLUMN + name] = of_rows.repeat_interleave(lengths).to(device)
