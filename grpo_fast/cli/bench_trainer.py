"""``grpo-fast bench-trainer``: the loss stage of GRPOTrainer against itself with an eager loss."""

from __future__ import annotations

from grpo_fast.benchmark.trainer_stage import SUITE
from grpo_fast.cli.bench_command import bench_app

__all__ = ["app"]

app = bench_app(
    SUITE, "runs/bench/trainer_cpu.json", "Time the loss stage of GRPOTrainer against itself with an eager loss. Four minutes, 8 GiB."
)
