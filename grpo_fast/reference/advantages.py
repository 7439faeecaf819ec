"""Group-relative advantages in plain PyTorch, float64 throughout. Read it from top to bottom.

A prompt is answered by a group of completions, each is scored, and what counts is how much better a completion did than its siblings:

    1. weighted_sum        rewards r_ik     ->  one number x_i per completion; NaN where no reward applies ("unscorable")
    2. group_moments       x, group         ->  count, mean and unbiased std of each group, and whether its values are all equal
    3. normalized          x, moments       ->  (x_i - baseline) / (std + eps), exactly 0 in a group of equal values
    4. group_advantages    1 to 3, over the group or over the batch, rewards summed before or after
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# 1 ----------------------------------------------------------------------------------------------------------------------------------------


def weighted_sum(
    rewards: Tensor,  # [B, R], NaN = does not apply
    weights: Tensor,  # [R]
) -> Tensor:  # [B]
    """Sum the rewards that apply to a completion; NaN where none does, so that 0 keeps meaning a reward of 0."""
    applies = ~rewards.isnan()
    total = torch.where(applies, weights * rewards, 0.0).sum(1)
    return torch.where(applies.any(1), total, math.nan)


# 2 ----------------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moments:
    """Statistics of each group over its values that apply; [G], or [G, R] with a column per reward."""

    count: Tensor
    mean: Tensor  # 0 for an empty group
    std: Tensor  # unbiased (n - 1); 0 where equal
    equal: Tensor  # bool: all values are equal, or there are fewer than two


def group_moments(
    x: Tensor,  # [B] or [B, R], NaN = does not apply
    group: Tensor,  # [B], the group of each row
    num_groups: int,
) -> Moments:
    """Two passes, mean first: E[x^2] - E[x]^2 has no digit left for rewards like 1000.0, 1000.1, 1000.2."""
    applies = ~x.isnan()
    index = group.reshape(-1, *[1] * (x.dim() - 1)).expand_as(x)

    def reduced(values: Tensor, how: str, start: float) -> Tensor:
        return x.new_full((num_groups, *x.shape[1:]), start).scatter_reduce(0, index, torch.where(applies, values, start), how)

    count = reduced(torch.ones_like(x), "sum", 0.0)
    lowest, highest = reduced(x, "amin", math.inf), reduced(x, "amax", -math.inf)
    equal = (count < 2) | (lowest == highest)
    # The mean of equal values is that value; sum / count may miss it by a rounding, which std + eps ~ eps would blow up to a signal.
    mean = torch.where(equal, lowest, reduced(x, "sum", 0.0) / count).masked_fill(count == 0, 0.0)
    variance = reduced((x - mean[group]).square(), "sum", 0.0) / (count - 1)
    return Moments(count, mean, variance.masked_fill(equal, 0.0).sqrt(), equal)


# 3 ----------------------------------------------------------------------------------------------------------------------------------------


def normalized(
    x: Tensor,  # [B] or [B, R]
    moments: Moments,
    group: Tensor,  # [B]
    *,
    baseline: str,
    divide_by_std: bool,
    eps: float,
) -> Tensor:  # like x
    """Centre each value on its group, and divide by the group's std; 0 for a value that does not apply and for equal values."""
    factor = torch.ones_like(moments.mean)
    if baseline == "leave_one_out":  # x_i - mean of the n - 1 others = (x_i - mean) * n / (n - 1)
        factor = factor * moments.count / (moments.count - 1)
    if divide_by_std:
        factor = factor / (moments.std + eps)
    return ((x - moments.mean[group]) * factor[group]).masked_fill(x.isnan() | moments.equal[group], 0.0)


# 4 ----------------------------------------------------------------------------------------------------------------------------------------


def group_advantages(
    rewards: Tensor,  # [B] or [B, R], NaN = does not apply
    *,
    group_size: int = 1,
    group_offsets: Tensor | None = None,  # [G+1], in place of group_size
    scale: str = "group",
    baseline: str = "mean",
    reward_weights: Tensor | None = None,  # [R]
    normalize: str = "sum_then_normalize",
    eps: float = 1e-4,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # [B], [G], [G], [G] bool
    """Advantages, and mean and std of the summed reward and degeneracy of each group. Arguments are not checked here."""
    r = rewards.double() if rewards.dim() == 2 else rewards.double().unsqueeze(1)
    weights = r.new_ones(r.shape[1]) if reward_weights is None else reward_weights.to(r)
    row = torch.arange(r.shape[0], device=r.device)
    if group_offsets is not None:
        group, num_groups = torch.searchsorted(group_offsets[1:].contiguous(), row, right=True), group_offsets.shape[0] - 1
    else:
        group, num_groups = row // group_size, r.shape[0] // group_size

    x = weighted_sum(r, weights)
    moments = group_moments(x, group, num_groups)
    degenerate = moments.equal

    if normalize == "sum_then_normalize":
        y = normalized(x, moments, group, baseline=baseline, divide_by_std=scale == "group", eps=eps)
        batch_std = group_moments(x, torch.zeros_like(group), 1).std
    else:  # GDPO, arXiv:2601.05242
        per_reward = group_moments(r, group, num_groups)
        z = normalized(r, per_reward, group, baseline=baseline, divide_by_std=True, eps=eps)
        y = (weights * z).sum(1)
        degenerate = (per_reward.equal | (weights == 0)).all(1)
        # Each reward's z sum to 0 within a group, so the batch mean of y is 0. Subtracting what roundings leave of it would only disturb
        # the exact 0 of degenerate groups.
        batch_std = (y.square().sum() / (moments.count.sum() - 1).clamp(min=1)).sqrt()

    if scale == "batch" or normalize == "normalize_then_sum":
        y = torch.where(y == 0, 0.0, y / (batch_std + eps))  # 0 stays 0 also where std and eps are
    return y, moments.mean, moments.std, degenerate
