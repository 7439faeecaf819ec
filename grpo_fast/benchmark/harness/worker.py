"""Worker processes, and the memory that they share.

``python -m grpo_fast.benchmark.harness.worker MODULE:CLASS ARGUMENTS`` reads commands and writes answers as lines of JSON.
The class is made with ARGUMENTS (a JSON object); each command calls one of its methods. A suite uses the other end, `WorkerProcess`.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import mmap
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

__all__ = ["ALIGNMENT", "SharedMemory", "WorkerDiedError", "WorkerError", "WorkerProcess", "aligned_bytes"]

ALIGNMENT = 4096


class WorkerError(RuntimeError):
    """A command failed in its worker process; the text is the first line of the error."""


class WorkerDiedError(WorkerError):
    """A worker process has ended; the text has its exit status and the last line that it wrote to stderr."""


class WorkerProcess:
    """A child process that answers the methods of a class. Ends with its ``with`` block.

    Args:
        target: "module:Class" of what the child makes and calls.
        threads: that PyTorch uses in it.
        arguments: of the class; JSON.
        pass_fds: file descriptors that the child inherits.
    """

    def __init__(self, target: str, threads: int, arguments: dict[str, Any], *, pass_fds: tuple[int, ...] = ()):
        # One compilation process: torch.compile would keep a pool of them beside what is being timed.
        environment = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by __exit__)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "grpo_fast.benchmark.harness.worker", target, str(threads), json.dumps(arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            pass_fds=pass_fds,
            env={**os.environ, **environment},
        )

    def __enter__(self) -> WorkerProcess:
        return self

    def ask(self, method: str, **arguments: Any) -> dict[str, Any]:
        """Call a method of the class and wait for its answer, JSON.

        Raises:
            WorkerError: the call failed.
            WorkerDiedError: the process ended.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # the process has ended: there will be no answer
            self._process.stdin.write(json.dumps([method, arguments]) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._log.seek(0)
            last = (self._log.read().strip().splitlines() or ["it wrote nothing"])[-1]
            fix = "; killed by the system, probably for lack of memory. Fix: smaller shapes" if code == -9 else ""
            raise WorkerDiedError(f"its process ended with status {code}{fix}: {last}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def __exit__(self, *_: object) -> None:
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


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

    def rewind(self) -> None:
        """Allocate from the start again. Parent and child must allocate the same tensors in the same order."""
        self.position = 0

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The next tensor, with whatever values the memory holds."""
        tensor = torch.frombuffer(self._memory, dtype=dtype, count=prod(shape), offset=self.position).view(*shape)
        self.position += aligned_bytes(shape, dtype)
        return tensor


def aligned_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    """The bytes that a tensor occupies in shared memory, padding included."""
    return -(-prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT


def main() -> None:
    """Answer each command until stdin is closed. An exception is an answer too: the implementation failed, and the others go on."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not get among the answers
    warnings.simplefilter("ignore")
    target, threads, arguments = sys.argv[1:]
    torch.set_num_threads(int(threads))
    module, _, name = target.partition(":")
    worker = getattr(importlib.import_module(module), name)(**json.loads(arguments))
    for line in sys.stdin:
        method, given = json.loads(line)
        try:
            answer = getattr(worker, method)(**given)
        except Exception as error:
            first = (str(error).strip().splitlines() or [""])[0]
            answer = {"error": f"{type(error).__name__}: {first}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
