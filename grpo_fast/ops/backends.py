"""Selection of the backend that computes a call, forcing one, and the status of each backend on this machine."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from grpo_fast.ops import extension
from grpo_fast.ops.switch import Switch
from grpo_fast.utils.warn import warn

__all__ = ["BACKENDS", "BackendStatus", "backends", "forced", "select", "use_backend"]

BACKENDS = ("reference", "cpu", "triton")
_ISA_NAMES = {0: "portable C++", 1: "AVX2", 2: "AVX-512"}

# A module global and not a context variable: torch.compile guards on it, so that a compiled function follows use_backend.
_forced: str | None = None
_warned: set[str] = set()


@dataclass(frozen=True)
class BackendStatus:
    """Whether one backend is usable on this machine, and if not, why."""

    name: str
    usable: bool
    why: str = ""  # the reason why it is not usable; empty if it is usable
    fix: str = ""  # how to make it usable
    details: Mapping[str, str] = field(default_factory=dict)  # versions, instruction set, files

    @property
    def cure(self) -> str:
        """The same as ``fix``."""
        return self.fix


class use_backend(Switch[str | None]):  # noqa: N801  (a function to its callers, like torch.set_grad_enabled)
    """Force one backend for all following calls, in every thread of the process.

    The call takes effect immediately. As a statement it holds until the next call; in a ``with`` it holds until the end of the block. As a
    decorator it holds while the function runs. It can be nested.

    Args:
        name: ``"reference"`` (plain PyTorch, any device), ``"cpu"`` (C++) or ``"triton"`` (GPUs; on CPU tensors Triton's interpreter), or
            None for the default, chosen by device.

    Raises:
        ValueError: no backend of that name.
        RuntimeError: the backend is not usable here; the message says why and how to fix it.

    Example:
        >>> with use_backend("reference"):
        ...     select(torch.device("cpu"))
        'reference'
    """

    def __init__(self, name: str | None) -> None:
        if name is not None and name not in BACKENDS:
            raise ValueError(f"use_backend: name is {name!r}; expected one of {', '.join(BACKENDS)}, or None for the default.")
        if name is not None and not (status := _status(name)).usable:
            raise RuntimeError(f"use_backend: the backend {name!r} is not usable here: {status.why}. {status.fix}")
        super().__init__(name)

    @staticmethod
    def current() -> str | None:
        return _forced

    @staticmethod
    def put(value: str | None) -> None:
        _force(value)


def _force(name: str | None) -> None:
    """Make ``name`` the forced backend; if it is "triton", register Triton's interpreter for CPU tensors."""
    global _forced
    _forced = name
    if triton_ops := sys.modules.get("grpo_fast.ops.triton_registration"):
        triton_ops.interpret_on_cpu(name == "triton")


def forced() -> str | None:
    """Return the backend that use_backend forces; None outside of it."""
    return _forced


def backends() -> dict[str, BackendStatus]:
    """Return the status of every backend on this machine: whether it is usable, and if not, the reason and the fix.

    Where the C++ extension is compiled at first use, this call compiles it.

    Returns:
        ``{name: BackendStatus}`` for the names ``"reference"``, ``"cpu"`` and ``"triton"``.

    Example:
        >>> backends()["reference"].usable
        True
    """
    return {name: _status(name) for name in BACKENDS}


def select(device: torch.device) -> str:
    """Return the backend that computes on tensors of ``device``: the forced one, else the fastest usable one.

    May be called inside ``torch.compile(fullgraph=True)``.

    Raises:
        RuntimeError: the forced backend cannot work on this device.
    """
    if _forced is None:
        return _default(device.type)
    if _forced == "cpu" and device.type != "cpu":
        raise RuntimeError(
            f"use_backend('cpu') is active, but the tensors are on {device}; expected CPU tensors. "
            "Move them with .cpu(), or force 'reference', which works on every device."
        )
    if _forced == "triton" and device.type == "cpu" and not _interpreted():
        raise RuntimeError(
            "use_backend('triton') is active, but the tensors are on the CPU; expected GPU tensors. "
            "Move them there; or, to run the kernels in Triton's interpreter, set TRITON_INTERPRET=1 before Python starts."
        )
    return _forced


def _default(device_type: str) -> str:
    """Return the default backend of a device type. It never changes within a process, so torch.compile may evaluate it while tracing."""
    preferred = {"cpu": "cpu", "cuda": "triton", "xpu": "triton"}.get(device_type, "reference")
    if preferred == "reference":
        return "reference"
    usable, why, fix = _usable(preferred)
    if usable:
        return preferred
    _warn_once(
        preferred,
        f"the {preferred!r} backend is not usable: {why}. {fix} Tensors on {device_type!r} are computed by the reference backend "
        "(plain PyTorch), which is correct but slow and takes more memory.",
    )
    return "reference"


# The effect of torch.compiler.assume_constant_result, without importing torch._dynamo, which takes seconds.
_default._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _usable(name: str) -> tuple[bool, str, str]:
    """Return ``(usable, why not, fix)`` of one backend. It runs while torch.compile traces, so it must not call an operator."""
    if name == "cpu" and not extension.load():
        status = extension.status()
        return False, status.why, status.fix
    if name == "triton":
        return _triton_usable()
    return True, "", ""


@functools.cache
def _triton_usable() -> tuple[bool, str, str]:
    """Return ``(usable, why not, fix)`` of Triton, and register its kernels if it is usable."""
    if importlib.util.find_spec("triton") is None:
        return False, "triton is not installed", "Install it: pip install triton (PyTorch's own builds for GPUs bring it)."
    if not _interpreted() and not torch.cuda.is_available() and not torch.xpu.is_available():
        fix = "Use 'reference' or 'cpu'; or, to try the kernels in Triton's interpreter, set TRITON_INTERPRET=1 before Python starts."
        return False, "there is no GPU that PyTorch can use", fix
    try:
        importlib.import_module("grpo_fast.ops.triton_registration")
    except Exception as error:  # a Triton that is incompatible with this PyTorch raises errors of many types
        return False, f"its kernels could not be loaded: {type(error).__name__}: {error}", "Install the triton that this torch asks for."
    return True, "", ""


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _status(name: str) -> BackendStatus:
    usable, why, fix = _usable(name)
    details: dict[str, str] = {"torch": torch.__version__}
    if name == "cpu" and usable:
        details |= {"instruction set": cpu_isa(), "threads": str(torch.get_num_threads()), "library": extension.status().path}
    if name == "triton":
        details["triton"] = installed_version("triton") or "not installed"
    return BackendStatus(name=name, usable=usable, why=why, fix=fix, details=details)


def cpu_isa() -> str:
    """Return the name of the instruction set that the C++ kernels use on this machine."""
    if not extension.status().loaded:
        return "none: the extension is not loaded"
    try:
        isa = int(torch.ops.grpo_fast.cpu_isa())
    except (AttributeError, RuntimeError):  # an extension without the operator
        return f"unknown ({platform.machine()})"
    return _ISA_NAMES.get(isa, f"number {isa}")


def installed_version(package: str) -> str | None:
    """Return the version of an installed distribution without importing it; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _warn_once(key: str, text: str) -> None:
    if key not in _warned:
        _warned.add(key)
        warn(f"grpo_fast: {text}", RuntimeWarning)
