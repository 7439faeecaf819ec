"""The report of ``grpo-fast doctor``: backends, versions and tools of this machine, and how to install what is missing."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys

import torch
from rich.console import Console
from rich.table import Table

from grpo_fast.ops import build, extension
from grpo_fast.ops.backends import BACKENDS, BackendStatus, backends, cpu_isa, installed_version
from grpo_fast.ops.executed import EXECUTED, NEVER
from grpo_fast.utils.install_hints import install
from grpo_fast.utils.redaction import redact_text
from grpo_fast.version import __version__

_PACKAGES = ("triton", "trl", "liger-kernel", "numpy")
_OPTIONAL = {  # package -> what needs it, the extra of this package that installs it ("": none does)
    "transformers": ("grpo-fast train, demo: models and the trainer", "train"),
    "accelerate": ("grpo-fast train: devices and processes", "train"),
    "datasets": ("grpo-fast train: rows", "train"),
    "griffelib": ("grpo-fast train --help: the meanings of the settings", "train"),
    "peft": ("--use_peft: LoRA", "peft"),
    "math-verify": ("--rewards math", "math"),
    "reasoning-gym": ("--dataset reasoning_gym:TASK", "tasks"),
    "matplotlib": ("grpo-fast plot, demo, bench: figures", "plot"),
    "flash-attn": ("attention without padding, on a GPU", ""),
    "vllm": ("--sampler vllm: weights from GPU to GPU; without it, through a folder", ""),
}


def run(console: Console | None = None) -> int:
    """Print the report.

    Returns:
        the exit code: 0 if at least the reference backend works.
    """
    console = console or Console()
    found = backends()
    console.print(_backend_table(found))
    console.print(_machine_table())
    console.print(_executed_table())
    console.print(_optional_table())
    fixes = [f"{name}: {status.fix}" for name, status in found.items() if not status.usable and status.fix]
    extras = sorted({extra for package, (_, extra) in _OPTIONAL.items() if extra and installed_version(package) is None})
    if extras:
        fixes.append(f"packages: {install(*extras)}")
    for fix in fixes:
        console.print(redact_text(fix), highlight=False, markup=False)
    return 0 if _reference_works() else 1


def _backend_table(found: dict[str, BackendStatus]) -> Table:
    table = Table(title=f"grpo_fast {__version__}: backends", title_justify="left", show_lines=True)
    for heading in ("backend", "usable", "why not", "details"):
        table.add_column(heading, overflow="fold")
    for name in BACKENDS:
        status = found[name]
        details = "\n".join(f"{key}: {value}" for key, value in status.details.items())
        table.add_row(
            name, "[green]yes[/green]" if status.usable else "[yellow]no[/yellow]", redact_text(status.why or "-"), redact_text(details)
        )
    return table


def _executed_table() -> Table:
    table = Table(title="GPU kernels: where this version was executed", title_justify="left")
    for heading in ("kernels", "for", "compiled", "executed without the GPU", "on hardware"):
        table.add_column(heading, overflow="fold")
    for each in EXECUTED:
        hardware = f"[yellow]{NEVER}[/yellow]" if each.hardware == NEVER else each.hardware
        table.add_row(each.kernels, each.target, each.compiled, each.executed, hardware)
    return table


def _optional_table() -> Table:
    table = Table(title="packages for training, rewards and figures", title_justify="left")
    for heading in ("package", "version", "what needs it"):
        table.add_column(heading, overflow="fold")
    for package, (purpose, extra) in _OPTIONAL.items():
        missing = "[yellow]not installed[/yellow]" if extra else "not installed"
        table.add_row(package, installed_version(package) or missing, purpose)
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
        "C++ compiler": _first_line(build.cxx_compiler()),
        "ninja": installed_version("ninja") or shutil.which("ninja") or "not found",
        "nvcc": _last_line(build.nvcc()),
        "CUDA half": f"would be built ({reason})" if cuda_home else f"would not be built: {reason}",
        "extension": extension.status().path or extension.status().why,
        "instruction set": cpu_isa(),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} logical processors",
        "GRPO_FAST_BUILD": os.environ.get("GRPO_FAST_BUILD", "unset: auto"),
    }
    for what, here in rows.items():
        table.add_row(what, redact_text(here))
    return table


def _cuda() -> tuple[str | None, str]:
    try:
        return build.choose_cuda(build.mode(), torch.version.cuda)
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
