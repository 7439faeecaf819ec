"""What both studies are asked: temperatures, counts, where the result goes. Checked before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from grpo_fast.utils.errors import SettingsError

__all__ = ["check_count", "name_of", "sampling_temperatures", "training_temperatures"]

ARROW = "->"
LEAST, LARGEST = 1e-3, 1e3  # float32 has room for z/T in between; see `_number`


def sampling_temperatures(texts: Sequence[Any], name: str = "temperatures") -> list[float]:
    """Numbers of at least 0, each once, from cold to hot.

    Raises:
        SettingsError: names the one that is wrong.
    """
    found = [_number(name, text, "a number of at least 0: 0 is greedy decoding, 0.6 is usual", greedy=True) for text in texts]
    return sorted(_each_once(name, found))


def training_temperatures(texts: Sequence[Any], steps: int, name: str = "temperatures") -> dict[str, dict[str, Any]]:
    """By label, what `TemperatureSchedule.from_config` takes: ``0.6`` is constant, ``0.6->1.4`` goes on a straight line over all steps.

    Raises:
        SettingsError: names the one that is wrong.
    """
    expected = "a number above 0, or two as in '0.6->1.4'. Greedy decoding gives a group one completion, and nothing to learn from"
    found: dict[str, dict[str, Any]] = {}
    for text in texts:
        ends = [_number(name, part, expected, whole=text) for part in str(text).split(ARROW)]
        if len(ends) > 2:
            raise SettingsError(f"{name} has {str(text)!r}; expected {expected}.")
        spec: dict[str, Any] = {"kind": "constant", "value": ends[0]}
        if len(ends) == 2:
            spec = {"kind": "linear", "start": ends[0], "end": ends[1], "steps": max(steps - 1, 1)}  # the last step is at the end
        label = ARROW.join(name_of(end) for end in ends)
        _each_once(name, [*found, label])
        found[label] = spec
    if not found:
        raise SettingsError(f"{name} is empty; expected at least one {expected.removeprefix('a ')}.")
    return found


def name_of(temperature: float) -> str:
    """As short as it can be said, and never the name of another: results are kept under it.

    Example:
        >>> name_of(1.0), name_of(0.60000001)
        ('1', '0.60000001')
    """
    short = f"{temperature:g}"
    return short if float(short) == temperature else repr(temperature)


def check_count(name: str, value: Any, cure: str) -> None:
    """A whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SettingsError(f"{name} is {value!r}; expected a whole number of at least 1. {cure}")


def _number(name: str, text: Any, expected: str, *, greedy: bool = False, whole: Any = None) -> float:
    """A temperature. Below LEAST, T would be greedy decoding in all but name, and soon a 0 or an infinite z/T in float32; above LARGEST,
    every token is as likely as every other.
    """
    said = str(text if whole is None else whole)
    try:
        value = float(text)
    except (TypeError, ValueError) as error:
        raise SettingsError(f"{name} has {said!r}; expected {expected}.") from error
    if not 0 <= value < math.inf or (value == 0 and not greedy):
        raise SettingsError(f"{name} has {said!r}; expected {expected}.")
    if value != 0 and not LEAST <= value <= LARGEST:
        beyond = "colder, only the most likely token is drawn; hotter, all tokens alike"
        raise SettingsError(f"{name} has {said!r}; expected {'0, or ' if greedy else ''}a number from {LEAST:g} to {LARGEST:g}: {beyond}.")
    return abs(value)  # -0.0 is 0


def _each_once(name: str, values: Sequence[Any]) -> list[Any]:
    if not values:
        raise SettingsError(f"{name} is empty; expected at least one, as in --{name} 0 0.6 1.0.")
    twice = next((value for i, value in enumerate(values) if value in values[:i]), None)
    if twice is not None:
        raise SettingsError(f"{name} has {twice} twice; expected each once.")
    return list(values)
