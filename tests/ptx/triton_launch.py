"""Triton's launches on CPU tensors: what Triton compiled for sm_90, run by the machine."""

from __future__ import annotations

import contextlib
import functools
import importlib
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import grpo_fast

from .launch import EXACT, Hardware, launch
from .parser import Entry, parse
from .tensors import TensorMemory
from .threads import WARP, Grid

TARGET = GPUTarget("cuda", 90, 32)
TENSORS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float64: "*fp64",
    torch.int64: "*i64", torch.int32: "*i32", torch.bool: "*i1", torch.uint8: "*u8",
}  # fmt: skip
FORMATS = {"i1": "?", "i32": "i", "u32": "I", "i64": "q", "u64": "Q", "fp32": "f", "fp64": "d"}


@dataclass(frozen=True)
class Compiled:
    """A kernel for one set of types and compile-time arguments."""

    text: str
    entry: Entry
    shared_bytes: int


@dataclass
class Launcher:
    """Takes the place of JITFunction.run. What it has launched is counted; `edit` changes the PTX of a kernel, given its name and text."""

    hardware: Hardware = EXACT
    edit: Callable[[str, str], str] | None = None
    launches: int = 0
    instructions: int = 0
    kernels: set[str] = field(default_factory=set)
    variants: set[tuple[Any, ...]] = field(default_factory=set)

    def run(self, kernel: Any, *arguments: Any, grid: Any, warmup: bool = False, **options: Any) -> None:
        """Launch a kernel as Triton does: kernel[grid](*arguments, **options)."""
        names = [parameter.name for parameter in kernel.params]
        given = dict(zip(names, arguments, strict=False)) | {name: value for name, value in options.items() if name in names}
        signature: dict[str, Any] = {}
        constants: dict[tuple[int, ...], Any] = {}
        values: list[tuple[str, str, Any]] = []
        for index, parameter in enumerate(kernel.params):
            value = given[parameter.name]
            signature[parameter.name] = kind = type_of(value, parameter)
            if kind == "constexpr":
                constants[(index,)] = value
            elif isinstance(kind, tuple):
                values += [(parameter.name, each, number) for each, number in zip(kind, value, strict=True)]
            else:
                values.append((parameter.name, kind, value))
        warps = options.get("num_warps", 4)
        key = (kernel.fn.__name__, tuple(signature.items()), tuple(constants.items()), warps)
        compiled = compile_kernel(kernel, key, signature, constants, warps)
        entry = compiled.entry
        if self.edit is not None:
            (entry,) = parse(self.edit(kernel.fn.__name__, compiled.text)).values()
        blocks = grid({}) if callable(grid) else grid
        memory = TensorMemory()
        parameters = packed(memory, values)
        self.instructions += launch(entry, Grid(blocks[0], warps * WARP), memory.memory, parameters, compiled.shared_bytes, self.hardware)
        memory.write_back()
        self.launches += 1
        self.kernels.add(kernel.fn.__name__)
        self.variants.add(key)


def type_of(value: Any, parameter: Any) -> Any:
    """The type of an argument in Triton's signature; of a named tuple, that of each field."""
    if parameter.is_constexpr or value is None:
        return "constexpr"
    if isinstance(value, Tensor):
        return TENSORS[value.dtype]
    if isinstance(value, tuple):
        return type(value)(*["fp32"] * len(value))
    return parameter.annotation_type


COMPILED: dict[tuple[Any, ...], Compiled] = {}


def compile_kernel(
    kernel: Any, key: tuple[Any, ...], signature: dict[str, Any], constants: dict[tuple[int, ...], Any], warps: int
) -> Compiled:
    """Compile to PTX for sm_90, once in a process; Triton's own cache keeps it for the next."""
    if key not in COMPILED:
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs={})
        found = triton.compile(source, target=TARGET, options={"num_warps": warps})
        (entry,) = parse(found.asm["ptx"]).values()
        COMPILED[key] = Compiled(found.asm["ptx"], entry, found.metadata.shared)
    return COMPILED[key]


def packed(memory: TensorMemory, values: list[tuple[str, str, Any]]) -> bytes:
    """The arguments (name, type, value) as a kernel finds them: each aligned to its size."""
    found = b""
    for name, kind, value in values:
        code = "Q" if kind.startswith("*") else FORMATS[kind]
        given = memory.address(value, name) if isinstance(value, Tensor) else value
        found += b"\0" * (-len(found) % struct.calcsize(code)) + struct.pack(code, given)
    return found


def _run(kernel: Any, launcher: Launcher, *arguments: Any, **options: Any) -> None:
    launcher.run(kernel, *arguments, **options)


@contextlib.contextmanager
def triton_on_cpu(launcher: Launcher) -> Iterator[None]:
    """Compute CPU tensors by the Triton kernels, which this launcher runs, inside the ``with``."""
    backends = importlib.import_module("grpo_fast.ops.backends")
    registration = importlib.import_module("grpo_fast.ops.triton_registration")
    if registration.INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET is 1; expected it unset, so that the kernels are compiled. Fix: unset TRITON_INTERPRET")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", functools.partialmethod(_run, launcher))
        patch.setattr(registration, "INTERPRETED", True)
        patch.setattr(backends, "_interpreted", lambda: True)
        backends._triton_usable.cache_clear()
        try:
            with grpo_fast.use_backend("triton"):
                yield
        finally:
            backends._triton_usable.cache_clear()
