"""Notices what a reward does to its process: signal handlers and alarms outside of the main thread, and ``os._exit``.

math-verify, for instance, limits its time by an alarm. Outside of the main thread that raises a ValueError, which a reward's own try/except
turns into a score of 0 for every completion, and nobody would notice.
"""

from __future__ import annotations

import _signal
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

__all__ = ["UNKNOWN", "ProcessExit", "attributed_to", "watch_process"]

UNKNOWN = -1  # instead of the index of a reward: a thread that a reward started
# signal.signal calls _signal.signal by name, so this reaches code that imported the former before, too.
_REPLACED: tuple[tuple[Any, str], ...] = ((_signal, "signal"), (signal, "alarm"), (signal, "setitimer"), (os, "_exit"))
_lock = threading.Lock()
_watches: dict[int, set[int]] = {}
_originals: list[Callable[..., Any]] = []
_index: ContextVar[int] = ContextVar("_index", default=UNKNOWN)  # of the reward that runs here


class ProcessExit(BaseException):
    """A reward called ``os._exit``, which would have ended the trainer's process without a word."""


@contextmanager
def watch_process() -> Iterator[set[int]]:
    """A context that notes which rewards set signal handlers or alarms outside of the main thread; both raise a ValueError there.

    ``os._exit`` of a reward raises `ProcessExit`. Forked children, and threads that are not a reward's own, end the process as always.

    Yields:
        a set, to which the indices of such rewards are added (see `attributed_to`), and `UNKNOWN` for a thread that a reward started.

    Example:
        >>> with watch_process() as seen, attributed_to(0):
        ...     thread = threading.Thread(target=signal.alarm, args=(0,))
        ...     thread.start(), thread.join()
        (None, None)
        >>> seen == {UNKNOWN}
        True
    """
    seen: set[int] = set()
    with _lock:
        if not _watches:
            _originals[:] = [getattr(module, name) for module, name in _REPLACED]
            for (module, name), original in zip(_REPLACED, _originals, strict=True):
                setattr(module, name, _guarded_exit(original) if name == "_exit" else _noted(name, original))
        _watches[id(seen)] = seen
    try:
        yield seen
    finally:
        with _lock:
            del _watches[id(seen)]
            if not _watches:
                for (module, name), original in zip(_REPLACED, _originals, strict=True):
                    setattr(module, name, original)


@contextmanager
def attributed_to(index: int) -> Iterator[None]:
    """A context whose calls count as those of reward ``index``. It belongs to the thread, or to the asyncio task, that enters it."""
    token = _index.set(index)
    try:
        yield
    finally:
        _index.reset(token)


def _noted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            index = _index.get()
            for seen in list(_watches.values()):
                seen.add(index)
            if index != UNKNOWN and name != "signal":  # an alarm would raise its exception in the main thread, in the trainer
                raise ValueError(f"signal.{name} was called outside of the main thread, which an alarm would interrupt")
        return original(*args)

    return call


def _guarded_exit(original: Callable[..., Any]) -> Callable[..., Any]:
    owner = os.getpid()

    def call(status: int) -> None:
        if os.getpid() == owner and _index.get() != UNKNOWN:
            raise ProcessExit(f"it called os._exit({status}), which would end this process")
        original(status)

    return call
