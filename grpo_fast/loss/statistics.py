"""Summaries of the loss's inputs and outputs: the distribution of the token entropies, and groups without a training signal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_fast.loss.advantages import group_advantages

__all__ = ["EntropySummary", "entropy_summary", "quantiles", "top_threshold", "zero_variance_share"]


class EntropySummary(NamedTuple):
    """Entropy of the policy over the unmasked tokens, in nats."""

    mean: float
    median: float
    p90: float
    tokens: int


def entropy_summary(
    entropy: Tensor,  # [B, T]
    mask: Tensor | None = None,  # bool or 0/1, [B, T]; None = all tokens
) -> EntropySummary:
    """Mean, median and 90th percentile of the token entropies; all 0 if every token is masked.

    A mean near 0 together with a 90th percentile near 0 is a collapsed policy: it samples the same text repeatedly, and the completions
    of a group no longer differ.

    Raises:
        ValueError: ``mask`` has another shape than ``entropy``.
    """
    if mask is not None and mask.shape != entropy.shape:
        raise ValueError(f"entropy_summary: mask has shape {tuple(mask.shape)}; expected that of entropy, {tuple(entropy.shape)}.")
    values = (entropy if mask is None else entropy[mask.bool()]).detach().flatten().float()
    if values.numel() == 0:
        return EntropySummary(0.0, 0.0, 0.0, 0)
    median, p90 = quantiles(values, (0.5, 0.9)).tolist()
    return EntropySummary(values.mean().item(), median, p90, values.numel())


def quantiles(values: Tensor, at: Sequence[float]) -> Tensor:  # [len(at)]
    """Quantiles as of ``torch.quantile``, with linear interpolation, of any number of values; torch.quantile takes at most 2^24.

    Args:
        values: float, at least one.
        at: in [0, 1].

    Returns:
        float, like ``values``; NaN if a value is NaN.

    Example:
        >>> quantiles(torch.tensor([3.0, 1.0, 2.0]), (0.0, 0.5, 0.75))
        tensor([1.0000, 2.0000, 2.5000])
    """
    ordered = values.flatten().sort().values  # NaN last
    found = []
    for share in at:
        position = share * (ordered.numel() - 1)
        low = math.floor(position)
        found.append(torch.lerp(ordered[low], ordered[min(low + 1, ordered.numel() - 1)], position - low))
    return torch.where(ordered[-1].isnan(), ordered[-1], torch.stack(found))


def top_threshold(values: Tensor, share: float) -> Tensor:
    """Return the least of the values that belong to the largest ``share`` of them, without dimensions; values equal to it belong, too.

    Args:
        values: float ``[n]``, without NaN.
        share: in (0, 1].

    Returns:
        like ``values``; infinity if there are none.

    Example:
        >>> top_threshold(torch.tensor([0.1, 0.9, 0.5, 0.3]), 0.5)
        tensor(0.5000)
    """
    if values.numel() == 0:
        return values.new_full((), math.inf)
    below = math.ceil((1 - share) * (values.numel() - 1) - 1e-6)  # how many do not belong; 1e-6 absorbs rounding
    return values.kthvalue(below + 1).values


def zero_variance_share(rewards: Tensor, group_size: int) -> float:
    """Share of the groups whose rewards are all equal; they contribute no gradient.

    All correct: the prompts are too easy or the temperature is too low. All wrong: the prompts are too hard.

    Args:
        rewards: ``[B]``, groups of ``group_size`` consecutive completions; NaN where no reward applies. Sum several rewards first.
        group_size: completions per prompt.

    Raises:
        ValueError: ``rewards`` is not one-dimensional.

    Example:
        >>> zero_variance_share(torch.tensor([1.0, 1.0, 0.0, 1.0]), group_size=2)
        0.5
    """
    if rewards.dim() != 1:
        raise ValueError(
            f"zero_variance_share: rewards has shape {tuple(rewards.shape)}; expected [B]: the weighted sum of several rewards."
        )
    if rewards.numel() == 0:
        return 0.0
    return group_advantages(rewards, group_size=group_size).degenerate.float().mean().item()
