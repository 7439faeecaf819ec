"""``grpo-fast bench-trl``: the loss stage of TRL's GRPOTrainer against that of this package's subclass."""

from __future__ import annotations

from grpo_fast.benchmark.trl_stage import SUITE
from grpo_fast.cli.bench_command import bench_app

__all__ = ["app"]

app = bench_app(SUITE, "runs/bench/trl_cpu.json", "Time the loss stage of TRL's GRPOTrainer against this package's. Seven minutes, 8 GiB.")
