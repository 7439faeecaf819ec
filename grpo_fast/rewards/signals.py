"""Notices that a reward sets signal handlers in a thread, where Python refuses them.

math-verify, for instance, limits its time by an alarm. In a thread that raises a ValueError, which a reward's own try/except turns into a
score of 0 for every completion, and nobody would notice.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["used_signals", "watch_signals"]

_lock = threading.Lock()
_watching = 0
_original: Any = None
_users: set[int] = set()  # identifiers of the threads that tried to set a handler


@contextmanager
def watch_signals() -> Iterator[None]:
    """A context in which calls of `signal.signal` outside of the main thread are noted. They raise a ValueError as always."""
    global _watching, _original
    with _lock:
        if _watching == 0:
            _original = signal.signal
            signal.signal = _noting  # type: ignore[assignment]
        _watching += 1
    try:
        yield
    finally:
        with _lock:
            _watching -= 1
            if _watching == 0:
                signal.signal = _original


def used_signals(thread: threading.Thread) -> bool:
    """Whether this thread tried to set a signal handler since the last call for it."""
    found = thread.ident in _users
    _users.discard(thread.ident or 0)
    return found


def _noting(number: Any, handler: Any) -> Any:
    if threading.current_thread() is not threading.main_thread():
        _users.add(threading.get_ident())
    return _original(number, handler)
