"""``grpo-fast bench-drop-ins``: what the guides replace against what replaces it."""

from grpo_fast.benchmark.drop_ins import SUITE
from grpo_fast.cli.bench_command import bench_app

app = bench_app(SUITE)
