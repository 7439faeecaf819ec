"""The other side of `grpo_fast.rewards.pool`: a process that calls one function on what it is sent. Started by its path, not imported.

Only the standard library is imported here: whether torch is, is up to the function that is called.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

GRACE = 10.0  # seconds past its time after which an orphan, whom nobody is left to kill, is ended by its own alarm clock


def load(target: tuple[str, ...] | bytes) -> Callable[[Any], Any]:
    """The function: pickled, or as (file, name), which spares the worker its package's imports."""
    if isinstance(target, bytes):
        return pickle.loads(target)
    path, name = target
    spec = importlib.util.spec_from_file_location("grpo_fast_worker_target", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def limit_memory(limit: int | None) -> None:
    if limit is None:
        return
    import resource

    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def answer(connection: Connection, result: tuple[str, Any]) -> None:
    try:
        blob = pickle.dumps(result, pickle.HIGHEST_PROTOCOL)
    except Exception as error:
        blob = pickle.dumps(("error", f"its result cannot be sent back: {type(error).__name__}: {error}"))
    connection.send_bytes(blob)


def serve(connection: Connection) -> None:
    path, target, limit = pickle.loads(connection.recv_bytes())
    sys.path[:] = path  # what the parent can import, this can
    try:
        limit_memory(limit)
        function = load(target)
    except BaseException:
        answer(connection, ("failed", traceback.format_exc(limit=-3)))
        return
    answer(connection, ("ready", None))
    while True:
        timeout, payload = pickle.loads(connection.recv_bytes())
        if timeout is not None:
            # The default action ends the process even inside C code that never gives up the interpreter; the parent is quicker if alive.
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, timeout + GRACE)
        try:
            result = ("value", function(pickle.loads(payload)))
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            result = ("error", f"{type(error).__name__}: {error} ({os.path.basename(where.filename)}, line {where.lineno})")
        signal.setitimer(signal.ITIMER_REAL, 0)
        answer(connection, result)


if __name__ == "__main__":
    channel = Connection(int(sys.argv[1]))
    os.dup2(2, 1)  # what the function prints goes where its errors go
    with contextlib.suppress(EOFError, OSError):  # the parent has closed the connection, or is gone
        serve(channel)
