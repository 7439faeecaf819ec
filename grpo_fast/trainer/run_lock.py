"""The lock of an output folder: one run at a time writes checkpoints and metrics there."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate.utils import gather_object

from grpo_fast.trainer.checkpoint_files import CheckpointError

__all__ = ["RunLock"]

LOCK = ".lock"  # stays in the folder; the operating system releases the lock itself when its process ends

logger = logging.getLogger("grpo_fast")


class RunLock:
    """Keeps other runs out of an output folder while this one trains, also runs of other processes and machines.

    Args:
        output_dir: the folder.
    """

    def __init__(self, output_dir: str | Path) -> None:
        from filelock import FileLock

        self.folder = Path(output_dir)
        self._lock = FileLock(str(self.folder / LOCK))

    @contextmanager
    def held(self, *, is_main: bool) -> Iterator[None]:
        """Hold the lock inside the context, which may be nested. Every process of the run must enter it.

        Args:
            is_main: whether this process takes the lock for all of the run.

        Raises:
            CheckpointError: another run holds it; in every process.
        """
        taken, problem = self._take() if is_main else (False, None)
        try:
            problems = [each for each in gather_object([problem]) if each is not None]
            if problems:
                raise CheckpointError(problems[0])
            yield
        finally:
            if taken:
                self._lock.release()

    def _take(self) -> tuple[bool, str | None]:
        """Whether the lock was taken, and a message if another run holds it."""
        from filelock import Timeout

        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout:
            return False, (
                f"output_dir is {str(self.folder)!r}, in which another run is training now; expected a folder for each run. "
                "Fix: another output_dir, or end that run."
            )
        except (OSError, NotImplementedError) as error:
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise
            logger.warning("%s cannot be locked against a second run in it (%s).", self.folder, error)
            return False, None
        return True, None
