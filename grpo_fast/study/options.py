"""Settings of both studies (temperatures and counts), checked before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypedDict

from grpo_fast.utils.errors import SettingsError

__all__ = ["ScheduleConfig", "check_count", "sampling_temperatures", "temperature_name", "training_temperatures"]

ARROW = "->"
LEAST, LARGEST = 1e-3, 1e3  # z/T stays finite and distinguishable in float32 within these; see `_parse_temperature`


class ScheduleConfig(TypedDict, total=False):
    """The argument of `TemperatureSchedule.from_config`."""

    kind: str
    value: float
    start: float
    end: float
    steps: int


def sampling_temperatures(texts: Sequence[object], name: str = "temperatures") -> list[float]:
    """Parse temperatures to sample at: numbers of at least 0, each once.

    Returns:
        The temperatures from cold to hot.

    Raises:
        SettingsError: names the temperature that is wrong.
    """
    expected = "a number of at least 0: 0 is greedy decoding, 0.6 is usual"
    temperatures = [_parse_temperature(name, text, text, expected, greedy=True) for text in texts]
    _check_distinct(name, temperatures)
    return sorted(temperatures)


def training_temperatures(texts: Sequence[object], steps: int, name: str = "temperatures") -> dict[str, ScheduleConfig]:
    """Parse temperatures to train at: ``0.6`` is constant, ``0.6->1.4`` changes linearly over all steps.

    Returns:
        By label, the argument of `TemperatureSchedule.from_config`.

    Raises:
        SettingsError: names the temperature that is wrong.
    """
    expected = "a number above 0, or two as in '0.6->1.4'. Greedy decoding gives a group one completion, and nothing to learn from"
    schedules: dict[str, ScheduleConfig] = {}
    for text in texts:
        ends = [_parse_temperature(name, part, text, expected) for part in str(text).split(ARROW)]
        if len(ends) > 2:
            raise SettingsError(f"{name} has {str(text)!r}; expected {expected}.")
        label = ARROW.join(temperature_name(end) for end in ends)
        _check_distinct(name, [*schedules, label])
        if len(ends) == 1:
            schedules[label] = {"kind": "constant", "value": ends[0]}
        else:  # the last step is at the end temperature
            schedules[label] = {"kind": "linear", "start": ends[0], "end": ends[1], "steps": max(steps - 1, 1)}
    if not schedules:
        raise SettingsError(f"{name} is empty; expected at least one {expected.removeprefix('a ')}.")
    return schedules


def temperature_name(temperature: float) -> str:
    """Return the shortest text that is exactly this temperature; results are stored under it.

    Example:
        >>> temperature_name(1.0), temperature_name(0.60000001)
        ('1', '0.60000001')
    """
    short = f"{temperature:g}"
    return short if float(short) == temperature else repr(temperature)


def check_count(name: str, value: object, hint: str) -> None:
    """Check for a whole number of at least 1.

    Raises:
        SettingsError: it is something else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SettingsError(f"{name} is {value!r}; expected a whole number of at least 1. {hint}")


def _parse_temperature(name: str, text: object, whole: object, expected: str, *, greedy: bool = False) -> float:
    """Parse one temperature; ``whole`` is the text that it is part of.

    Below LEAST only the most likely token is drawn, and z/T soon overflows float32; above LARGEST all tokens are almost equally likely.
    """
    try:
        value = float(str(text))
    except ValueError as error:
        raise SettingsError(f"{name} has {str(whole)!r}; expected {expected}.") from error
    if not 0 <= value < math.inf or (value == 0 and not greedy):
        raise SettingsError(f"{name} has {str(whole)!r}; expected {expected}.")
    if value != 0 and not LEAST <= value <= LARGEST:
        numbers = f"{'0, or ' if greedy else ''}a number from {LEAST:g} to {LARGEST:g}"
        reason = "below, only the most likely token is drawn; above, all tokens are almost equally likely"
        raise SettingsError(f"{name} has {str(whole)!r}; expected {numbers}: {reason}.")
    return abs(value)  # -0.0 is 0


def _check_distinct(name: str, values: Sequence[object]) -> None:
    if not values:
        raise SettingsError(f"{name} is empty; expected at least one, as in --{name} 0 0.6 1.0.")
    twice = next((value for i, value in enumerate(values) if value in values[:i]), None)
    if twice is not None:
        raise SettingsError(f"{name} has {twice} twice; expected each once.")
