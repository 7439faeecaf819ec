"""A demonstration that learns: a small language model with bad habits, cured by GRPO in about a minute on one core.

`grpo.py` is the loop, written to be copied; the rest is the stage it plays on: a task, a model, an evaluation, a report.
"""

from __future__ import annotations

import importlib.util

from grpo_fast.utils.install_hints import install

__all__ = ["need"]


def need(*modules: str, extras: tuple[str, ...] = ("demo",)) -> None:
    """Raise the ImportError that says what to install, if one of these optional modules, which the extras hold, is missing."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"The demo needs {' and '.join(missing)}, which is not installed. Cure: {install(*extras)}")
