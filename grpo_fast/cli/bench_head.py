"""``grpo-fast bench-head``: the fused head against other implementations and its bare matrix products."""

from __future__ import annotations

from grpo_fast.benchmark.head.suite import SUITE
from grpo_fast.cli.bench_command import bench_app

__all__ = ["app"]

HELP = "Time the loss from hidden states against what you would use instead, and against its bare matrix products. 22 minutes."
app = bench_app(SUITE, "runs/bench/head_cpu.json", HELP)
