"""Worker processes with a time limit per item: a process can be killed when it hangs, a thread cannot.

Each worker is a fresh interpreter, like multiprocessing's "spawn", so it inherits no lock, thread or CUDA context of the trainer. Unlike
"spawn" it does not run the caller's main script again, needs no ``if __name__ == "__main__"``, and may be started by a daemonic process.

Why not a library: pebble 5.2 left a killed worker's children running, broke when an idle worker died, and ran the main script again; loky
left children and, after the caller was killed, workers running, and cannot be started by a daemonic process.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Pipe, wait
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["CallResult", "WorkerPool"]

WORKER = Path(__file__).with_name("worker.py")
START_TIMEOUT = 300.0  # seconds for a worker's imports; importing torch from a cold disk takes long


class CallResult(NamedTuple):
    """The result of one call: its value, or why there is none."""

    value: Any = None
    error: str | None = None
    timed_out: bool = False

    @property
    def ok(self) -> bool:
        """Whether the call returned a value."""
        return self.error is None


class _Worker:
    """One process and this side of its connection. ``task`` is the index of the item it works on; ``deadline`` on `time.monotonic`."""

    def __init__(self, target: tuple[str, str] | bytes, memory_limit: int | None) -> None:
        self.connection, child_end = Pipe()
        try:
            self.process = subprocess.Popen(
                # -I: files beside worker.py must not shadow the standard library; the worker receives sys.path as its first message
                [sys.executable, "-I", str(WORKER), str(child_end.fileno())],
                pass_fds=[child_end.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # its own process group: its children are killed with it, and Ctrl-C does not reach it
                env=os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
            )
        finally:
            child_end.close()
        self.ready = False
        self.task: int | None = None
        self.deadline = time.monotonic() + START_TIMEOUT
        self.connection.send_bytes(pickle.dumps((sys.path, target, memory_limit)))

    def kill(self) -> None:
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            self.process.kill()
        self.process.wait()
        self.connection.close()


class WorkerPool:
    """Call a function on items in worker processes, with a time limit per item; a worker that exceeds it is killed and replaced.

    The workers start at the first call, are reused by later calls, and end with the pool or with this process. Calls of several threads
    run one after the other. Every item gets its own `CallResult`, whatever happens to the other items.

    Args:
        target: a picklable function of one argument; or ``(file, name)`` of a function, whose file is run without importing its package.
        workers: maximum number of processes, at least 1. They are started when items need them.
        memory_limit: bytes of address space per worker (POSIX ``RLIMIT_AS``); None = no limit.

    Raises:
        ValueError: ``workers`` is below 1.
        OSError: the system has no POSIX process groups and alarms (Windows).

    Example:
        >>> with WorkerPool(len, workers=1) as pool:
        ...     pool.map([[1, 2], 3], timeout=60)[0].value
        2
    """

    def __init__(self, target: Callable[[Any], Any] | tuple[str, str], *, workers: int = 1, memory_limit: int | None = None) -> None:
        if workers < 1:
            raise ValueError(f"WorkerPool: workers is {workers}; expected at least 1.")
        if sys.platform == "win32":
            raise OSError("WorkerPool: this is Windows; expected a POSIX system: the pool needs its process groups and alarms.")
        self._target = target if isinstance(target, tuple) else pickle.dumps(target)
        self._size, self._memory_limit = workers, memory_limit
        self._workers: list[_Worker] = []
        self._lock = threading.Lock()
        self._owner = os.getpid()
        self._finalizer = weakref.finalize(self, _kill_all, self._workers, self._owner)

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill the workers. The next call of `map` starts new ones."""
        with self._lock:
            _kill_all(self._workers, self._owner)

    def map(self, items: Sequence[Any], *, timeout: float | None) -> list[CallResult]:
        """Call the function on each item.

        Args:
            items: picklable arguments.
            timeout: seconds per item, without the start of a worker; None = no limit.

        Returns:
            one `CallResult` per item, in their order.

        Raises:
            RuntimeError: a worker could not start, or could not load the function.
        """
        # Pickled twice: an item that the worker cannot unpickle is an error of that item, not of the worker.
        payloads = [pickle.dumps((timeout, pickle.dumps(item, -1)), -1) for item in items]
        with self._lock:
            if os.getpid() != self._owner:  # a forked child: the workers belong to its parent
                del self._workers[:]
                self._owner = os.getpid()
                self._finalizer.detach()
                self._finalizer = weakref.finalize(self, _kill_all, self._workers, self._owner)
            try:
                return self._map(payloads, timeout)
            except BaseException:
                _kill_all(self._workers, self._owner)  # otherwise the next call would receive late results of this one
                raise

    def _map(self, payloads: list[bytes], timeout: float | None) -> list[CallResult]:
        results: list[CallResult | None] = [None] * len(payloads)
        queue = deque(range(len(payloads)))
        remaining = len(payloads)
        while remaining:
            for worker in list(self._workers):
                if worker.task is None and worker.ready and worker.process.poll() is not None:
                    self._drop(worker)  # it died while idle, killed for its memory for instance: not the fault of an item
                elif queue and worker.ready and worker.task is None:
                    worker.task = queue.popleft()
                    worker.deadline = float("inf") if timeout is None else time.monotonic() + timeout
                    with suppress(OSError):  # a worker that has died shows below, as the end of its connection
                        worker.connection.send_bytes(payloads[worker.task])
            starting = sum(not worker.ready for worker in self._workers)
            while len(self._workers) < self._size and starting < len(queue):
                self._workers.append(_Worker(self._target, self._memory_limit))
                starting += 1

            busy = [worker for worker in self._workers if worker.task is not None or not worker.ready]
            first = min(worker.deadline for worker in busy)
            readable = wait([w.connection for w in busy], None if first == float("inf") else max(first - time.monotonic(), 0.0))
            for worker in busy:
                if worker.connection in readable:
                    result = self._receive(worker)
                elif time.monotonic() >= worker.deadline:
                    result = self._kill_late(worker, timeout)
                else:
                    continue
                if result is not None:
                    assert worker.task is not None
                    results[worker.task], worker.task = result, None
                    remaining -= 1
        return [result for result in results if result is not None]

    def _receive(self, worker: _Worker) -> CallResult | None:
        """The result that a worker sent; None if it reports that it is ready. A worker that cannot start is an error of the whole pool."""
        try:
            kind, content = pickle.loads(worker.connection.recv_bytes())
        except (EOFError, OSError):
            self._drop(worker)
            end = _describe_exit(worker.process.returncode)
            if not worker.ready:
                raise RuntimeError(f"WorkerPool: a worker process {end} while it started; its output is above.") from None
            return CallResult(error=f"its worker process {end}")
        if kind == "failed":
            self._drop(worker)
            raise RuntimeError(f"WorkerPool: a worker process could not load what it is to call:\n{content}")
        if kind == "ready":
            worker.ready = True
            return None
        return CallResult(value=content) if kind == "value" else CallResult(error=content)

    def _kill_late(self, worker: _Worker, timeout: float | None) -> CallResult:
        self._drop(worker, kill=True)
        if not worker.ready:
            raise RuntimeError(f"WorkerPool: a worker process was not ready within {START_TIMEOUT:g} s.")
        return CallResult(error=f"it took longer than {timeout:g} s, and its worker process was killed", timed_out=True)

    def _drop(self, worker: _Worker, *, kill: bool = False) -> None:
        self._workers.remove(worker)
        if not kill:
            with suppress(subprocess.TimeoutExpired):
                worker.process.wait(timeout=1)  # for its exit status
        worker.kill()


def _kill_all(workers: list[_Worker], owner: int) -> None:
    if os.getpid() == owner:
        for worker in workers:
            worker.kill()
    del workers[:]


def _describe_exit(status: int | None) -> str:
    if status is not None and status < 0:
        return f"was ended by {signal.Signals(-status).name}"
    return f"ended with exit status {status}"
