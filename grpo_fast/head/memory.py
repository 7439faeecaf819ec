"""The free memory of a device, and the number of tokens per chunk that follows from it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

__all__ = ["chunk_rows", "free_bytes", "is_capturing"]

ROWS_PER_CHUNK = {"cpu": 512, "otherwise": 8192}  # upper limits: larger chunks do not make the matrix products faster
FREE_SHARE = 4  # a chunk takes at most 1 / FREE_SHARE of the free memory


def chunk_rows(chunk_bytes: int | None, row_bytes: int, device: torch.device) -> int:
    """Return the number of tokens per chunk, at least 1: as many as fit into ``chunk_bytes``. None: 512 on a CPU and 8192 elsewhere, or
    fewer, so that a chunk takes at most a quarter of the free memory."""
    if chunk_bytes is not None:
        return max(1, chunk_bytes // row_bytes)
    wanted = ROWS_PER_CHUNK.get(device.type, ROWS_PER_CHUNK["otherwise"])
    if is_capturing(device):
        return wanted
    return max(1, min(wanted, free_bytes(device) // (FREE_SHARE * row_bytes)))


def is_capturing(device: torch.device) -> bool:
    """Return whether a CUDA graph is being captured, during which nothing may be read from the device."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def free_bytes(device: torch.device) -> int:
    """Return the memory that can be allocated on the device now."""
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
    """Return the memory left under the control group's limit (version 2 or 1); sys.maxsize without a limit."""
    for where, limit, used in (
        (folder, "memory.max", "memory.current"),
        (folder / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            statistics = dict(line.split() for line in (where / "memory.stat").read_text().splitlines())
            reclaimable = int(statistics.get("total_inactive_file", statistics.get("inactive_file", 0)))  # of the page cache
            return max(0, int((where / limit).read_text()) - int((where / used).read_text()) + reclaimable)
        except (OSError, ValueError):  # not this version, or "max": no limit
            continue
    return sys.maxsize
