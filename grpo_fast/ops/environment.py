"""The description of this machine that every result file and figure contains."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from grpo_fast.ops.backends import backends, cpu_isa, installed_version
from grpo_fast.version import __version__

__all__ = ["available_memory", "cache_bytes", "caption", "describe", "load_average"]

ASSUMED_CACHE = 64 << 20


def describe() -> dict[str, Any]:
    """Return the properties of this machine that a measured time depends on."""
    backends()  # loads the extension, if it can be loaded
    return {
        "cpu": _cpu_model(),
        "logical_cpus": _usable_cpus(),
        "isa": cpu_isa(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "largest_cache_bytes": cache_bytes(),
        "memory_bytes": _meminfo("MemTotal"),
        "huge_pages": _first_line(Path("/sys/kernel/mm/transparent_hugepage/enabled")),
        "kernel": f"{platform.system()} {platform.release()}",
        "libc": " ".join(platform.libc_ver()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "trl": installed_version("trl"),
        "grpo_fast": __version__,
        "commit": _commit(),
    }


def caption(machine: dict[str, Any], threads: int) -> str:
    """Return one line that describes the machine, for a figure or a table."""
    memory = machine["memory_bytes"]
    size = f", {memory / 2**30:.0f} GiB" if memory else ""
    plural = "" if threads == 1 else "s"
    return (
        f"{machine['cpu']} ({machine['isa']}, {machine['logical_cpus']} CPUs{size}), {threads} thread{plural}, "
        f"torch {machine['torch']}, grpo_fast {machine['grpo_fast']}"
    )


def cache_bytes() -> int:
    """Return the size of the largest cache in bytes; ASSUMED_CACHE where the system does not report it."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        if text[:-1].isdigit() and text[-1] in "KMG":
            sizes.append(int(text[:-1]) << {"K": 10, "M": 20, "G": 30}[text[-1]])
    return max(sizes, default=ASSUMED_CACHE)


def available_memory() -> int | None:
    """Return the bytes that can be allocated without swapping; None where the system does not report them."""
    return _meminfo("MemAvailable")


def load_average() -> float | None:
    """Return the load average of the last minute, which shows whether other programs were running."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _commit() -> str | None:
    """Return the commit of this checkout, with "-dirty" if files were changed; None for an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or a checkout owned by another user
        return None


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _usable_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _meminfo(field: str) -> int | None:
    for line in (_first_line(Path("/proc/meminfo"), whole=True) or "").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) << 10
    return None


def _first_line(path: Path, *, whole: bool = False) -> str | None:
    try:
        text = path.read_text()
    except OSError:
        return None
    return text if whole else text.splitlines()[0] if text else None
