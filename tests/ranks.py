"""Runs a test's scripts in several processes at once and collects what they leave; and how such a process ends."""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hang import HANG


class Start(NamedTuple):
    """One process: the arguments of the script, and what its environment has beside ours."""

    arguments: Sequence[str]
    environment: Mapping[str, str] = {}


def run_together(script: Path, starts: Sequence[Start]) -> None:
    """Run the script once for each start, all at once. If one fails, the others are ended and the test fails with what they printed.

    The processes are forked: a fresh interpreter spends seconds on importing torch and transformers, which are there already.
    Where there is a GPU they are spawned: threads of autograd and of CUDA do not survive a fork.
    """
    context: Any = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, str(i)) for i in range(len(starts))]
        processes = [context.Process(target=_as_script, args=(script, *pair)) for pair in zip(starts, outputs, strict=True)]
        for process in processes:
            process.start()
        running, end = list(processes), time.monotonic() + HANG
        try:
            while running and time.monotonic() < end and all(process.exitcode in (None, 0) for process in processes):
                wait([process.sentinel for process in running], timeout=end - time.monotonic())
                running = [process for process in running if process.exitcode is None]
        finally:
            for process in running:
                process.kill()
                process.join()
        said = "\n".join(output.read_text() for output in outputs)
        assert all(process.exitcode == 0 for process in processes), f"{[process.exitcode for process in processes]}\n{said[-6000:]}"


def _as_script(script: Path, start: Start, output: Path) -> None:
    """In the process: as ``python script arguments...`` would be, in the state of a fresh interpreter as far as a script can notice."""
    file = output.open("w", buffering=1)  # open to the end: a traceback is printed after this function
    for stream in (1, 2):
        os.dup2(file.fileno(), stream)
    sys.stdout = sys.stderr = file
    os.environ.update(start.environment)
    sys.argv = [str(script), *start.arguments]
    torch.use_deterministic_algorithms(False)
    torch.manual_seed(0)
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    runpy.run_path(str(script), run_name="__main__")


def run_ranks(child: Path, processes: int, *arguments: str) -> list[Any]:
    """Run ``python child RANK PROCESSES FOLDER arguments...`` for every rank; each leaves RANK.pt in the folder."""
    with tempfile.TemporaryDirectory() as folder:
        run_together(child, [Start([str(rank), str(processes), folder, *arguments]) for rank in range(processes)])
        return [torch.load(Path(folder, f"{rank}.pt")) for rank in range(processes)]


def part() -> None:
    """End the connection while Python runs. What holds it in cycles of references is collected first: threads of it that outlive the
    interpreter end the process with an error, now and then."""
    gc.collect()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
