"""Finds what a reward uses that works only in the thread that made it: handles of sqlite3, which refuse every other thread.

A reward's own try/except would turn that refusal into a score of 0 for every completion.
"""

from __future__ import annotations

import inspect
import sqlite3
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

__all__ = ["SQLITE_FIX", "is_thread_error", "thread_bound_handle"]

SQLITE_FIX = "Fix: sqlite3.connect(..., check_same_thread=False), or open it in the function itself"
DEPTH = 3  # of functions that call functions


def thread_bound_handle(reward: Any) -> str | None:
    """The name of a handle of sqlite3 that the reward uses and that only this thread may use; None if there is none.

    Looked at: the globals and the enclosing variables that the function and the functions it names use, the arguments of a
    `functools.partial`, and the attributes of a reward object.
    """
    for name, value in _used(reward, DEPTH, set()):
        if isinstance(value, (sqlite3.Connection, sqlite3.Cursor)) and _refuses_other_threads(value):
            return name
    return None


def is_thread_error(error: object) -> bool:
    """Whether an exception is sqlite3's refusal of a thread."""
    return isinstance(error, sqlite3.ProgrammingError) and "thread" in str(error)


def _used(value: Any, depth: int, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """Names and values that a function or object uses."""
    if depth == 0 or id(value) in seen:
        return
    seen.add(id(value))
    found: dict[str, Any] = {}
    if isinstance(value, partial):
        found = {"an argument of the partial": value.func} | {f"argument {i}": each for i, each in enumerate(value.args)} | value.keywords
    elif inspect.ismethod(value):
        found = {"__self__": value.__self__, "__func__": value.__func__}
    elif inspect.isfunction(value):
        variables = inspect.getclosurevars(value)
        found = {**variables.globals, **variables.nonlocals}
    elif not inspect.isclass(value) and not inspect.ismodule(value):
        found = dict(getattr(value, "__dict__", {}))
        call = getattr(type(value), "__call__", None)  # noqa: B004
        if inspect.isfunction(call):
            found["__call__"] = call
    for name, each in found.items():
        yield name, each
        yield from ((inner, used) for inner, used in _used(each, depth - 1, seen))


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
