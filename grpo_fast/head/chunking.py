"""Which tokens are computed, in what order and how many at a time."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_fast.loss.sequences import Sequences

__all__ = ["Chunk", "Plan", "chunk_rows", "free_bytes", "plan_of"]

ROWS = {"cpu": 512, "otherwise": 8192}  # tokens per chunk where memory allows: above it, the products gain nothing
FREE_SHARE = 4  # a chunk takes at most this part of the memory that is free
GRANULE = 64  # chunk sizes are multiples of it where they can be


class Chunk(NamedTuple):
    """Tokens whose gradient is made together: positions ``begin ... end`` of the plan's order. More than one piece: they do not fit into
    the memory of a chunk together, and all are looked at before the gradient of any is known."""

    pieces: list[tuple[int, int]]

    @property
    def begin(self) -> int:
        return self.pieces[0][0]

    @property
    def end(self) -> int:
        return self.pieces[-1][1]


class Plan(NamedTuple):
    """The order in which tokens are computed. Those that can change the gradient come first; the masked are not in it."""

    order: Tensor | None  # int64 [n], tokens; None: all of them as they stand
    chunks: list[Chunk]  # with their gradient
    rest: list[Chunk]  # statistics alone
    only: Tensor | None = None  # bool [N]: of tokens that had to be put into the chunks, those that count

    @property
    def one_piece(self) -> bool:
        """Whether every gradient is made at once."""
        return len(self.chunks) == 1 and len(self.chunks[0].pieces) == 1

    @property
    def largest(self) -> int:
        """Rows of the largest piece."""
        return max((end - begin for chunk in (*self.chunks, *self.rest) for begin, end in chunk.pieces), default=0)

    @property
    def recomputed(self) -> int:
        """Tokens whose logits are computed a second time. The last piece of a sequence is still there when the first pass ends."""
        return sum(end - begin for chunk in self.chunks for begin, end in chunk.pieces[:-1])

    def kept_chunks(self, tokens: int) -> int:
        """How many of the first chunks have no more than so many tokens together."""
        return sum(chunk.end <= tokens for chunk in self.chunks)

    def tokens(self, begin: int, end: int) -> Tensor | slice:
        """An index of the tokens at ``begin ... end`` of the order."""
        return slice(begin, end) if self.order is None else self.order[begin:end]


def chunk_rows(chunk_bytes: int | None, row_bytes: int, device: torch.device) -> int:
    """Tokens per chunk: what fits into ``chunk_bytes``, at least one. None: 512 on a CPU and 8192 elsewhere, or fewer, so that a chunk
    takes at most a quarter of the free memory."""
    if chunk_bytes is not None:
        return max(1, chunk_bytes // row_bytes)
    wanted = ROWS.get(device.type, ROWS["otherwise"])
    if capturing(device):
        return wanted
    return max(1, min(wanted, free_bytes(device) // (FREE_SHARE * row_bytes)))


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is captured, so that nothing may be read from the device."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def free_bytes(device: torch.device) -> int:
    """Memory that could be allocated on the device now."""
    if device.type == "cpu":
        return min(_free_of_machine(), _free_of_container(Path("/sys/fs/cgroup")))
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return 16 << 30


def _free_of_machine() -> int:
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _free_of_container(folder: Path) -> int:
    """What a limit on this process's memory (control groups, version 2 or 1) leaves; where there is none, more than any machine has."""
    for where, limit, used in (
        (folder, "memory.max", "memory.current"),
        (folder / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            statistics = dict(line.split() for line in (where / "memory.stat").read_text().splitlines())
            reclaimable = int(statistics.get("total_inactive_file", statistics.get("inactive_file", 0)))  # of the files' cache
            return max(0, int((where / limit).read_text()) - int((where / used).read_text()) + reclaimable)
        except (OSError, ValueError):  # not this version, or "max": no limit
            continue
    return sys.maxsize


def plan_of(
    computed: Tensor,  # bool [N]: the tokens that are looked at
    active: Tensor,  # bool [N], a part of them: those that get a gradient
    limit: int,  # tokens per chunk
    sequences: Sequences | None,  # chunks begin and end with these; None: anywhere
) -> Plan:
    """Decide what is computed. Reads how many tokens there are: the one synchronisation of a head on a GPU. While a CUDA graph is
    captured nothing may be read, and all tokens are computed as they stand (the mask still makes their gradient 0)."""
    total = computed.shape[0]
    if capturing(computed.device):
        return Plan(None, _even(0, total, limit) if sequences is None else [Chunk(_pieces(0, total, limit))], [], computed)
    counts = torch.stack([active.sum(), computed.sum()])
    if sequences is not None:
        counts = torch.cat([counts, per_sequence(active, sequences)])
    num_active, num_computed, *lengths = counts.tolist()

    order = None
    if num_computed < total or 0 < num_active < total:
        key = torch.where(active, 0, torch.where(computed, 1, 2)).to(torch.uint8)
        order = key.argsort(stable=True)[:num_computed]
    chunks = _even(0, num_active, limit) if sequences is None else _whole(lengths, limit)
    return Plan(order, chunks, _even(num_active, num_computed, limit))


def per_sequence(tokens: Tensor, sequences: Sequences) -> Tensor:  # bool [N] -> int64 [S]
    """How many of the tokens are in each sequence."""
    assert sequences.segment is not None
    ends = torch.searchsorted(sequences.segment, torch.arange(sequences.count, device=tokens.device), right=True)
    total = torch.cat([tokens.new_zeros(1, dtype=torch.int64), tokens.cumsum(0)])
    return total[ends].diff(prepend=total[:1])


def _pieces(begin: int, end: int, limit: int) -> list[tuple[int, int]]:
    count = -(-(end - begin) // limit)
    size = -(-(end - begin) // max(count, 1))
    size = min(limit, -(-size // GRANULE) * GRANULE)
    return [(first, min(first + size, end)) for first in range(begin, end, max(size, 1))]


def _even(begin: int, end: int, limit: int) -> list[Chunk]:
    return [Chunk([piece]) for piece in _pieces(begin, end, limit)]


def _whole(lengths: list[int], limit: int) -> list[Chunk]:
    """As many whole sequences to a chunk as fit; one that does not fit is a chunk of its own, in pieces."""
    chunks, begin, end = [], 0, 0
    for length in lengths:
        if end - begin + length > limit and end > begin:
            chunks.append(Chunk([(begin, end)]))
            begin = end
        end += length
        if length > limit:
            chunks.append(Chunk(_pieces(begin, end, limit)))
            begin = end
    if end > begin:
        chunks.append(Chunk([(begin, end)]))
    return chunks
