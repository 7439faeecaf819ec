"""The table of the instructions. A builder prepares an instruction: it returns a function that executes it for the selected threads."""

from __future__ import annotations

from collections.abc import Callable

from .faults import UnsupportedError
from .parser import Instruction
from .threads import Threads
from .values import Selection

Action = Callable[[Selection], None]
Builder = Callable[[Threads, Instruction], Action]
BUILDERS: dict[str, Builder] = {}


def builds(*names: str) -> Callable[[Builder], Builder]:
    """Register a builder for instructions of these names."""

    def register(builder: Builder) -> Builder:
        BUILDERS.update(dict.fromkeys(names, builder))
        return builder

    return register


def refused(instruction: Instruction) -> UnsupportedError:
    """The error for an instruction, or a form of one, that the machine does not know."""
    return UnsupportedError(f"instruction '{instruction.text}'")


def only(instruction: Instruction, *known: str) -> None:
    """Refuse an instruction with another modifier than these and its type."""
    if set(instruction.modifiers[:-1]) - set(known):
        raise refused(instruction)
