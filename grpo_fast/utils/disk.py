"""Recognises errors that a full disk has caused, whatever library reports them."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path

__all__ = ["DiskFullError", "describe_space", "is_disk_full"]

_FULL = (errno.ENOSPC, errno.EDQUOT)
_PROBE = b"\0" * (1 << 20)


class DiskFullError(OSError):
    """There is no space left to write to."""


def is_disk_full(error: BaseException, folder: Path) -> bool:
    """Whether an error that occurred while a file was written to a folder comes from a full disk or an exceeded quota.

    safetensors reports the operating system's message in an error of its own, and ``torch.save`` reports that a write failed, without the
    reason: then a megabyte is written to the folder, and removed.

    Args:
        error: of the failed write.
        folder: in which the file was to be; before anything is removed from it.
    """
    cause: BaseException | None = error
    while cause is not None:
        if (isinstance(cause, OSError) and cause.errno in _FULL) or os.strerror(errno.ENOSPC).lower() in str(cause).lower():
            return True
        cause = cause.__cause__ or cause.__context__
    existing = next(each for each in (folder, *folder.parents) if each.is_dir())
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(_PROBE)
            file.flush()
    except OSError as probe:
        return probe.errno in _FULL
    return False


def describe_space(folder: Path) -> str:
    """The free space of a folder's file system, such as "1.5 GB of 900.0 GB are free"."""
    existing = next(each for each in (folder, *folder.parents) if each.is_dir())
    usage = shutil.disk_usage(existing)
    return f"{usage.free / 1e9:.1f} GB of {usage.total / 1e9:.1f} GB are free"
