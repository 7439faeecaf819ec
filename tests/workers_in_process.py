"""In place of the worker processes of a benchmark: the object itself, in this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["InThisProcess"]


class InThisProcess:
    """In place of a WorkerProcess."""

    def __init__(self, make: Callable[[], Any], threads: int) -> None:
        self.worker = make()

    def __enter__(self) -> InThisProcess:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def ask(self, method: str, **arguments: Any) -> Any:
        return getattr(self.worker, method)(**arguments)
