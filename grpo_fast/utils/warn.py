"""Warnings that point at the user's line, for any number of this package's functions in between."""

from __future__ import annotations

import sys
import warnings

__all__ = ["warn"]

PACKAGE = "grpo_fast"


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Give a warning, attributed to the nearest caller outside of this package.

    Args:
        message: of the warning.
        category: its class.
    """
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == PACKAGE:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
