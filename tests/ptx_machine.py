"""A machine that executes on a CPU the PTX that Triton and nvcc generate for sm_90, thread by thread.

It knows barriers, shuffles, predicates, mbarriers that count bytes, bulk copies and ``st.async`` that arrive late and in a random order,
clusters, and the error of approximate instructions. It raises FaultError for an access outside of an allocation, a misaligned access,
shared memory that a bulk copy reads without a fence, and a deadlock; and UnsupportedError for an instruction that it does not know.

What it does not show: races that depend on the order in which stores of other threads become visible (each instruction takes effect at once
and for all), caches, the translation of PTX to machine code, and time.

    entries = parse(ptx)
    memory = GlobalMemory(1 << 20)
    x = memory.allocate(numpy.ones(64, numpy.float32), "x")
    launch(entries["kernel"], Grid(blocks=2, threads=32), memory, struct.pack("Q", x))
"""

from ptx.faults import FaultError, UnsupportedError
from ptx.launch import EXACT, Hardware, launch
from ptx.memory import GlobalMemory
from ptx.parser import Entry, parse
from ptx.threads import Grid

__all__ = ["EXACT", "Entry", "FaultError", "GlobalMemory", "Grid", "Hardware", "UnsupportedError", "launch", "parse"]
