"""Truncated sampling in a training study: ``none``, or settings as in ``top_p=0.95,replay_support=false``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from grpo_fast.study.options import ScheduleConfig, training_temperatures
from grpo_fast.utils.errors import SettingsError

__all__ = ["NO_TRUNCATION", "Variant", "training_variants"]

NO_TRUNCATION = "none"
_TYPES = {"top_p": float, "top_k": int, "min_p": float, "replay_support": str}
_EXPECTED = f"'{NO_TRUNCATION}', or some of {', '.join(_TYPES)}, as in 'top_p=0.95' or 'top_p=0.95,replay_support=false'"


class Variant(NamedTuple):
    """How one training of a study samples."""

    schedule: ScheduleConfig  # of the temperature
    truncation: Mapping[str, Any]  # settings of GRPOConfig; empty for whole sampling


def training_variants(temperatures: Sequence[object], truncations: Sequence[object], steps: int) -> dict[str, Variant]:
    """Parse the temperatures and the truncations to train with; each temperature is combined with each truncation.

    Returns:
        By label, as in ``1`` or ``1, top_p=0.95``, how the training samples.

    Raises:
        SettingsError: names the temperature or the truncation that is wrong.
    """
    parsed = [_parse(str(text)) for text in truncations]
    if not parsed:
        raise SettingsError(f"truncations is empty; expected at least one of {_EXPECTED}.")
    twice = next((one for i, one in enumerate(parsed) if one in parsed[:i]), None)
    if twice is not None:
        raise SettingsError(f"truncations has {_name(twice) or NO_TRUNCATION!r} twice; expected each once.")
    schedules = training_temperatures(temperatures, steps)
    return {
        ", ".join(filter(None, (label, _name(truncation)))): Variant(schedule, truncation)
        for label, schedule in schedules.items()
        for truncation in parsed
    }


def _parse(text: str) -> dict[str, float | str]:
    if text.strip() == NO_TRUNCATION:
        return {}
    found: dict[str, float | str] = {}
    for part in text.split(","):
        name, equals, value = (each.strip() for each in part.partition("="))
        if name not in _TYPES or not equals or name in found:
            raise SettingsError(f"truncations has {text!r}; expected {_EXPECTED}.")
        try:
            found[name] = _TYPES[name](value)
        except ValueError as error:
            raise SettingsError(f"truncations has {text!r}; {name} is {value!r}; expected a number.") from error
    return found


def _name(truncation: Mapping[str, float | str]) -> str:
    return ", ".join(f"{name}={value}" for name, value in truncation.items())
