"""``python -m grpo_fast``: the same as ``grpo-fast``."""

from grpo_fast.cli.main import start

if __name__ == "__main__":
    start()
