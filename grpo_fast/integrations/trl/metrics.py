"""TRL's metrics of a micro-batch, kept as tensors on the device until they are logged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_fast.loss.api import GRPOOutput
from grpo_fast.loss.config import LossConfig
from grpo_fast.loss.importance import vespo_phi
from grpo_fast.loss.logprob_loss import kl_penalty
from grpo_fast.loss.sequences import Sequences

__all__ = ["Metric", "MetricBatch", "MicroBatchMetrics", "append_reduced"]


class Metric(NamedTuple):
    """A metric, and how the values of several processes are reduced: mean (of a sum and a count), min, max, or average."""

    name: str
    reduction: str

    @property
    def size(self) -> int:
        """The number of its values in each process."""
        return 2 if self.reduction == "mean" else 1


MetricBatch = tuple[tuple[Metric, ...], Tensor]  # the metrics of a micro-batch, and their values, one metric's after the other's


class MicroBatchMetrics:
    """Collects the metrics of a micro-batch under TRL's names; nothing is read from the device.

    Args:
        out: of the loss.
        mask: [B, T].
        advantages: [B] or [B, T].
        old: old log-probabilities [B, T]; None = on-policy.
    """

    def __init__(self, out: GRPOOutput, mask: Tensor, advantages: Tensor, old: Tensor | None, config: LossConfig) -> None:
        self.out, self.config = out, config
        self.computed = out.active
        self.mask = mask != 0
        self.advantages = advantages.unsqueeze(1) if advantages.dim() == 1 else advantages
        log_ratio = torch.zeros_like(out.logprobs) if old is None else torch.where(self.computed, out.logprobs - old, 0)
        self.log_ratio = log_ratio  # [B, T]
        if config.level == "sequence":  # [B, 1], as TRL has it
            log_ratio = log_ratio.sum(-1, keepdim=True) / self.mask.sum(-1, keepdim=True).clamp(min=1)
        self.ratio = log_ratio.clamp(-config.log_ratio_clamp, config.log_ratio_clamp).exp()
        self.count = self.computed.sum().float()
        self.entropy_sum = out.entropy.sum()
        self.metrics: list[Metric] = []
        self.values: list[Tensor] = []

    def add(self, name: str, reduction: str, *values: Tensor) -> None:
        """Add a metric; for "mean" values are a sum and a count."""
        self.metrics.append(Metric(name, reduction))
        self.values += [value.float() for value in values]

    def batch(self) -> MetricBatch:
        """Return all metrics in one tensor."""
        return tuple(self.metrics), torch.stack(self.values)

    @torch.no_grad()
    def add_policy_loss(self, entropy_coef: float, accumulation_steps: int) -> None:
        """Add the loss without the entropy bonus. TRL logs it before the division by the accumulation steps, except where num_items takes
        the place of that division."""
        bonus = entropy_coef * self.entropy_sum / self.count.clamp(min=1)
        by_items = self.config.resolved_aggregation == "global_token_mean"
        self.add("policy_loss", "average", (self.out.loss + bonus / accumulation_steps) * (1 if by_items else accumulation_steps))

    @torch.no_grad()
    def add_all(self, ref: Tensor | None, rollout_weights: Tensor | None) -> None:
        """Add every metric that TRL logs with these settings; both tensors [B, T]."""
        config, ratio, advantages = self.config, self.ratio, self.advantages
        if config.beta != 0 and ref is not None:
            kl = kl_penalty(self.out.logprobs, ref, config.kl_estimator, config.log_ratio_clamp)
            self._add_mean("kl", kl * ratio if config.bias_corrected_kl else kl)
        self.add("entropy", "mean", self.entropy_sum, self.count)
        if config.surrogate == "clip":
            low = (ratio < 1 - config.epsilon_low) & (advantages < 0)
            high = (ratio > 1 + config.epsilon_high) & (advantages > 0)
            for name, clipped in (("low", low), ("high", high), ("region", low | high)):
                self._add_mean(f"clip_ratio/{name}_mean", clipped.float())
            self.add("clip_ratio/low_min", "min", self._mean_per_sequence(low.float()).nan_to_num(nan=math.inf).amin())
            self.add("clip_ratio/high_max", "max", self._mean_per_sequence(high.float()).nan_to_num(nan=-math.inf).amax())
        elif config.surrogate == "cispo":
            self._add_mean("cispo_clip_ratio", ((ratio > config.epsilon_high) & (advantages > 0)).float())
        elif config.surrogate == "vespo":
            log_rollout = None
            if rollout_weights is not None:
                logs = torch.where(self.mask, rollout_weights, 1).log().clamp(math.log(1e-8), config.log_ratio_clamp)
                log_rollout = logs.sum(-1, keepdim=True)
            self._add_mean("vespo/phi_seq_mean", vespo_phi(self.log_ratio, advantages, log_rollout, Sequences(self.computed), config))

    def _add_mean(self, name: str, x: Tensor) -> None:
        if x.shape[1] == 1:  # one number per sequence
            self.add(name, "mean", x.sum(), torch.full_like(self.count, x.shape[0]))
        else:
            self.add(name, "mean", torch.where(self.mask, x, 0).sum(), self.mask.sum())

    def _mean_per_sequence(self, x: Tensor) -> Tensor:
        return x.squeeze(1) if x.shape[1] == 1 else torch.where(self.mask, x, 0).sum(-1) / self.mask.sum(-1)


def append_reduced(metrics: tuple[Metric, ...], by_process: Sequence[Sequence[float]], log: dict[str, list[float]]) -> None:
    """Reduce the values of a micro-batch over the processes, and append each metric to its list in ``log``."""
    start = 0
    for metric in metrics:
        parts = [values[start : start + metric.size] for values in by_process]
        start += metric.size
        if metric.reduction == "mean":
            value = sum(part[0] for part in parts) / max(sum(part[1] for part in parts), 1.0)
        elif metric.reduction == "average":
            value = sum(part[0] for part in parts) / len(parts)
        else:
            value = (min if metric.reduction == "min" else max)(part[0] for part in parts)
            value = value if math.isfinite(value) else math.nan
        log[metric.name].append(value)
