"""``grpo-fast bench-trl``: the loss stage of TRL's GRPOTrainer against that of this package's subclass."""

from grpo_fast.benchmark.trl_stage import SUITE
from grpo_fast.cli.bench_command import bench_app

app = bench_app(SUITE)
