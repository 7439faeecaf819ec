"""Conversion of a LossConfig to the numbers that operators take, and back, from the declarations of its fields."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from grpo_fast.loss.config import SURROGATES, LossConfig
from grpo_fast.loss.custom_surrogate import CustomSurrogate

__all__ = ["KERNEL_FIELDS", "config_from_numbers", "config_numbers", "loss_settings"]

_FIELDS = fields(LossConfig)
_ALLOWED: dict[str, tuple[str, ...] | None] = {each.name: each.metadata.get("names") for each in _FIELDS}  # None: the field is a number
KERNEL_FIELDS = tuple(each for each in _FIELDS if each.metadata.get("kernel"))
_SURROGATE = [each.name for each in _FIELDS].index("surrogate")
_KERNEL_NAMES = tuple((each.name, _ALLOWED[each.name]) for each in KERNEL_FIELDS)


def loss_settings(config: LossConfig) -> list[float]:
    """Return the numbers that the kernels take: the surrogate, then the fields of LossConfig that are declared as ``KERNEL``, in order.

    A name becomes its position, a bool 0 or 1, and None infinity. csrc/policy_loss_config.h and kernels/fused/loss_settings.py, which
    tools/generate_loss_settings.py writes from the same declaration, read them in this order.

    Example:
        >>> from grpo_fast.loss.config import LossConfig
        >>> loss_settings(LossConfig(epsilon_high=0.28))[:4]
        [0.0, 0.2, 0.28, inf]
    """
    return [float(SURROGATES.index(config.surrogate)), *_numbers(config, _KERNEL_NAMES, none=math.inf)]


def config_numbers(config: LossConfig) -> list[float]:
    """Return all fields of a LossConfig as numbers, for an operator that needs all of them. A name becomes its position, a bool 0 or 1, a
    custom surrogate its number, and None NaN.

    Example:
        >>> from grpo_fast.loss.config import LossConfig
        >>> config_from_numbers(config_numbers(LossConfig(loss_type="gspo"))).loss_type
        'gspo'
    """
    return _numbers(config, tuple(_ALLOWED.items()), none=math.nan)


def config_from_numbers(numbers: Sequence[float]) -> LossConfig:
    """Return the LossConfig whose ``config_numbers`` are given."""
    settings = tuple(None if math.isnan(x) else x for x in numbers)
    if (number := settings[_SURROGATE]) is not None:  # not cached: the function must not outlive the configurations that hold it
        return LossConfig(**_settings(settings), surrogate=CustomSurrogate.numbered(number).function)
    return _config_from_numbers(settings)


def _numbers(config: LossConfig, names: tuple[tuple[str, tuple[str, ...] | None], ...], *, none: float) -> list[float]:
    """Convert the named fields. One loop without helper functions, because it runs in every call of grpo_loss."""
    numbers = []
    for name, allowed in names:
        value = getattr(config, name)
        if name == "surrogate":
            value = None if config.custom is None else config.custom.number
        if value is None:
            numbers.append(none)
        else:
            numbers.append(float(value if allowed is None else allowed.index(value)))
    return numbers


@functools.cache
def _config_from_numbers(numbers: tuple[float | None, ...]) -> LossConfig:
    return LossConfig(**_settings(numbers))


def _settings(numbers: tuple[float | None, ...]) -> dict[str, Any]:
    """Return all settings except the surrogate."""
    settings: dict[str, Any] = {}
    for each, value in zip(_FIELDS, numbers, strict=True):
        allowed = _ALLOWED[each.name]
        if each.name == "surrogate":
            continue
        if value is None:
            settings[each.name] = None
        elif allowed is not None:
            settings[each.name] = allowed[int(value)]
        else:
            kind = str(each.type).removesuffix(" | None")
            settings[each.name] = bool(value) if kind == "bool" else int(value) if kind == "int" else value
    return settings
