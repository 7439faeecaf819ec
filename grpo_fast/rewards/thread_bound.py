"""Finds what a reward uses that works only in the thread that made it: handles of sqlite3, which refuse every other thread.

A reward's own try/except would turn that refusal into a score of 0 for every completion.
"""

from __future__ import annotations

import sqlite3
import threading
from typing import Any

from grpo_fast.rewards.inspection import values_used

__all__ = ["SQLITE_FIX", "is_thread_error", "thread_bound_handle"]

SQLITE_FIX = "Fix: sqlite3.connect(..., check_same_thread=False), or open it in the function itself"


def thread_bound_handle(reward: Any) -> str | None:
    """The name of a handle of sqlite3 that the reward uses and that only this thread may use; None if `values_used` finds none."""
    for name, value in values_used(reward):
        if isinstance(value, (sqlite3.Connection, sqlite3.Cursor)) and _refuses_other_threads(value):
            return name
    return None


def is_thread_error(error: object) -> bool:
    """Whether an exception is sqlite3's refusal of a thread."""
    return isinstance(error, sqlite3.ProgrammingError) and "thread" in str(error)


def _refuses_other_threads(handle: sqlite3.Connection | sqlite3.Cursor) -> bool:
    refused: list[bool] = []

    def use() -> None:
        try:
            (handle if isinstance(handle, sqlite3.Connection) else handle.connection).cursor().close()
        except sqlite3.Error as error:
            refused.append(is_thread_error(error))

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    return any(refused)
