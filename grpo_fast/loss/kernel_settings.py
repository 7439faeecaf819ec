"""The settings of a LossConfig as the numbers that the operators take."""

from __future__ import annotations

import math

from grpo_fast.loss.config import KL_ESTIMATORS, SURROGATES, LossConfig

__all__ = ["loss_settings"]


def loss_settings(config: LossConfig) -> list[float]:
    """What the kernels need to know of a LossConfig, in the order of config_of() in csrc/loss_settings.h."""
    return [
        float(SURROGATES.index(config.surrogate)),
        float(KL_ESTIMATORS.index(config.kl_estimator)),
        float(config.bias_corrected_kl),
        config.epsilon_low,
        config.epsilon_high,
        math.inf if config.delta is None else config.delta,
        math.inf if config.dual_clip is None else config.dual_clip,
        config.beta,
        config.entropy_coef,
        config.log_ratio_clamp,
        config.sapo_temperature_pos,
        config.sapo_temperature_neg,
    ]
