"""``grpo-fast bench``: the loss over logits against other implementations and a copy of the same bytes."""

from grpo_fast.benchmark.logits.suite import SUITE
from grpo_fast.cli.bench_command import bench_app

app = bench_app(SUITE)
