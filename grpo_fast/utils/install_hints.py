"""How to install what only some commands need."""

from __future__ import annotations

__all__ = ["install"]


def install(*extras: str) -> str:
    """The command that installs these extras of pyproject.toml, for the cure of an error: grpo_fast comes as a checkout.

    Example:
        >>> install("peft", "train")
        "pip install '.[peft,train]' in the checkout of grpo_fast"
    """
    return f"pip install '.[{','.join(extras)}]' in the checkout of grpo_fast"
