"""``grpo-fast bench``: the loss over logits against other implementations and a copy of the same bytes."""

from __future__ import annotations

from grpo_fast.benchmark.logits.suite import SUITE
from grpo_fast.cli.bench_command import bench_app

__all__ = ["app"]

HELP = "Time the loss against what you would use instead, and against a copy of the same bytes. About five minutes."
app = bench_app(SUITE, "runs/bench/cpu.json", HELP)
