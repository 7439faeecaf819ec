"""The settings of a LossConfig as the numbers that the operators take."""

from __future__ import annotations

import math
from dataclasses import fields

from grpo_fast.loss.config import SURROGATES, LossConfig

__all__ = ["KERNEL_FIELDS", "loss_settings"]

KERNEL_FIELDS = tuple(each for each in fields(LossConfig) if each.metadata.get("kernel"))
_NAMES = tuple((each.name, each.metadata.get("names")) for each in KERNEL_FIELDS)


def loss_settings(config: LossConfig) -> list[float]:
    """The numbers that the kernels take: the surrogate, then the fields of LossConfig that are declared as ``KERNEL``, in their order.

    A name becomes its position, a switch 0 or 1, None infinity. csrc/policy_loss_config.h and kernels/fused/loss_settings.py, which
    tools/generate_loss_settings.py writes from the same declaration, read them in this order.

    Example:
        >>> from grpo_fast.loss.config import LossConfig
        >>> loss_settings(LossConfig(epsilon_high=0.28))[:4]
        [0.0, 0.2, 0.28, inf]
    """
    numbers = [float(SURROGATES.index(config.surrogate))]
    for name, allowed in _NAMES:
        value = getattr(config, name)
        if value is None:
            numbers.append(math.inf)
        else:
            numbers.append(float(allowed.index(value) if allowed else value))
    return numbers
