"""What the GPU kernels were compiled for, and where they were executed: the only place that states it.

``grpo-fast doctor`` prints it and kernels/README.md repeats it, which a test compares.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["EXECUTED", "NEVER", "Executed", "markdown"]

NEVER = "never"
_INTERPRETER, _HOST, _PTX = "source, in Triton's interpreter", "source, compiled for the CPU", "PTX, by a program on the CPU"


@dataclass(frozen=True)
class Executed:
    """One kind of kernel for one kind of GPU."""

    kernels: str
    target: str
    compiled: str  # by the tests: to machine code, or not
    executed: str  # by the tests, without the GPU
    hardware: str  # the devices on which the tests passed; NEVER if there was none


EXECUTED = (
    Executed("Triton", "NVIDIA sm_90", "to machine code", f"{_INTERPRETER}; {_PTX}", NEVER),
    Executed("Triton", "NVIDIA sm_80, sm_100", "to machine code", _INTERPRETER, NEVER),
    Executed("Triton", "AMD gfx942", "to machine code", _INTERPRETER, NEVER),
    Executed("Triton", "Intel XPU", "no: Triton's own packages have no compiler for it", _INTERPRETER, NEVER),
    Executed("CUDA: cluster kernel, group_advantages", "NVIDIA sm_90", "to machine code, where nvcc is", f"{_HOST}; {_PTX}", NEVER),
)


def markdown() -> str:
    """The table of kernels/README.md."""
    lines = ["| kernels | for | compiled | executed without the GPU | on hardware |", "|---|---|---|---|---|"]
    lines += [f"| {each.kernels} | {each.target} | {each.compiled} | {each.executed} | {each.hardware} |" for each in EXECUTED]
    return "\n".join(lines)
