"""The order in which the tokens are computed, and their division into chunks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from grpo_fast.head.memory import is_capturing
from grpo_fast.loss.sequences import Sequences

__all__ = ["Chunk", "ChunkPlan", "ChunkSize", "Restricted", "plan_chunks"]

GRANULE = 64  # chunk sizes are rounded up to a multiple of this, where memory allows it


class ChunkSize(NamedTuple):
    """The number of tokens per chunk, and of batch invariance the number that it is a multiple of."""

    rows: int
    tile: int | None = None


class Chunk(NamedTuple):
    """Tokens whose gradient is computed together: positions ``begin ... end`` of the plan's order. A chunk has several pieces if its logits
    do not fit into the memory of one chunk; the statistics of all pieces are then computed before the gradient of the first."""

    pieces: list[tuple[int, int]]
    sequence_span: slice | None = None  # of chunks of whole sequences: all tokens of these in the order of the batch, also those apart

    @property
    def begin(self) -> int:
        return self.pieces[0][0]

    @property
    def end(self) -> int:
        return self.pieces[-1][1]


class Restricted(NamedTuple):
    """The tokens of a call that have kept sets, bool [N]."""

    apart: Tensor  # computed at the ids of their sets only, and so in no chunk
    in_chunks: Tensor  # among the computed ones: their sets are so large that they are in the chunks too


class RestrictedCounts(NamedTuple):
    """The numbers of tokens with kept sets; 0 without sets."""

    apart_with_grad: int = 0
    apart_without_grad: int = 0
    in_chunks: int = 0


class ChunkPlan(NamedTuple):
    """The order in which tokens are computed. Tokens that can change the gradient come first; masked tokens are left out."""

    token_order: Tensor | None  # int64 [n], indices of tokens; None: all tokens in the order of the batch
    grad_chunks: list[Chunk]  # tokens that get a gradient
    nograd_chunks: list[Chunk]  # tokens for which only the statistics are computed
    restricted: RestrictedCounts = RestrictedCounts()
    valid_mask: Tensor | None = None  # bool [N], the unmasked tokens; set only if the chunks contain masked tokens too
    in_order: bool = False  # the gradients of a chunk's pieces are computed from the first to the last

    @property
    def is_single_piece(self) -> bool:
        """Whether the gradients of all tokens are computed in a single piece."""
        return len(self.grad_chunks) == 1 and len(self.grad_chunks[0].pieces) == 1 and not self.restricted.apart_with_grad

    @property
    def max_rows(self) -> int:
        """Rows of the largest piece."""
        return max((end - begin for chunk in (*self.grad_chunks, *self.nograd_chunks) for begin, end in chunk.pieces), default=0)

    @property
    def recomputed_tokens(self) -> int:
        """Tokens whose logits are computed a second time."""
        return sum(end - begin for chunk in self.grad_chunks for begin, end in chunk.pieces if not self.has_logits(chunk, end))

    def has_logits(self, chunk: Chunk, end: int) -> bool:
        """Whether the logits of the chunk's piece that ends here are still in memory when its gradient is computed: those of the last piece
        are, if the gradients begin with it."""
        return end == chunk.end and (len(chunk.pieces) == 1 or not self.in_order)

    def chunks_within(self, tokens: int) -> int:
        """Return how many of the first chunks together contain at most this number of tokens."""
        return sum(chunk.end <= tokens for chunk in self.grad_chunks)

    def tokens(self, begin: int, end: int) -> Tensor | slice:
        """Return an index of the tokens at positions ``begin ... end`` of the order."""
        return slice(begin, end) if self.token_order is None else self.token_order[begin:end]


def plan_chunks(
    computed: Tensor,  # bool [N]: the tokens whose statistics are computed
    active: Tensor,  # bool [N], a subset of them: those that get a gradient
    rows_per_chunk: int,
    sequences: Sequences | None,  # chunks begin and end with these; None: anywhere
    tile: int | None = None,  # batch invariance: all pieces but the last are multiples of it, in the order of the batch
    restricted: Restricted | None = None,
) -> ChunkPlan:
    """Decide which tokens are computed, and divide them into chunks.

    The numbers of tokens are read from the device at once, which is the only synchronisation on a GPU of a head without kept sets. While a
    CUDA graph is captured nothing may be read: all tokens are computed in the order of the batch, and the mask sets the gradient of masked
    tokens to 0.

    Args:
        restricted: the tokens with kept sets; those that are ``apart`` get a gradient if they are ``active``, and are not ``computed``.

    With a ``tile``, which rows_per_chunk must be a multiple of, the cuts between pieces do not depend on the sequences: where whole
    sequences belong together, all tokens are one chunk.
    """
    granule = tile or GRANULE
    in_order = tile is not None
    total = computed.shape[0]
    if is_capturing(computed.device):
        pieces = _pieces(0, total, rows_per_chunk, granule)
        chunks = [Chunk([piece]) for piece in pieces] if sequences is None else [Chunk(pieces, slice(0, total))]
        return ChunkPlan(None, chunks, [], valid_mask=computed, in_order=in_order)
    with_grad = active & computed
    wanted = [with_grad, computed]
    if restricted is not None:
        wanted += [restricted.apart & active, restricted.apart & ~active, restricted.in_chunks]
    counts = torch.stack([x.sum() for x in wanted])
    if sequences is not None and not in_order:
        ends = _sequence_ends(sequences, computed.device)
        counts = torch.cat([counts, ends, _count_up_to(ends, with_grad)])
    num_active, num_computed, *more = counts.tolist()
    found = RestrictedCounts(*more[: len(wanted) - 2])
    per_sequence = more[len(wanted) - 2 :]

    order = None
    if num_computed < total or 0 < num_active < total:
        key = torch.where(with_grad, 0, torch.where(computed, 1, 2)).to(torch.uint8)
        order = key.argsort(stable=True)[:num_computed]
    if sequences is None:
        chunks = _equal_chunks(0, num_active, rows_per_chunk, granule)
    elif in_order:
        chunks = [Chunk(_pieces(0, num_active, rows_per_chunk, granule), slice(0, total))] if num_active else []
    else:
        chunks = _sequence_chunks(per_sequence[: sequences.count], per_sequence[sequences.count :], rows_per_chunk)
    return ChunkPlan(order, chunks, _equal_chunks(num_active, num_computed, rows_per_chunk, granule), found, in_order=in_order)


def _sequence_ends(sequences: Sequences, device: torch.device) -> Tensor:  # int64 [S], of all their tokens in the order of the batch
    assert sequences.segment is not None
    return torch.searchsorted(sequences.segment, torch.arange(sequences.count, device=device), right=True)


def _count_up_to(ends: Tensor, tokens: Tensor) -> Tensor:  # int64 [S], bool [N] -> int64 [S]
    return torch.cat([tokens.new_zeros(1, dtype=torch.int64), tokens.cumsum(0)])[ends]


def _pieces(begin: int, end: int, rows: int, granule: int = GRANULE) -> list[tuple[int, int]]:
    """Divide a range into pieces of almost equal size, at most ``rows`` each."""
    count = -(-(end - begin) // rows)
    size = -(-(end - begin) // max(count, 1))
    size = min(rows, -(-size // granule) * granule)
    return [(first, min(first + size, end)) for first in range(begin, end, max(size, 1))]


def _equal_chunks(begin: int, end: int, rows: int, granule: int) -> list[Chunk]:
    return [Chunk([piece]) for piece in _pieces(begin, end, rows, granule)]


def _sequence_chunks(ends: list[int], counts: list[int], rows: int) -> list[Chunk]:
    """Fill each chunk with whole sequences. A sequence that is longer than a chunk becomes a separate chunk of several pieces.

    Args:
        ends: where each sequence ends in the order of the batch.
        counts: of tokens with a gradient up to there, which is where the sequence ends in the order of the plan.
    """
    chunks: list[Chunk] = []
    first = begin = end = 0  # where the chunk begins in the batch and in the plan, and where the last sequence ended in the plan
    for previous, sequence_end, count in zip([0, *ends], ends, counts, strict=False):
        length = count - end
        if count - begin > rows and end > begin:
            chunks.append(Chunk([(begin, end)], slice(first, previous)))
            first, begin = previous, end
        end = count
        if length > rows:
            chunks.append(Chunk(_pieces(begin, end, rows), slice(first, sequence_end)))
            first, begin = sequence_end, end
    if end > begin:
        chunks.append(Chunk([(begin, end)], slice(first, ends[-1])))
    return chunks
