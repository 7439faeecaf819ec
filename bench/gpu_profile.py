"""One call of NVIDIA's `ncu` for each kernel: memory throughput, issue slots, special functions and what warps wait for.

    python bench/gpu_profile.py profile --output gpu.json

The clocks are left as they are (`--clock-control none`), as in the benchmark. Where ncu is missing, or may not read the counters, the
entries say so. Nothing can be profiled on the CPU: a rehearsal records that too.
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from gpu_measure import Results, run_case

SHAPE = (4096, 128256)
KERNELS = {  # the kernel's name in ncu -> the call that launches it
    "_token_sums_kernel": "triton",
    "_token_gradient_kernel": "triton",
    "_grpo_loss_terms_kernel": "triton",
    "_grpo_loss_total_kernel": "triton",
    "cluster_kernel": "cluster",
}
STALLS = ("long_scoreboard", "math_pipe_throttle", "mio_throttle", "lg_throttle", "barrier", "wait", "not_selected")
METRICS = {
    "ms": "gpu__time_duration.sum",
    "dram_percent": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "issue_percent": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "xu_percent": "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active",
    "occupancy_percent": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "registers": "launch__registers_per_thread",
    **{f"stall_{name}": f"smsp__average_warps_issue_stalled_{name}_per_issue_active.ratio" for name in STALLS},
}
TO_MILLISECONDS = {"ns": 1e-6, "us": 1e-3, "usecond": 1e-3, "nsecond": 1e-6, "ms": 1.0, "msecond": 1.0, "s": 1e3, "second": 1e3}


def command(ncu: str, kernel: str) -> list[str]:
    """The second launch of the kernel: the first one compiles."""
    return [
        *(ncu, "--csv", "--page", "raw", "--clock-control", "none", "--kernel-name", f"regex:{kernel}"),
        *("--launch-skip", "1", "--launch-count", "1", "--metrics", ",".join(METRICS.values())),
        *(sys.executable, str(Path(__file__)), "call", "--impl", KERNELS[kernel]),
    ]


def parse(output: str) -> dict[str, float]:
    """The metrics from what ncu prints: a row of names, a row of units, a row of values."""
    lines = [line for line in output.splitlines() if line.startswith('"')]
    rows = list(csv.reader(lines))
    if len(rows) < 3:
        raise RuntimeError(f"ncu printed no values: {output[-400:]}")
    names, units, values = rows[0], rows[1], rows[2]
    found = {}
    for name, metric in METRICS.items():
        if metric in names and values[at := names.index(metric)]:
            found[name] = float(values[at].replace(",", "")) * (TO_MILLISECONDS.get(units[at], 1.0) if name == "ms" else 1.0)
    return found


def profile(kernel: str, seconds: float) -> dict[str, Any]:
    ncu = shutil.which("ncu")
    if ncu is None:
        return {"skipped": "ncu is not installed"}
    done = subprocess.run(command(ncu, kernel), capture_output=True, text=True, timeout=seconds, check=False)
    return dict(parse(done.stdout + done.stderr))


def call(impl: str) -> None:
    """Loss and gradient, three times."""
    import gpu_bench
    import torch

    given = gpu_bench.case(*SHAPE, "cuda")
    leaf, loss = given.logits.detach().requires_grad_(), gpu_bench.our_loss(impl)
    for _ in range(3):
        torch.autograd.grad(loss(leaf, given.ids, given.advantages, given.old), leaf)
    torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("profile", "call"))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--impl", choices=("triton", "cluster"), default="triton")
    options = parser.parse_args()
    if options.part == "call":
        call(options.impl)
        return
    deadline = time.monotonic() + float(os.environ.get("BUDGET_S", "90"))
    results = Results(options.output, "profile", options.device)
    rows, vocabulary = SHAPE
    for kernel in KERNELS:
        entry = {"name": kernel, "rows": rows, "vocabulary": vocabulary, "dtype": "bfloat16"}
        if results.has(entry):
            continue
        if options.device != "cuda":
            results.add({**entry, "skipped": "ncu measures GPUs only"})
            continue
        results.add(run_case(entry, lambda kernel=kernel: profile(kernel, max(10.0, deadline - time.monotonic())), 0, "cuda", deadline))  # type: ignore[misc]


if __name__ == "__main__":
    main()
