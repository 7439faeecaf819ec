"""Times the shapes that launches could have: columns and warps of a Triton program, programs for few rows, blocks and stages of a cluster.

    python bench/gpu_tune.py tune --output gpu.json [--shape 4096x128256]

Every one passes the benchmark's gate first. Nothing is changed by it: the fastest of each step is printed beside what is taken now.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent))

import gpu_bench
from gpu_bench import Contestant, Results, Shape, Timer

SHAPES = ((4096, 128256), (4096, 32000), (256, 128256))
REHEARSAL = ((12, 301),)  # on the CPU
# Columns and warps: 8 to 64 columns for each thread.
PROGRAMS = ((2048, 1), (2048, 2), (2048, 4), (4096, 2), (4096, 4), (4096, 8), (8192, 4), (8192, 8), (8192, 16), (16384, 16))
PER_MULTIPROCESSOR = (1, 2, 4, 8, 16)
# Blocks by stages; a cluster whose rows do not fit is refused.
CLUSTERS = ("1x2", "1x3", "2x3", "2x4", "2x6", "4x3", "4x4", "4x6", "8x3", "8x4", "8x6", "8x8")
NOW = "now"


@contextlib.contextmanager
def launched(**changed: int) -> Iterator[None]:
    """With other BLOCK, WARPS or PROGRAMS_PER_MULTIPROCESSOR of the Triton launchers."""
    from grpo_fast.kernels import token_logprobs

    with mock.patch.multiple(token_logprobs, **changed):
        yield


@contextlib.contextmanager
def cluster(shape: str) -> Iterator[None]:
    with mock.patch.dict(os.environ, GRPO_FAST_CLUSTER=shape):
        yield


def steps(shape: Shape, timer: Timer, device: str) -> dict[str, Callable[[], dict[str, Any]]]:
    """What is timed of the Triton kernels."""
    given, truth = shape.given, shape.truth
    assert given is not None
    found: dict[str, Callable[[], dict[str, Any]]] = {}
    for step, contestants in gpu_bench.forward_contestants(device).items():
        ours = next(c for c in contestants if c.name == "ours")
        found[step] = lambda ours=ours: gpu_bench.measured_forward(ours, given, truth, timer)
    found["gradient"] = lambda: gpu_bench.measured_gradient(given, truth, timer)
    return found


def tune(shapes: list[tuple[int, int]], timer: Timer, device: str, deadline: float, results: Results) -> None:
    for rows, vocabulary in shapes:
        shape = gpu_bench.made(rows, vocabulary, timer, device, deadline, results)
        if shape.given is not None:
            if gpu_bench.by_kernels(device):
                programs(shape, timer, device, deadline, results)
            clusters(shape, timer, device, deadline, results)
    print(fastest(results.whole["tune"]))


def add(step: str, launch: str, work: Callable[[], dict[str, Any]], shape: Shape, device: str, deadline: float, results: Results) -> None:
    given = shape.given
    assert given is not None
    entry = {**shape.entry, "step": step, "name": "ours", "launch": launch}

    def with_bandwidth() -> dict[str, Any]:
        return gpu_bench.with_bandwidth(work(), step, given, shape.copy_ms)

    size = given.logits.numel() * given.logits.element_size()
    results.add(gpu_bench.recorded(entry, with_bandwidth, 2.0 * size, device, deadline))


def programs(shape: Shape, timer: Timer, device: str, deadline: float, results: Results) -> None:
    for step, work in steps(shape, timer, device).items():
        add(step, NOW, work, shape, device, deadline, results)
        for block, warps in PROGRAMS:
            with launched(BLOCK=block, WARPS=warps):
                add(step, f"{block} columns, {warps} warps", work, shape, device, deadline, results)
        if shape.entry["rows"] < 1024:
            for each in PER_MULTIPROCESSOR:
                with launched(PROGRAMS_PER_MULTIPROCESSOR=each):
                    add(step, f"{each} programs per multiprocessor", work, shape, device, deadline, results)


def clusters(shape: Shape, timer: Timer, device: str, deadline: float, results: Results) -> None:
    given = shape.given
    assert given is not None
    ours = Contestant("ours_cluster", gpu_bench.our_loss("cluster"), 1)
    add("loss", NOW, lambda: gpu_bench.measured_loss(ours, given, shape.truth, timer), shape, device, deadline, results)
    for each in CLUSTERS:
        with cluster(each):
            add(
                "loss",
                f"{each} clusters",
                lambda: gpu_bench.measured_loss(ours, given, shape.truth, timer),
                shape,
                device,
                deadline,
                results,
            )


def fastest(entries: list[dict[str, Any]]) -> str:
    """A line for each shape and step: what is taken now, and the fastest."""
    lines, cases = [], {}
    for entry in entries:
        if "ms" in entry and "launch" in entry:
            cases.setdefault((entry["rows"], entry["vocabulary"], entry["step"]), []).append(entry)
    for (rows, vocabulary, step), found in cases.items():
        best = min(found, key=lambda entry: entry["ms"])
        now = next((f"{entry['ms']:.3f} ms" for entry in found if entry["launch"] == NOW), "no time")
        lines.append(f"{step}, {rows} x {vocabulary}: {now} now, fastest {best['ms']:.3f} ms with {best['launch']}")
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
    tune(shapes, Timer(options.device, 15, seconds=0.1), options.device, deadline, Results(options.output, "tune", options.device))


if __name__ == "__main__":
    main()
