"""The errors of the machine."""

from __future__ import annotations


class FaultError(Exception):
    """The program did what a GPU would not allow, or what has no defined result there."""


class UnsupportedError(Exception):
    """The machine does not know an instruction, or one of its forms. The message names it, and its line in the PTX."""
