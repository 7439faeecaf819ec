"""``grpo-fast bench-head``: the fused head against other implementations and its bare matrix products."""

from grpo_fast.benchmark.head.suite import SUITE
from grpo_fast.cli.bench_command import bench_app

app = bench_app(SUITE)
