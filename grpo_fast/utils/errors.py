"""Exceptions that several packages raise."""

from __future__ import annotations

__all__ = ["SettingsError"]


class SettingsError(ValueError):
    """A setting of a command is unknown, missing, or of the wrong type. The message says where it was set, what was expected, the fix."""
