"""The program of a worker process of `grpo_fast.rewards.pool`: it calls one function on the items it receives.

It is started by its path and imports the standard library only, so a worker imports torch only if the function does.
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

GRACE = 10.0  # seconds after its time limit at which a worker whose parent is gone is ended by its own alarm


def load(target: tuple[str, ...] | bytes) -> Callable[[Any], Any]:
    """Load the function: pickled, or as (file, name), which does not import the package of the file."""
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


def send_result(connection: Connection, result: tuple[str, Any]) -> None:
    try:
        blob = pickle.dumps(result, pickle.HIGHEST_PROTOCOL)
    except Exception as error:
        blob = pickle.dumps(("error", f"its result cannot be sent back: {type(error).__name__}: {error}"))
    connection.send_bytes(blob)


def serve(connection: Connection) -> None:
    path, target, limit = pickle.loads(connection.recv_bytes())
    sys.path[:] = path  # so that this process can import what its parent can
    try:
        limit_memory(limit)
        function = load(target)
    except BaseException:
        send_result(connection, ("failed", traceback.format_exc(limit=-3)))
        return
    send_result(connection, ("ready", None))
    while True:
        timeout, payload = pickle.loads(connection.recv_bytes())
        if timeout is not None:
            # The default action ends the process even in C code that holds the interpreter lock. A living parent kills earlier.
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, timeout + GRACE)
        try:
            result = ("value", function(pickle.loads(payload)))
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            result = ("error", f"{type(error).__name__}: {error} ({os.path.basename(where.filename)}, line {where.lineno})")
        signal.setitimer(signal.ITIMER_REAL, 0)
        send_result(connection, result)


if __name__ == "__main__":
    channel = Connection(int(sys.argv[1]))
    os.dup2(2, 1)  # what the function prints must not get between the results: it goes to standard error
    with contextlib.suppress(EOFError, OSError):  # the parent has closed the connection, or has ended
        serve(channel)
