"""Times the shapes that launches could have: columns and warps of a Triton program, programs for few rows, blocks and stages of a cluster.

    python bench/gpu_tune.py tune --output gpu.json [--shape 4096x128256]

Every one passes the benchmark's gate first. Nothing is changed by it: the fastest of each step is printed beside what is taken now.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent))

import gpu_bench
from gpu_bench import Implementation, Results, Shape, Timer

SHAPES = ((4096, 128256), (4096, 32000), (256, 128256))
REHEARSAL = ((12, 301),)  # on the CPU
# Columns and warps: 8 to 64 columns for each thread.
PROGRAMS = ((2048, 1), (2048, 2), (2048, 4), (4096, 2), (4096, 4), (4096, 8), (8192, 4), (8192, 8), (8192, 16), (16384, 16))
PER_MULTIPROCESSOR = (1, 2, 4, 8, 16)
# Blocks by stages; a cluster whose rows do not fit is refused.
CLUSTERS = ("1x2", "1x3", "2x3", "2x4", "2x6", "4x3", "4x4", "4x6", "8x3", "8x4", "8x6", "8x8")
NOW = "now"


@contextlib.contextmanager
def launched(**changed: Any) -> Iterator[None]:
    """With other BLOCK, WARPS or PROGRAMS_PER_MULTIPROCESSOR of the Triton launchers."""
    from grpo_fast.kernels import token_logprobs

    with mock.patch.multiple(token_logprobs, **changed):
        yield


@contextlib.contextmanager
def cluster(shape: str) -> Iterator[None]:
    with mock.patch.dict(os.environ, GRPO_FAST_CLUSTER=shape):
        yield


def tune(shapes: list[tuple[int, int]], timer: Timer, device: str, deadline: float, results: Results) -> None:
    kept = [gpu_bench.make_shape(rows, vocabulary, timer, device, deadline, results) for rows, vocabulary in shapes]
    if gpu_bench.by_kernels(device):
        for shape in kept:
            programs(shape, timer, device, deadline, results)
    for shape in kept:  # last: they have never run
        clusters(shape, timer, device, deadline, results)


def programs(shape: Shape, timer: Timer, device: str, deadline: float, results: Results) -> None:
    steps = {step: next(c for c in found if c.name == "ours") for step, found in gpu_bench.forward_implementations(device).items()}
    steps["gradient"] = Implementation("ours", gpu_bench.gradient_alone, 1)
    for step, ours in steps.items():

        def add(launch: str, step: str = step, ours: Implementation = ours) -> None:
            of_launch = dataclasses.replace(shape, entry={**shape.entry, "launch": launch})
            gpu_bench.add(step, ours, of_launch, timer, device, deadline, results)

        add(NOW)
        for block, warps in PROGRAMS:
            with launched(BLOCK=block, WARPS=warps):
                add(f"{block} columns, {warps} warps")
        if shape.entry["rows"] < 1024:
            for each in PER_MULTIPROCESSOR:
                with launched(PROGRAMS_PER_MULTIPROCESSOR=each):
                    add(f"{each} programs per multiprocessor")


def clusters(shape: Shape, timer: Timer, device: str, deadline: float, results: Results) -> None:
    ours = Implementation("ours_cluster", gpu_bench.our_loss("cluster"), 1)
    for each in ("", *CLUSTERS):
        of_launch = dataclasses.replace(shape, entry={**shape.entry, "launch": f"{each} clusters" if each else NOW})
        with cluster(each):
            gpu_bench.add("loss", ours, of_launch, timer, device, deadline, results)


def fastest(entries: list[dict[str, Any]]) -> str:
    """A line for each shape and step: what is taken now, and the fastest; in copies that were timed in turn with each."""
    lines: list[str] = []
    cases: dict[Any, dict[str, float]] = {}
    for entry in entries:
        if "ms" in entry and "launch" in entry:
            case = cases.setdefault((entry["step"], entry["rows"], entry["vocabulary"]), {})
            case[entry["launch"]] = entry["ms"] / entry["copy_ms"]
    for (step, rows, vocabulary), copies in cases.items():
        best = min(copies, key=lambda launch: copies[launch])
        now = f"{copies[NOW]:.3f} copies" if NOW in copies else "no time"
        lines.append(f"{step}, {rows} x {vocabulary}: {now} now, fastest {copies[best]:.3f} with {best}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("tune",))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shape", action="append", help="ROWSxVOCABULARY; may be repeated")
    options = parser.parse_args()
    deadline = time.monotonic() + float(os.environ.get("BUDGET_S", "150"))
    shapes: Any = [tuple(int(n) for n in text.split("x")) for text in options.shape or []]
    shapes = shapes or list(SHAPES if options.device == "cuda" else REHEARSAL)
    results = Results(options.output, "tune", options.device)
    try:
        tune(shapes, Timer(options.device, 15, seconds=0.1), options.device, deadline, results)
    finally:
        print(fastest(results.whole["tune"]))


if __name__ == "__main__":
    main()
