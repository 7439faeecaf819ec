"""grpo_fast: the GRPO core, fused."""

__version__ = "0.1.0"
