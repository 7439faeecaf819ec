"""The base of every suite's settings: each setting is declared once, with its default, its help text and its bounds."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch

__all__ = ["DTYPES", "BenchmarkSettings", "require", "setting"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def setting(
    default: Any, help: str = "", *, option: str = "", least: int | None = None, choices: tuple[str, ...] = (), parse: Any = None
) -> Any:
    """A field of a settings dataclass.

    Args:
        default: its value unless given. A tuple becomes an option that may be repeated.
        help: text of the command-line option; without it there is no option.
        option: name of the option where it differs from the field's, as "shape" for ``shapes``, and other names that it has, separated by
            spaces. Error messages use the first.
        least: the smallest number that is accepted.
        choices: the names that are accepted.
        parse: turns the text of a repeated option into an element.
    """
    return field(default=default, metadata={"help": help, "option": option, "least": least, "choices": choices, "parse": parse})


def require(ok: bool, name: str, value: object, expected: str) -> None:
    """Raise a ValueError that names the setting, its value and what was expected, unless ``ok``."""
    if not ok:
        raise ValueError(f"{name} is {value!r}; expected {expected}.")


@dataclass(frozen=True, kw_only=True)
class BenchmarkSettings:
    """What every suite is told.

    Raises:
        ValueError: a setting is outside of its bounds; names it, its value and what was expected.
    """

    rounds: int = setting(3, "Repetitions after a warm-up.", least=1)
    threads: int = setting(1, "One thread is timed by its CPU time, several by the wall clock.", least=1)
    seed: int = setting(0)

    def __post_init__(self) -> None:
        for each in fields(self):
            value, least, choices = getattr(self, each.name), each.metadata.get("least"), each.metadata.get("choices")
            name = (each.metadata.get("option") or each.name).split()[0]
            values = value if isinstance(value, tuple) else (value,)
            require(len(values) > 0, name, "empty", f"at least one of {', '.join(choices)}" if choices else "at least one")
            for element in values:
                require(least is None or element >= least, name, element, f"at least {least}")
                require(not choices or element in choices, name, element, f"one of {', '.join(choices or ())}")
            require(len(set(values)) == len(values), name, ", ".join(map(str, values)), f"each {'name' if choices else 'value'} once")

    @property
    def clock(self) -> str:
        """What is reported as the time of a repetition: other processes do not disturb the CPU time of a thread; the CPU time of several
        threads is not the time that passes."""
        return "CPU time of the thread" if self.threads == 1 else "wall time"

    def as_dict(self) -> dict[str, Any]:
        """For the result file."""
        return asdict(self)
