"""Starts a test's processes and collects what they leave; and how such a process ends."""

from __future__ import annotations

import gc
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from hang import HANG


def run_ranks(child: Path, processes: int, *arguments: str) -> list[Any]:
    """Run ``python child RANK PROCESSES FOLDER arguments...`` for every rank; each leaves RANK.pt in the folder."""
    with tempfile.TemporaryDirectory() as folder:
        started = [
            subprocess.Popen(
                [sys.executable, str(child), str(rank), str(processes), folder, *arguments],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(processes)
        ]
        said = []
        try:
            said = [process.communicate(timeout=HANG)[0] for process in started]
        finally:
            for process in started:
                process.kill()
        assert all(process.returncode == 0 for process in started), "\n".join(said)
        return [torch.load(Path(folder, f"{rank}.pt")) for rank in range(processes)]


def part() -> None:
    """End the connection while Python runs. What holds it in cycles of references is collected first: threads of it that outlive the
    interpreter end the process with an error, now and then."""
    gc.collect()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
