"""``grpo-fast bench-drop-ins``: what the guides replace against what replaces it."""

from __future__ import annotations

from grpo_fast.benchmark.drop_ins import SUITE
from grpo_fast.cli.bench_command import bench_app

__all__ = ["app"]

app = bench_app(SUITE, "runs/bench/drop_ins_cpu.json", "Time what the guides replace against what replaces it. Ten minutes, 8 GiB.")
