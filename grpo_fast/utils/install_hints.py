"""How to install what only some commands need."""

from __future__ import annotations

__all__ = ["install"]


def install(*extras: str) -> str:
    """The command that installs these extras of pyproject.toml, for the "Fix:" part of an error message; grpo_fast is installed from a checkout.

    Example:
        >>> install("peft", "train")
        "pip install '.[peft,train]' in the checkout of grpo_fast"
    """
    return f"pip install '.[{','.join(extras)}]' in the checkout of grpo_fast"
