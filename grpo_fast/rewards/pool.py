"""Worker processes that can be killed: the only way to stop code that hangs, which neither a thread nor (in a thread) SIGALRM can.

Each worker is a fresh interpreter (as with multiprocessing's "spawn"), so it inherits no lock, thread or CUDA context of the trainer.
Unlike "spawn" it never runs the caller's main script again, needs no ``if __name__ == "__main__"``, and a daemonic process may start it.
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
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Pipe, wait
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Outcome", "WorkerPool"]

WORKER = Path(__file__).with_name("worker.py")
START_TIMEOUT = 300.0  # seconds for a worker to import what it needs: long, since importing torch from a cold disk is


class Outcome(NamedTuple):
    """What became of one item: its value, or why there is none."""

    value: Any = None
    error: str | None = None
    timed_out: bool = False

    @property
    def ok(self) -> bool:
        return self.error is None


class _Worker:
    """One process and this side of its connection. ``task`` is the position of the item it works on; ``deadline`` on `time.monotonic`."""

    def __init__(self, target: tuple[str, str] | bytes, memory_limit: int | None) -> None:
        self.connection, theirs = Pipe()
        try:
            self.process = subprocess.Popen(
                # -I: no file beside worker.py stands before the standard library's; the worker gets this process's sys.path by message
                [sys.executable, "-I", str(WORKER), str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # a group of its own: killed with all it has started, and deaf to the terminal's Ctrl-C
                env=os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
            )
        finally:
            theirs.close()
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
    """Call a function on items in worker processes, with a time limit per item after which the worker is killed and replaced.

    The workers start at the first call, stay for the next ones, and end with the pool or with this process. Any thread may call; calls of
    several threads take turns. Every item gets its own `Outcome`, whatever happened to the others.

    Args:
        target: a picklable function of one argument, or ``(file, name)`` of one that needs nothing but its file.
        workers: processes, at least 1. They are started as items need them.
        memory_limit: bytes of address space each worker may have (POSIX ``RLIMIT_AS``); None = no limit.

    Example:
        >>> with WorkerPool(len, workers=1) as pool:
        ...     pool.map([[1, 2], 3], timeout=60)[0].value
        2
    """

    def __init__(self, target: Any, *, workers: int = 1, memory_limit: int | None = None) -> None:
        if workers < 1:
            raise ValueError(f"WorkerPool: workers is {workers}; expected at least 1.")
        if sys.platform == "win32":
            raise OSError("WorkerPool: this is Windows; expected a POSIX system, whose process groups and alarms it stands on.")
        self._target = target if isinstance(target, tuple) else pickle.dumps(target)
        self._size, self._memory_limit = workers, memory_limit
        self._workers: list[_Worker] = []
        self._lock = threading.Lock()
        self._owner = os.getpid()
        self._end = weakref.finalize(self, _kill_all, self._workers, self._owner)

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill the workers. The next call of `map` starts new ones."""
        with self._lock:
            _kill_all(self._workers, self._owner)

    def map(self, items: Sequence[Any], *, timeout: float | None) -> list[Outcome]:
        """One `Outcome` per item, in their order. ``timeout``: seconds for each item, not counting a worker's start; None = no limit."""
        payloads = [pickle.dumps((timeout, pickle.dumps(item, -1)), -1) for item in items]  # in two: what cannot be read there is an error
        with self._lock:
            if os.getpid() != self._owner:  # a forked child: these workers are its parent's
                del self._workers[:]
                self._owner = os.getpid()
                self._end.detach()
                self._end = weakref.finalize(self, _kill_all, self._workers, self._owner)
            try:
                return self._map(payloads, timeout)
            except BaseException:
                _kill_all(self._workers, self._owner)  # or the next call would take this call's late results for its own
                raise

    def _map(self, payloads: list[bytes], timeout: float | None) -> list[Outcome]:
        outcomes: list[Outcome | None] = [None] * len(payloads)
        queue = deque(range(len(payloads)))
        left = len(payloads)
        while left:
            for worker in list(self._workers):
                if worker.task is None and worker.ready and worker.process.poll() is not None:
                    self._drop(worker)  # died while idle (killed for memory, say): no item's fault
                elif queue and worker.ready and worker.task is None:
                    worker.task = queue.popleft()
                    worker.deadline = float("inf") if timeout is None else time.monotonic() + timeout
                    with suppress(OSError):  # it has died; that shows below, as the end of its connection
                        worker.connection.send_bytes(payloads[worker.task])
            starting = sum(not worker.ready for worker in self._workers)
            while len(self._workers) < self._size and starting < len(queue):
                self._workers.append(_Worker(self._target, self._memory_limit))
                starting += 1

            busy = [worker for worker in self._workers if worker.task is not None or not worker.ready]
            first = min(worker.deadline for worker in busy)
            heard = wait([w.connection for w in busy], None if first == float("inf") else max(first - time.monotonic(), 0.0))
            for worker in busy:
                if worker.connection in heard:
                    outcome = self._hear(worker)
                elif time.monotonic() >= worker.deadline:
                    outcome = self._overdue(worker, timeout)
                else:
                    continue
                if outcome is not None:
                    assert worker.task is not None
                    outcomes[worker.task], worker.task = outcome, None
                    left -= 1
        return [outcome for outcome in outcomes if outcome is not None]

    def _hear(self, worker: _Worker) -> Outcome | None:
        """What the worker sent; None = it is ready now. One that could not start is an error of the pool: the next would not either."""
        try:
            kind, content = pickle.loads(worker.connection.recv_bytes())
        except (EOFError, OSError):
            self._drop(worker)
            how = _exit_of(worker.process.returncode)
            if not worker.ready:
                raise RuntimeError(f"WorkerPool: a worker process {how} while it started; what it said is above.") from None
            return Outcome(error=f"its worker process {how}")
        if kind == "failed":
            self._drop(worker)
            raise RuntimeError(f"WorkerPool: a worker process could not load what it is to call:\n{content}")
        if kind == "ready":
            worker.ready = True
            return None
        return Outcome(value=content) if kind == "value" else Outcome(error=content)

    def _overdue(self, worker: _Worker, timeout: float | None) -> Outcome:
        self._drop(worker, kill=True)
        if not worker.ready:
            raise RuntimeError(f"WorkerPool: a worker process was not ready within {START_TIMEOUT:g} s.")
        return Outcome(error=f"it took longer than {timeout:g} s, and its worker process was killed", timed_out=True)

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


def _exit_of(status: int | None) -> str:
    if status is not None and status < 0:
        return f"was ended by {signal.Signals(-status).name}"
    return f"ended with exit status {status}"
