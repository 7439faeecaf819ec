"""``python -m grpo_fast.cli``: the same as ``grpo-fast``."""

from grpo_fast.cli.main import start

start()
