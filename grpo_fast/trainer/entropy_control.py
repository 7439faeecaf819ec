"""The adaptive coefficient of the entropy bonus (Skywork-OR1, arXiv:2505.22312, section 3.2.4), with TRL's settings and bounds."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, TypedDict

from grpo_fast.loss.config import LossConfig
from grpo_fast.trainer.metrics import MetricAccumulator

if TYPE_CHECKING:
    from grpo_fast.trainer.config import GRPOConfig

__all__ = ["EntropyControl", "EntropyState"]


class EntropyState(TypedDict):
    """The state of an `EntropyControl`, for checkpoints."""

    coef: float
    entropy: float | None  # of the last step; None before the first


class EntropyControl:
    """The coefficient of the entropy bonus in each step.

    After a step with mean entropy ``e`` the coefficient rises by ``entropy_coef_delta`` if ``e <= entropy_target``, else it falls by as
    much, between ``entropy_coef_min`` and ``entropy_coef_max``. The bonus of the next step has this coefficient if ``e <= entropy_target``,
    and no bonus otherwise; nor has the first step. Without ``use_adaptive_entropy`` it is ``entropy_coef`` in every step.

    Args:
        args: the settings of the run.

    Example:
        >>> from grpo_fast.trainer import GRPOConfig
        >>> args = GRPOConfig("out", use_cpu=True, use_adaptive_entropy=True, entropy_target=0.5, entropy_coef_delta=0.25)
        >>> control = EntropyControl(args)
        >>> control.observe(0.4)
        >>> control.coef
        0.25
        >>> control.observe(0.6)
        >>> control.coef
        0.0
    """

    def __init__(self, args: GRPOConfig) -> None:
        self._args, self.adaptive = args, args.use_adaptive_entropy
        self._coef, self._entropy = args.entropy_coef, math.inf

    @property
    def coef(self) -> float:
        """The coefficient of the bonus in the coming step."""
        return self._coef if not self.adaptive or self._entropy <= self._args.entropy_target else 0.0

    def loss_config(self, config: LossConfig) -> LossConfig:
        """The settings of the loss in the coming step."""
        return dataclasses.replace(config, entropy_coef=self.coef) if self.adaptive else config

    def finish_step(self, metrics: MetricAccumulator) -> None:
        """Adapt the coefficient to the metrics of a step, and add it to them as ``entropy_coef``, if there can be a bonus at all.

        Every process must call it.
        """
        if self.adaptive and (entropy := metrics.read().get("entropy")) is not None:  # None: no token is in the loss
            self.observe(entropy)
        if self.adaptive or self._coef != 0:
            metrics.add_mean("entropy_coef", self._coef)

    def observe(self, entropy: float) -> None:
        """Adapt the coefficient to the mean entropy of a step, in nats per token, over all processes; the same in every process."""
        args = self._args
        step = args.entropy_coef_delta if entropy <= args.entropy_target else -args.entropy_coef_delta
        self._coef, self._entropy = min(max(self._coef + step, args.entropy_coef_min), args.entropy_coef_max), entropy

    def state_dict(self) -> EntropyState | None:
        """The state for a checkpoint; None without ``use_adaptive_entropy``."""
        if not self.adaptive:
            return None
        return {"coef": self._coef, "entropy": self._entropy if math.isfinite(self._entropy) else None}

    def load_state_dict(self, state: EntropyState | None) -> None:
        """Continue from a checkpoint's state; one without a state, of a run whose coefficient was constant, leaves the settings' start."""
        if self.adaptive and state is not None:
            self._coef = min(max(float(state["coef"]), self._args.entropy_coef_min), self._args.entropy_coef_max)
            self._entropy = math.inf if state["entropy"] is None else float(state["entropy"])
