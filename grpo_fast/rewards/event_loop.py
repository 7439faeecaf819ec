"""The event loop that all async rewards of a program share.

A lock, semaphore, queue or HTTP session belongs to the loop in which it was first waited for. With a new loop per batch, one that a reward
keeps from batch to batch would be "bound to a different event loop".
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable, Coroutine
from concurrent.futures import wait
from contextlib import suppress
from typing import TypeVar
from weakref import WeakSet

__all__ = ["capture_exit", "replace_loop", "run_async", "shared_loop"]

T = TypeVar("T")
POLL = 0.5  # seconds between two looks at whether the loop still runs
_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None
_thread: threading.Thread | None = None
_ended: WeakSet[asyncio.AbstractEventLoop] = WeakSet()
_owner = 0  # the process whose thread runs the loop; a fork copies the loop without its thread


def run_async(coroutine: Coroutine[object, object, T]) -> T:
    """Run a coroutine in the shared event loop, and wait for its value. The caller may have a running event loop of its own.

    Raises:
        SystemExit: the coroutine called sys.exit; here, and not in the loop, which goes on. Other errors of the coroutine likewise.
        RuntimeError: the coroutine was cancelled, or the loop ended, since a task that the coroutine started called sys.exit, or blocked
            the loop past its time limit.

    Example:
        >>> run_async(asyncio.sleep(0, "done"))
        'done'
    """
    loop, thread = shared_loop()
    future = asyncio.run_coroutine_threadsafe(capture_exit(coroutine), loop)
    while not wait([future], timeout=POLL).done and thread.is_alive():
        pass
    if future.cancelled() and loop not in _ended:
        raise RuntimeError("an async reward was cancelled (asyncio.CancelledError)")
    if not future.done() or future.cancelled():
        replace_loop(loop)
        raise RuntimeError("the event loop of the async rewards has ended: a task called sys.exit, or blocked it for too long")
    value, end = future.result()
    if end is not None:
        raise end
    return value  # type: ignore[return-value]


def shared_loop() -> tuple[asyncio.AbstractEventLoop, threading.Thread]:
    """The loop and the daemon thread in which it runs. They are started at the first use."""
    global _loop, _thread, _owner
    with _lock:
        if _loop is None or _owner != os.getpid() or _loop.is_closed():
            _loop, _owner = asyncio.new_event_loop(), os.getpid()
            _thread = threading.Thread(target=_run, args=(_loop,), daemon=True, name="grpo_fast async rewards")
            _thread.start()
        assert _thread is not None
        return _loop, _thread


def replace_loop(blocked: asyncio.AbstractEventLoop | None = None) -> None:
    """Start another loop at the next use: a reward blocks this one, and everything after it would wait for that reward.

    Args:
        blocked: do it only if this is still the shared loop.
    """
    global _loop
    with _lock:
        if blocked is not None and blocked is not _loop:
            return
        if _loop is not None and _owner == os.getpid():
            with suppress(RuntimeError):  # it is closed already
                _loop.call_soon_threadsafe(_loop.stop)  # once the blocking call ends
        _loop = None


async def capture_exit(awaitable: Awaitable[T]) -> tuple[T | None, BaseException | None]:
    """The value of an awaitable, or what it raised to end the program (SystemExit, KeyboardInterrupt, ...), which would end the loop.

    A cancellation is not captured, and neither is an `Exception`.
    """
    try:
        return await awaitable, None
    except (Exception, asyncio.CancelledError):
        raise
    except BaseException as end:
        return None, end


def _run(loop: asyncio.AbstractEventLoop) -> None:
    try:
        with suppress(SystemExit, KeyboardInterrupt):  # of a task that a reward has started; run_async tells the caller
            loop.run_forever()
    finally:
        _ended.add(loop)  # before its tasks are cancelled
        pending = asyncio.all_tasks(loop)
        for task in pending:
            task.cancel()
        if pending:
            with suppress(SystemExit, KeyboardInterrupt):
                loop.run_until_complete(asyncio.gather(*pending, return_exceptions=True))
        loop.close()
