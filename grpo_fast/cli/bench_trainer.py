"""``grpo-fast bench-trainer``: the loss stage of GRPOTrainer against itself with an eager loss."""

from grpo_fast.benchmark.trainer_stage import SUITE
from grpo_fast.cli.bench_command import bench_app

app = bench_app(SUITE)
