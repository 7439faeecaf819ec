"""``grpo-fast bench-step``: whole optimizer steps of TRL's GRPOTrainer against those of this package's."""

from grpo_fast.benchmark.step.suite import SUITE
from grpo_fast.cli.bench_command import bench_app

app = bench_app(SUITE)
