"""The report of ``grpo-fast doctor``: backends, versions and tools of this machine, and for what is missing the cure."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys

import torch
from rich.console import Console
from rich.table import Table

from grpo_fast import __version__, _build, _extension
from grpo_fast.backends import BACKENDS, BackendStatus, backends, cpu_isa, installed_version

_PACKAGES = ("triton", "transformers", "trl", "liger-kernel", "tokenizers", "numpy")


def run(console: Console | None = None) -> int:
    """Print the report.

    Returns:
        the exit code: 0 if at least the reference backend works.
    """
    console = console or Console()
    found = backends()
    console.print(_backend_table(found))
    console.print(_machine_table())
    cures = [(name, status.cure) for name, status in found.items() if not status.usable and status.cure]
    for name, cure in cures:
        console.print(f"[bold]{name}[/bold]: {cure}", highlight=False)
    return 0 if _reference_works() else 1


def _backend_table(found: dict[str, BackendStatus]) -> Table:
    table = Table(title=f"grpo_fast {__version__}: backends", title_justify="left", show_lines=True)
    for heading in ("backend", "usable", "why not", "details"):
        table.add_column(heading, overflow="fold")
    for name in BACKENDS:
        status = found[name]
        details = "\n".join(f"{key}: {value}" for key, value in status.details.items())
        table.add_row(name, "[green]yes[/green]" if status.usable else "[yellow]no[/yellow]", status.why or "-", details)
    return table


def _machine_table() -> Table:
    table = Table(title="machine", title_justify="left")
    table.add_column("what")
    table.add_column("here", overflow="fold")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else f"none visible (torch is built for CUDA {torch.version.cuda})"
    cuda_home, reason = _cuda()
    rows = {
        "python": f"{platform.python_version()} ({sys.executable})",
        "system": f"{platform.system()} {platform.machine()}",
        "torch": f"{torch.__version__} ({torch.__path__[0]})",
        "GPU": gpu if torch.version.cuda or torch.cuda.is_available() else "none: torch is built without CUDA",
        **{package: installed_version(package) or "not installed" for package in _PACKAGES},
        "C++ compiler": _first_line(_build.cxx_compiler()),
        "ninja": installed_version("ninja") or shutil.which("ninja") or "not found",
        "nvcc": _last_line(_build.nvcc()),
        "CUDA half": f"would be built ({reason})" if cuda_home else f"would not be built: {reason}",
        "extension": _extension.status().path or _extension.status().why,
        "instruction set": cpu_isa(),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} logical processors",
        "GRPO_FAST_BUILD": os.environ.get("GRPO_FAST_BUILD", "unset: auto"),
    }
    for what, here in rows.items():
        table.add_row(what, here)
    return table


def _cuda() -> tuple[str | None, str]:
    try:
        return _build.choose_cuda(_build.mode(), torch.version.cuda)
    except (RuntimeError, ValueError) as error:
        return None, str(error)


def _reference_works() -> bool:
    return bool(torch.isfinite(torch.log_softmax(torch.ones(2, 3), dim=-1)).all())


def _version_text(program: str | None) -> list[str]:
    if program is None:
        return ["not found"]
    text = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout.strip()
    return text.splitlines() or [program]


def _first_line(program: str | None) -> str:
    return _version_text(program)[0]


def _last_line(program: str | None) -> str:
    return _version_text(program)[-1]
