"""``grpo-fast bench-kept``: the head over kept sets against heads that compute the whole vocabulary."""

from grpo_fast.benchmark.kept.suite import SUITE
from grpo_fast.cli.bench_command import bench_app

app = bench_app(SUITE)
