"""Masks that reject tokens or sequences on which the trainer's policy and the sampler's are too far apart.

They are factors of 0 and 1, to be multiplied with the weights of `rollout_weights`, which they leave alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_fast.loss import checks
from grpo_fast.loss.config import LARGEST_LOG_RATIO
from grpo_fast.loss.corrections import checked_bound, checked_loss_mask, checked_sequences

__all__ = ["Rejection", "parse_rejections", "rejection_mask"]

LEVELS = ("token", "sequence", "sequence_mean", "sequence_max")
# Of the KL divergence from the sampler's policy to the trainer's, as functions of D = log(trainer / sampler).
_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda d: -d,
    "k2": lambda d: d.square() / 2,
    "k3": lambda d: torch.expm1(d) - d,
}
_VERL_LEVELS = {"token": "token", "seq_sum": "sequence", "seq_mean": "sequence_mean", "seq_max": "sequence_max"}


@torch.no_grad()
def rejection_mask(
    old_logprobs: Tensor,  # [B, T] or packed [N]
    rollout_logprobs: Tensor,  # like old_logprobs
    mask: Tensor,  # like old_logprobs
    *,
    estimator: str = "k1",
    level: str = "sequence_mean",
    low: float | None = None,
    high: float | None = None,
    cu_seqlens: Tensor | None = None,  # int32 [S + 1]
    log_ratio_clamp: float = 20.0,
) -> Tensor:  # float32 [B, T], [B, 1] or [N]
    """Return 0 for the tokens or sequences on which the policies are too far apart, else 1.

    The distance of a token is an estimate of the KL divergence from the sampler's policy to the trainer's, with D = old - rollout::

        k1    -D               ratio = exp(D) is kept in [low, high]; over a sequence the product of its ratios, or their geometric mean
        k2    D^2 / 2          is kept up to high
        k3    exp(D) - 1 - D   is kept up to high

    ``estimator="k1", level="sequence_mean"`` is a band of the geometric mean, outside of which a whole sequence is rejected (verl,
    NeMo-RL); with ``"k3"`` and ``"sequence_max"`` one token that is far off rejects its sequence (Trust Region Masking, arXiv:2512.23075).

    The result multiplies the surrogate, as that of `rollout_weights`: rejected tokens stay in the denominators and in the KL penalty. To
    leave them out of both, as verl does, multiply the ``mask`` of the loss instead.

    Args:
        old_logprobs: float ``[B, T]`` or packed ``[N]``: log-probabilities under the trainer's policy.
        rollout_logprobs: like old_logprobs: as the sampler returned them, at the same temperature; NaN (not scored) means no difference.
        mask: bool or 0/1, like old_logprobs; a masked token has no distance.
        estimator: ``"k1"``, ``"k2"`` or ``"k3"``.
        level: ``"token"``; or, for whole sequences, the sum over their tokens (``"sequence"``), the mean (``"sequence_mean"``), or the
            largest (``"sequence_max"``, not with ``"k1"``).
        low, high: inclusive bounds; at least one is required. Of the ratio with ``"k1"``, else ``high`` only, in nats.
        cu_seqlens: int32 ``[S + 1]``, where sequences begin; required with packed input unless ``level="token"``.
        log_ratio_clamp: bound of a token's D, > 0 and at most 80.

    Returns:
        float32: ``[B, T]`` for ``level="token"``, ``[B, 1]`` for the sequence levels, ``[N]`` for packed input.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape, device, value or combination is wrong; the message names the argument, what it was, what was expected and the
            fix.

    Example:
        >>> old, sampled = torch.tensor([[-1.0, -1.0], [-1.0, -1.0]]), torch.tensor([[-1.0, -1.2], [-1.0, -3.0]])
        >>> rejection_mask(old, sampled, torch.ones(2, 2), low=0.5, high=2.0)
        tensor([[1.],
                [0.]])
    """
    criterion = _checked(Rejection(estimator, level, low, high))
    if checks.positive("log_ratio_clamp", log_ratio_clamp, "20 is usual.") > LARGEST_LOG_RATIO:
        raise ValueError(f"log_ratio_clamp is {log_ratio_clamp}; expected at most {LARGEST_LOG_RATIO}, since exp(88.8) overflows float32.")
    loss_mask = checked_loss_mask("old_logprobs", old_logprobs, mask, rollout_logprobs=rollout_logprobs)
    log_ratio = torch.where(loss_mask, (old_logprobs - rollout_logprobs).float(), 0).nan_to_num(nan=0.0)
    distance = _ESTIMATORS[criterion.estimator](log_ratio.clamp(-log_ratio_clamp, log_ratio_clamp))  # 0 where masked
    if level != "token" or cu_seqlens is not None:
        sequences = checked_sequences("old_logprobs", old_logprobs, cu_seqlens)
    if level == "sequence":
        distance = sequences.total(distance)
    elif level == "sequence_mean":
        distance = sequences.mean(distance, loss_mask)
    elif level == "sequence_max":
        distance = sequences.largest(distance)
    least, largest = criterion.distances
    return ((distance >= least) & (distance <= largest)).float()


class Rejection(NamedTuple):
    """The criterion of a `rejection_mask`; see its arguments."""

    estimator: str
    level: str
    low: float | None
    high: float | None

    @property
    def distances(self) -> tuple[float, float]:
        """The least and the largest distance that is kept."""
        if self.estimator != "k1":
            return -math.inf, math.inf if self.high is None else self.high
        return (
            -math.inf if self.high is None else -math.log(self.high),  # k1 = -log(ratio)
            math.inf if not self.low else -math.log(self.low),
        )


def parse_rejections(names: str, thresholds: str | float | None) -> tuple[Rejection, ...]:
    """Return the criteria of verl's ``rollout_rs`` and ``rollout_rs_threshold``; tokens must satisfy all of them.

    Args:
        names: separated by commas: ``token_k1``, ``seq_sum_k1``, ``seq_mean_k1``, the same with ``k2`` and ``k3``, ``seq_max_k2`` or
            ``seq_max_k3``.
        thresholds: one for all, or one for each, separated by commas. With ``k1`` bounds of the ratio of the sampler's probability to the
            trainer's, ``"0.5_2.0"``; a single number is the upper one, and the lower one is its reciprocal. Else the largest distance.

    Raises:
        ValueError: a name or threshold is none; the message names it, what was expected and the fix.

    Example:
        >>> parse_rejections("seq_mean_k1", "0.5_1.25")
        (Rejection(estimator='k1', level='sequence_mean', low=0.8, high=2.0),)
    """
    known = [f"{level}_{k}" for level in _VERL_LEVELS for k in _ESTIMATORS if (level, k) != ("seq_max", "k1")]
    wanted = list(dict.fromkeys(name.strip() for name in names.split(",")))
    for name in wanted:
        if name not in known:
            raise ValueError(f"rollout_rs is {names!r}; expected one of {', '.join(known)}, or several of them separated by commas.")
    parts = [] if thresholds is None else [part.strip() for part in str(thresholds).split(",")]
    if len(parts) not in (1, len(wanted)):
        expected = f"one for {names!r}" if len(wanted) == 1 else f"one for all, or {len(wanted)} separated by commas for {names!r}"
        raise ValueError(f"rollout_rs_threshold is {thresholds!r}; expected {expected}. Fix: '0.999_1.001' for seq_mean_k1, 0.01 for k3.")
    return tuple(_criterion(name, part) for name, part in zip(wanted, parts * (len(wanted) // len(parts)), strict=True))


def _criterion(name: str, threshold: str) -> Rejection:
    level, _, estimator = name.rpartition("_")
    bounds = threshold.split("_") if estimator == "k1" else [threshold]
    try:
        numbers = [float(bound) for bound in bounds]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2) or not all(0 < number < math.inf for number in numbers) or numbers[0] > numbers[-1]:
        expected = "a number above 0, or 'lower_upper' with lower <= upper" if estimator == "k1" else "a number above 0"
        raise ValueError(f"rollout_rs_threshold of {name} is {threshold!r}; expected {expected}.")
    if estimator != "k1":
        return Rejection(estimator, _VERL_LEVELS[level], None, numbers[0])
    if len(numbers) == 1 and numbers[0] < 1:
        fix = "Fix: the upper bound of the ratio, or 'lower_upper'"
        raise ValueError(f"rollout_rs_threshold of {name} is {threshold!r}; expected at least 1: the lower bound is its reciprocal. {fix}.")
    upper, lower = numbers[-1], numbers[0] if len(numbers) == 2 else 1 / numbers[0]
    return Rejection("k1", _VERL_LEVELS[level], 1 / upper, 1 / lower)  # our ratio is the reciprocal


def _checked(criterion: Rejection) -> Rejection:
    estimator, level, low, high = criterion
    if estimator not in _ESTIMATORS:
        raise ValueError(f"estimator is {estimator!r}; expected one of {', '.join(_ESTIMATORS)}.")
    if level not in LEVELS:
        raise ValueError(f"level is {level!r}; expected one of {', '.join(LEVELS)}.")
    if estimator == "k1" and level == "sequence_max":
        raise ValueError("level is 'sequence_max' with estimator 'k1', which can be negative; expected 'k2' or 'k3'. Fix: estimator='k3'.")
    what = "It bounds a ratio exp(old - rollout)" if estimator == "k1" else "It bounds a divergence, in nats"
    low, high = checked_bound("low", low, f"{what}."), checked_bound("high", high, f"{what}.")
    if low is None and high is None:
        raise ValueError(f"low and high are None; expected a bound, or nothing is rejected. {what}.")
    if estimator != "k1" and low is not None:
        raise ValueError(f"low is {low} with estimator {estimator!r}, which is at least 0; expected None. Fix: bound it by high.")
    if high == 0 and estimator == "k1":
        raise ValueError("high is 0; expected a number above 0, or every token is rejected. It bounds a ratio exp(old - rollout).")
    if low is not None and high is not None and low > high:
        raise ValueError(f"low is {low}, high is {high}; expected low <= high.")
    return Rejection(estimator, level, low, high)
