"""How to install the packages that only some commands need."""

from __future__ import annotations

import importlib.util

__all__ = ["install", "require_packages"]


def install(*extras: str) -> str:
    """Return the command that installs these extras of pyproject.toml, for error messages: grpo_fast comes as a checkout.

    Example:
        >>> install("peft", "train")
        "pip install '.[peft,train]' in the checkout of grpo_fast"
    """
    return f"pip install '.[{','.join(extras)}]' in the checkout of grpo_fast"


def require_packages(*modules: str, extras: tuple[str, ...], needed_by: str) -> None:
    """Check that optional packages are installed, without importing them.

    Args:
        modules: names of top-level modules.
        extras: extras of pyproject.toml that install them.
        needed_by: what needs them, for the message.

    Raises:
        ImportError: at least one of the modules is not installed; the message says how to install it.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"{needed_by} needs {' and '.join(missing)}, which is not installed. Fix: {install(*extras)}")
