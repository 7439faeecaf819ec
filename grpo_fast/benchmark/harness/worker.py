"""Worker processes, each with an object whose methods are called from here, and the memory that they share."""

from __future__ import annotations

import mmap
import multiprocessing
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from math import prod
from multiprocessing.connection import Connection
from multiprocessing.reduction import DupFd
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from grpo_fast.benchmark.harness.measure import Record

__all__ = ["ALIGNMENT", "SharedMemory", "WorkerDiedError", "WorkerError", "WorkerProcess", "aligned_bytes"]

ALIGNMENT = 4096


class WorkerError(RuntimeError):
    """A command failed in its worker process; the text is the first line of the error."""


class WorkerDiedError(WorkerError):
    """A worker process has ended; the text has its exit status and the last line that it wrote to stderr."""


class WorkerProcess:
    """A child process that answers calls of an object's methods. Ends with its ``with`` block.

    Args:
        make: makes the object in the child; can be pickled.
        threads: that PyTorch uses in it.
    """

    def __init__(self, make: Callable[[], Any], threads: int):
        # One compilation process: torch.compile would keep a pool of them beside what is being timed.
        environment = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        self._log = tempfile.NamedTemporaryFile("r")  # noqa: SIM115 (closed by __exit__)
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_answer_calls, args=(theirs, self._log.name, make, threads), daemon=True)
        with mock.patch.dict(os.environ, environment):  # read when the child imports torch
            self._process.start()
        theirs.close()

    def __enter__(self) -> WorkerProcess:
        return self

    def ask(self, method: str, **arguments: Any) -> Record:
        """Call a method of the object and wait for its answer.

        Raises:
            WorkerError: the call failed.
            WorkerDiedError: the process ended.
        """
        try:
            self._connection.send((method, arguments))
            answer: Record = self._connection.recv()
        except (EOFError, ConnectionError) as error:
            self._process.join()
            code, last = self._process.exitcode, (self._log.read().strip().splitlines() or ["it wrote nothing"])[-1]
            fix = "; killed by the system, probably for lack of memory. Fix: smaller shapes" if code == -9 else ""
            raise WorkerDiedError(f"its process ended with status {code}{fix}: {last}") from error
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        self._process.join(timeout=10)
        self._process.kill()
        self._process.join()
        self._log.close()


def _answer_calls(connection: Connection, log: str, make: Callable[[], Any], threads: int) -> None:
    """Answer each call until the other end is closed. An exception is an answer too: the implementation failed, and the others go on."""
    with open(log, "a") as file:
        for standard in (1, 2):
            os.dup2(file.fileno(), standard)
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    worker = make()
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = getattr(worker, method)(**arguments)
        except Exception as error:
            first = (str(error).strip().splitlines() or [""])[0]
            answer = {"error": f"{type(error).__name__}: {first}"}
        connection.send(answer)


class SharedMemory:
    """A mapping of ``size`` bytes behind a file descriptor that child processes inherit. Tensors are allocated in it one after another."""

    def __init__(self, descriptor: int, size: int):
        self.descriptor, self.size = descriptor, size
        self._memory = mmap.mmap(descriptor, size)
        self.position = 0

    @classmethod
    def create(cls, size: int) -> SharedMemory:
        # Anonymous memory where the system has it: /dev/shm is 64 MB in many containers, and a file on disk would be written back.
        if hasattr(os, "memfd_create"):
            descriptor = os.memfd_create("grpo_fast_bench")
        else:
            with tempfile.TemporaryFile() as file:
                descriptor = os.dup(file.fileno())
        os.ftruncate(descriptor, size)
        return cls(descriptor, size)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled for a process that is being started, which gets the same memory."""
        return _shared_with_child, (DupFd(self.descriptor), self.size)

    def rewind(self) -> None:
        """Allocate from the start again. Parent and child must allocate the same tensors in the same order."""
        self.position = 0

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The next tensor, with whatever values the memory holds."""
        tensor = torch.frombuffer(self._memory, dtype=dtype, count=prod(shape), offset=self.position).view(*shape)
        self.position += aligned_bytes(shape, dtype)
        return tensor


def _shared_with_child(descriptor: Any, size: int) -> SharedMemory:
    return SharedMemory(descriptor.detach(), size)


def aligned_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    """The bytes that a tensor occupies in shared memory, padding included."""
    return -(-prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
