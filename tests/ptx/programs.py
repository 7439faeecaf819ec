"""Programs written by hand for the tests of the machine: a body with an input and an output."""

from __future__ import annotations

import struct
from typing import Any

from numpy.typing import NDArray

from .launch import Hardware, launch
from .memory import GlobalMemory
from .parser import parse
from .threads import Grid

Array = NDArray[Any]
THREADS = 64

HEADER = """
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 dynamic[];
.visible .entry kernel(
    .param .u64 .ptr .global .align 1 input,
    .param .u64 .ptr .global .align 1 output
)
{
    .reg .pred %p<10>; .reg .b16 %h<20>; .reg .b32 %r<30>; .reg .f32 %f<30>; .reg .b64 %d<30>; .reg .f64 %g<30>;
    mov.u32 %r0, %tid.x;       // the thread, among all of the launch in %r1
    mov.u32 %r1, %ctaid.x;
    mad.lo.s32 %r1, %r1, {threads}, %r0;
    ld.param.u64 %d0, [input];
    ld.param.u64 %d1, [output];
"""


def run(
    body: str, given: Array, found: Array, *, threads: int = THREADS, blocks: int = 1, cluster: int = 1, shared: int = 1024, **hardware: Any
) -> Array:
    """Execute a body for the input; returns the output, which is `found` before."""
    text = HEADER.replace("{threads}", str(threads)) + body + "\n    ret;\n}\n"
    memory = GlobalMemory(1 << 16)
    addresses = memory.allocate(given, "input"), memory.allocate(found, "output")
    parameters = struct.pack("QQ", *addresses)
    launch(parse(text)["kernel"], Grid(blocks, threads, cluster), memory, parameters, shared, Hardware(**{"error": 0.0, **hardware}))
    return memory.read(addresses[1], found)
