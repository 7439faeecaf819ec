"""Writing result files: atomically, and only after checking that the place can be written to."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

__all__ = ["check_output", "write_atomically", "write_json", "write_text"]


def write_atomically(path: Path, write: Callable[[Path], object], *, mode: int = 0o644) -> None:
    """Write a file so that a reader finds either the old file or the whole new one.

    The file is written beside its target, flushed to the disk and moved into place. Missing parent folders are created.

    Args:
        path: the file to write or replace.
        write: called with the path of a temporary file in the same folder and with the same suffix, which it fills.
        mode: permissions of the finished file.

    Raises:
        OSError: the folder cannot be written to. An error of ``write`` is passed on; the temporary file is removed in both cases.

    Example:
        >>> target = Path(tempfile.mkdtemp()) / "result.txt"
        >>> write_atomically(target, lambda partial: partial.write_text("42"))
        >>> target.read_text()
        '42'
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(descriptor)
    partial = Path(name)
    try:
        write(partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.chmod(mode)  # mkstemp creates files with 0600, for secrets
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str, *, mode: int = 0o644) -> None:
    """Write UTF-8 text atomically, as ``write_atomically``."""
    write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"), mode=mode)


def write_json(path: Path, value: Any, *, mode: int = 0o644) -> None:
    """Write JSON with an indent of 1 atomically; NaN and infinity, which JSON does not have, raise a ValueError."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n", mode=mode)


def check_output(output: Path) -> None:
    """Check before a long measurement that its result can be written; folders created for the check are removed again.

    Args:
        output: the .json file to be written; a figure takes the same name with .png.

    Raises:
        ValueError: it is not the name of a .json file, or nothing can be written there.
    """
    if output.suffix != ".json" or output.is_dir():
        raise ValueError(f"output is {str(output)!r}; expected the name of a .json file. A figure takes the same name with .png.")
    new = [folder for folder in output.parents if not folder.exists()]
    try:  # permission bits do not tell whether a file can be created (read-only mounts, quotas): create one
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output.parent):
            pass
    except OSError as error:
        raise ValueError(f"output is {str(output)!r}; expected a place to write to ({error}). Fix: another --output.") from error
    finally:
        for folder in new:
            with suppress(OSError):
                folder.rmdir()
