"""The types of a head's products and logits, and the memory that a row of logits takes."""

from __future__ import annotations

from typing import NamedTuple

import torch

from grpo_fast.head.memory import chunk_rows
from grpo_fast.ops import huge_pages
from grpo_fast.ops.product import SUM_BLOCK

__all__ = ["LOGITS_DTYPES", "Precision"]

LOGITS_DTYPES = ("float32", "input")
# Tokens per product with batch invariance outside of the CPU: as few as a GPU multiplies at almost its full speed.
GPU_TILE = 1024
_ROW_ALIGNMENT = 16  # bytes: what the vendors' fast products of 16-bit operands ask of the distance between two rows


class Precision(NamedTuple):
    """How the products of a head are computed."""

    dtype: torch.dtype  # of the operands
    logits_dtype: torch.dtype  # float32, or the operands' dtype
    batch_invariant: bool = False

    @classmethod
    def of(cls, dtype: torch.dtype, logits_dtype: str, batch_invariant: bool) -> Precision:
        return cls(dtype, torch.float32 if logits_dtype == "float32" and dtype != torch.float64 else dtype, batch_invariant)

    @property
    def widened(self) -> bool:
        """Whether the logits have more bits than the operands."""
        return self.logits_dtype != self.dtype

    def columns(self, vocabulary: int, device: torch.device) -> int:
        """Return the number of elements between two rows of logits. On a CPU rows are not padded: its products need no alignment, and
        PyTorch's multiply what stands in the padding of bfloat16 by 0, which of NaN is NaN."""
        if self.dtype.itemsize != 2 or device.type == "cpu":
            return vocabulary
        unit = _ROW_ALIGNMENT // self.logits_dtype.itemsize
        return -(-vocabulary // unit) * unit

    def row_bytes(self, vocabulary: int, device: torch.device) -> int:
        """Return the memory for the logits of one token."""
        return self.columns(vocabulary, device) * self.logits_dtype.itemsize

    def tile(self, device: torch.device) -> int | None:
        """Return the number that the tokens of a chunk are a multiple of, with batch invariance; None without it."""
        if not self.batch_invariant:
            return None
        return SUM_BLOCK if device.type == "cpu" else GPU_TILE

    def rows_per_chunk(self, chunk_bytes: int | None, vocabulary: int, device: torch.device) -> int:
        """Return the number of tokens per chunk, with batch invariance a multiple of the tile, and at least one."""
        rows, tile = chunk_rows(chunk_bytes, self.row_bytes(vocabulary, device), device), self.tile(device)
        return rows if tile is None else max(1, rows // tile) * tile

    def new_logits(self, rows: int, vocabulary: int, device: torch.device) -> torch.Tensor:
        """Allocate memory for logits, [rows, V]."""
        return huge_pages.empty((rows, self.columns(vocabulary, device)), self.logits_dtype, device)[:, :vocabulary]
