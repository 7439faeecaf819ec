"""The specification of grpo_fast: from rewards to advantages, and from logits to the loss of the GRPO family, in plain PyTorch of any
float type. Read it from top to bottom.

For each prompt a group of completions is sampled. Each completion gets one or several rewards, and its advantage is its reward relative to
the rewards of its group:

    1. weighted_sum            rewards r_ik     ->  one number x_i per completion; NaN where no reward applies
    2. group_moments           x, group         ->  count, mean and unbiased std of each group, and whether its values are all equal
    3. normalized              x, moments       ->  (x_i - baseline) / divisor, exactly 0 in a group of equal values
       pass_at_k               x                ->  the same for the best of k completions
    4. group_advantages        1 to 3, with statistics of the group or of the batch, and rewards summed before or after the normalization

For a token with logits z and temperature T the policy is p = softmax(s), s = f(z) / T, where f is an optional scale followed by an optional
soft cap. The sampler drew the token y from p, so the loss must use the same p:

    5. token_statistics        z, y             ->  log p_y and the entropy of p
    6. sequence_sum, _mean     x                ->  sums and means over the sequence that a token belongs to
    7. importance_log_ratio    log p_y, old     ->  how far the policy has moved: per token (PPO), or per sequence (GSPO, GMPO)
    8. surrogate, vespo_phi    ratio, A         ->  the objective of one token
    9. kl_penalty              log p_y, ref     ->  the distance to a reference policy
   10. aggregation_weights     mask             ->  one weight per token:  loss = sum_n w_n * l_n
   11. active_tokens           mask, A          ->  the tokens that can change the gradient
   12. policy_loss             6 to 11: the loss from log-probabilities and entropies
   13. grpo_loss               5 and 12: the whole loss, from the arguments of the public function

Autograd through this file defines the gradient; the kernels compute the same gradient by hand. Masked tokens may hold any value (NaN,
-100): their values are replaced before any arithmetic, and affect neither the loss nor the gradient.

The fast paths share no code with this file, so that the tests compare two independent implementations. The one exception is the elementwise
``surrogate``, which loss/logprob_loss.py calls for ratios of whole sequences: a new surrogate is written once in PyTorch, and compared with
the C++ and Triton kernels. The reference backend runs this file itself. Arguments are not checked here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from grpo_fast.loss.config import LossConfig

# 1 ------------------------------------------------------------------------------------------------------------------------


def weighted_sum(
    rewards: Tensor,  # [B, R], NaN = does not apply
    weights: Tensor,  # [R]
) -> Tensor:  # [B]
    """Return the weighted sum of the rewards that apply to each completion; NaN where none applies, since 0 is a valid reward."""
    applies = ~rewards.isnan()
    total = torch.where(applies, weights * rewards, 0.0).sum(1)
    return torch.where(applies.any(1), total, math.nan)


# 2 ------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moments:
    """Statistics of the values of each group that are not NaN; [G], or [G, R] with a column per reward."""

    count: Tensor
    mean: Tensor  # 0 for an empty group
    std: Tensor  # unbiased (n - 1); 0 where ``equal`` is True
    equal: Tensor  # bool: all values are equal, or there are fewer than two


def group_moments(
    x: Tensor,  # [B] or [B, R], NaN = does not apply
    group: Tensor,  # [B], the group of each row
    num_groups: int,
) -> Moments:
    """Return count, mean, standard deviation and equality of each group's values.

    The variance is computed in a second pass, around the mean: E[x^2] - E[x]^2 loses all its digits to cancellation for rewards such as
    1000.0, 1000.1, 1000.2.
    """
    applies = ~x.isnan()
    index = group.reshape(-1, *[1] * (x.dim() - 1)).expand_as(x)

    def per_group(values: Tensor, reduction: str, initial: float) -> Tensor:
        return x.new_full((num_groups, *x.shape[1:]), initial).scatter_reduce(0, index, torch.where(applies, values, initial), reduction)

    count = per_group(torch.ones_like(x), "sum", 0.0)
    lowest, highest = per_group(x, "amin", math.inf), per_group(x, "amax", -math.inf)
    equal = (count < 2) | (lowest == highest)
    # The mean of equal values is set to that value: sum / count may differ from it by a rounding error, which the division by
    # std + eps = eps would turn into a large advantage.
    mean = torch.where(equal, lowest, per_group(x, "sum", 0.0) / count).masked_fill(count == 0, 0.0)
    variance = per_group((x - mean[group]).square(), "sum", 0.0) / (count - 1)
    return Moments(count, mean, variance.masked_fill(equal, 0.0).sqrt(), equal)


# 3 ------------------------------------------------------------------------------------------------------------------------


def normalized(
    x: Tensor,  # [B] or [B, R]
    moments: Moments,
    group: Tensor,  # [B]
    *,
    baseline: str,
    divisor: Tensor | None,  # like moments.mean
) -> Tensor:  # like x
    """Subtract the group's baseline from each value and, if asked for, divide by a number of the group.

    The result is 0 for NaN (the reward does not apply) and for all values of a group whose values are equal.
    """
    factor = torch.ones_like(moments.mean)
    if baseline == "leave_one_out":  # x_i - mean of the n - 1 others = (x_i - mean) * n / (n - 1)
        factor = factor * moments.count / (moments.count - 1)
    if divisor is not None:
        factor = factor / divisor
    return ((x - moments.mean[group]) * factor[group]).masked_fill(x.isnan() | moments.equal[group], 0.0)


def pass_at_k(
    x: Tensor,  # [B], NaN = does not apply
    group: Tensor,  # [B]
    num_groups: int,
    k: int,
    *,
    divide_by_std: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:  # [B], bool [G]
    """Return the advantages for pass@k, and whether all of a group are 0 (Pass@k Training, arXiv:2508.10751, in its analytical form).

    A set of k of the group's n completions has the reward of its best one. A completion's advantage is the mean of that over the sets that
    it is in, minus the mean over all sets, divided by the standard deviation over all sets, + eps. Over all sets the best reward is at most
    v with probability C(c, k) / C(n, k), if c rewards of the group are at most v; over the sets with completion i it is at most v >= x_i
    with probability C(c - 1, k - 1) / C(n - 1, k - 1). With N wrong completions of reward 0, and the others of reward 1, that is

        mean = 1 - C(N, k) / C(n, k),    std^2 = mean (1 - mean),    right: (1 - mean) / std,
        wrong: (1 - mean - C(N - 1, k - 1) / C(n - 1, k - 1)) / std
    """
    highest = x.new_full((num_groups,), -math.inf).scatter_reduce(0, group, torch.where(x.isnan(), -math.inf, x), "amax")
    member = (group[:, None] == group) & ~x.isnan()  # [B, B]: whether j is in the group of i
    n, at_most, below = member.sum(1), (member & (x <= x[:, None])).sum(1), (member & (x < x[:, None])).sum(1)
    lower = torch.zeros_like(highest).scatter_add(0, group, (x < highest[group]).to(x))
    degenerate = lower < k  # every set of k has the highest reward, or there is none

    def share(c: Tensor, first: int) -> Tensor:  # C(c - first, k - first) / C(n - first, k - first)
        t = torch.arange(first, k, device=x.device)
        return torch.where(c >= k, ((c[:, None] - t).to(x) / (n[:, None] - t).to(x)).prod(1), 0.0)

    ties = (at_most - below).clamp(min=1)  # completions with the same reward share its probability
    of_all, with_another = ((share(at_most, first) - share(below, first)) / ties for first in (0, 1))
    d = torch.where(x.isnan(), 0.0, x - highest[group])  # from the highest, and then from the mean
    mean = torch.where(member, of_all * d, 0.0).sum(1)
    std = torch.where(member, of_all * (d - mean[:, None]).square(), 0.0).sum(1).sqrt()
    better = torch.where(member & (x > x[:, None]), with_another * (d - mean[:, None]), 0.0).sum(1)
    best = (d - mean) * share(at_most, 1) + better
    y = best / (std + eps if divide_by_std else torch.ones_like(std))
    # A difference of 0 is a rounding error here; so it is 0 if it is tiny relative to the std.
    return y.masked_fill(x.isnan() | degenerate[group] | (best.abs() <= 2.0**-36 * std), 0.0), degenerate


# 4 ------------------------------------------------------------------------------------------------------------------------


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
    lengths: Tensor | None = None,  # [B], with scale="tokens"
    exclude_degenerate: bool = False,
    k: int | None = None,  # pass_at_k of the public function
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # [B], [G], [G], [G] bool
    """Return the advantages, and for each group the mean and the std of the summed reward and whether the group is degenerate.

    The arguments are those of ``grpo_fast.group_advantages``, which documents and validates them.
    """
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

    if k is not None:
        y, degenerate = pass_at_k(x, group, num_groups, k, divide_by_std=scale == "group", eps=eps)
        return y, moments.mean, moments.std, degenerate
    if normalize == "sum_then_normalize":
        above_0 = (moments.mean + eps).masked_fill(moments.mean + eps <= 0, math.nan)  # else the signs of the advantages would turn around
        divisor = {"group": moments.std + eps, "mean": above_0}.get(scale)  # mean: MaxRL, arXiv:2602.02710
        y = normalized(x, moments, group, baseline=baseline, divisor=divisor)
    else:  # GDPO, arXiv:2601.05242
        per_reward = group_moments(r, group, num_groups)
        z = normalized(r, per_reward, group, baseline=baseline, divisor=per_reward.std + eps)
        y = (weights * z).sum(1)
        # Where weighted rewards cancel, y is a rounding error and not 0, and the division by the std of y would amplify it. It is set to
        # 0 if it is tiny relative to the terms that were added. The size of a term is the std of its z.
        z_std = torch.where(per_reward.equal, 0.0, per_reward.std / (per_reward.std + eps))[group]
        term_size = (weights * z_std).abs().sum(1)
        if baseline == "leave_one_out":
            term_size = term_size * (moments.count / (moments.count - 1).clamp(min=1))[group]
        y = torch.where(y.abs() <= 2.0**-36 * term_size, 0.0, y)
        degenerate = (per_reward.equal | (weights == 0)).all(1)

    counted = ~x.isnan()  # the completions whose advantages make the statistics of the batch
    if exclude_degenerate:
        counted = counted & ~degenerate[group]
    if scale == "tokens":  # REINFORCE++, arXiv:2501.03262: every token has its completion's y
        assert lengths is not None
        tokens = torch.where(counted, lengths.to(y), 0.0)
        mean = (tokens * y).sum() / tokens.sum().clamp(min=1)
        std = ((tokens * (y - mean).square()).sum() / (tokens.sum() - 1).clamp(min=1)).sqrt()
        scorable = counted & (tokens.sum() >= 2) & (std + eps > 0)
        y = torch.where(scorable, (y - mean) / (std + eps), 0.0)
    elif scale == "batch" or normalize == "normalize_then_sum":
        if scale == "batch":
            std = group_moments(x.masked_fill(~counted, math.nan), torch.zeros_like(group), 1).std
        else:
            # The z of each reward sum to 0 within a group, so the mean of y over the batch is 0 up to rounding. It is not subtracted,
            # because the advantages of degenerate groups would then no longer be exactly 0.
            std = (y.square().sum() / (counted.sum() - 1).clamp(min=1)).sqrt()
        y = torch.where(y == 0, 0.0, y / (std + eps))  # 0 / 0 would be NaN
    return y, moments.mean, moments.std, degenerate


# 5 ------------------------------------------------------------------------------------------------------------------------


def token_statistics(
    logits: Tensor,  # [..., V]
    token_ids: Tensor,  # [...]
    temperature: float | Tensor = 1.0,  # number, or [...]
    softcap: float | None = None,
    logit_scale: float = 1.0,
    kept: Tensor | None = None,  # bool [..., V]
) -> tuple[Tensor, Tensor]:  # [...], [...]
    """Return the log-probability of the sampled token, and the entropy of the policy, in nats.

    The log-sum-exp excludes the target: ``log p_y = -softplus(lse_{v != y}(s_v) - s_y)``. The usual ``s_y - lse`` is the difference of two
    almost equal numbers when p_y is almost 1, and in float32 it is exactly 0 for margins above about 14 nats. This form keeps full relative
    precision.

    With a kept set the policy is the softmax over the set: top-k, top-p and min-p sampling draw from it (arXiv:2512.02556).
    """
    s = logits * logit_scale
    if softcap is not None:
        s = soft_cap(s, softcap)
    s = s / (temperature.unsqueeze(-1) if isinstance(temperature, Tensor) else temperature)
    if kept is not None:
        s = s.masked_fill(~kept, -math.inf)

    is_target = torch.arange(s.shape[-1], device=s.device) == token_ids.unsqueeze(-1)  # [..., V]
    s_target = s.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
    others = s.masked_fill(is_target, -math.inf)
    is_certain = (others == -math.inf).all(-1)  # p_y is 1: the gradient of logsumexp over -inf alone would be NaN
    lse_others = others.masked_fill(is_certain.unsqueeze(-1), 0.0).logsumexp(-1).masked_fill(is_certain, -math.inf)
    logprob = F.logsigmoid(s_target - lse_others)  # = -softplus(lse_others - s_target)

    # H = -sum p log p over the logits that are not -inf, with the exact log p of the target.
    lse = torch.where(s_target == -math.inf, lse_others, s_target - logprob)  # a target with p_y = 0 does not contribute
    log_p = torch.where(is_target, logprob.unsqueeze(-1), s - lse.unsqueeze(-1))
    p = log_p.exp()
    entropy = -(p * log_p.masked_fill(p == 0, 0.0)).sum(-1)
    return logprob, entropy


def kept_sets(set_ids: Tensor, offsets: Tensor, vocabulary: int) -> Tensor:  # [K], [N + 1] -> bool [N, V]
    """Return which ids each position keeps: ``set_ids[offsets[n] : offsets[n + 1]]``, or all of them if that is empty."""
    kept = (offsets[1:] == offsets[:-1]).unsqueeze(1).repeat(1, vocabulary)
    position = torch.searchsorted(offsets[1:].contiguous(), torch.arange(set_ids.shape[0], device=offsets.device), right=True)
    return kept.index_put((position, set_ids.long()), kept.new_ones(()))


def soft_cap(s: Tensor, softcap: float) -> Tensor:
    """softcap * tanh(s / softcap), Gemma 2, arXiv:2408.00118.

    For |x| >= 0.625, tanh |x| is computed as 1 - c with c = 2 e^-2|x| / (1 + e^-2|x|). Its derivative keeps its relative precision where
    tanh x is almost 1; the derivative of torch.tanh in autograd, 1 - tanh(x)^2, cancels to 0 there.
    """
    x = s / softcap
    e = torch.exp(-2 * x.abs())
    return softcap * torch.where(x.abs() < 0.625, torch.tanh(x), x.sign() * (1 - 2 * e / (1 + e)))


# 6 ------------------------------------------------------------------------------------------------------------------------


def sequence_sum(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Return for every token the sum of x over its sequence: a row of a padded [B, T] batch, or a slice of a packed [N] batch."""
    if cu_seqlens is None:
        return x.sum(-1, keepdim=True).expand_as(x)
    position = torch.arange(x.shape[0], device=x.device)
    member = (cu_seqlens[:-1, None] <= position) & (position < cu_seqlens[1:, None])  # [S, N]: token n belongs to sequence s
    sums = torch.where(member, x, 0).sum(1, keepdim=True)  # [S, 1]
    return torch.where(member, sums, 0).sum(0)


def sequence_mean(x: Tensor, mask: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Return for every token the mean of x over the unmasked tokens of its sequence; 0 for a sequence without unmasked tokens."""
    return sequence_sum(torch.where(mask, x, 0), cu_seqlens) / sequence_sum(mask.to(x.dtype), cu_seqlens).clamp(min=1)


def sequence_count(tokens: Tensor, cu_seqlens: Tensor | None) -> int:
    """Return the number of sequences; packed tokens without ``cu_seqlens`` are one sequence."""
    if cu_seqlens is not None:
        return cu_seqlens.shape[0] - 1
    return tokens.shape[0] if tokens.dim() == 2 else 1


# 7 ------------------------------------------------------------------------------------------------------------------------


def importance_log_ratio(log_ratio: Tensor, mask: Tensor, cu_seqlens: Tensor | None, level: str) -> Tensor:
    """Return the log of the importance ratio at the given level; log_ratio is 0 where masked.

    token           log p_y - log p_y^old                               PPO, arXiv:1707.06347; GRPO, arXiv:2402.03300
    sequence        its mean over the sequence, shared by its tokens    GSPO, arXiv:2507.18071; GMPO, of the clipped log-ratios
    sequence_token  the value of the mean, the gradient of the token    GSPO-token, arXiv:2507.18071 section 4.3
    """
    if level == "token":
        return log_ratio
    mean = sequence_mean(log_ratio, mask, cu_seqlens)
    if level == "sequence":
        return mean
    own_gradient = torch.where(log_ratio.isfinite(), log_ratio - log_ratio.detach(), 0)  # its value is 0
    return mean.detach() + own_gradient


def gmpo_log_ratio(log_ratio: Tensor, advantages: Tensor, config: LossConfig) -> Tensor:
    """Return the log-ratios of GMPO, arXiv:2507.20673: sign(A) min(sign(A) d, sign(A) clip(d, -eps_low, eps_high)) for the log-ratio d."""
    sign = advantages.sign()
    clipped = log_ratio.clamp(-config.epsilon_low, config.epsilon_high)
    return torch.where(sign == 0, log_ratio, sign * torch.minimum(sign * log_ratio, sign * clipped))


# 8 ------------------------------------------------------------------------------------------------------------------------


def surrogate(ratio: Tensor, advantages: Tensor, logprobs: Tensor, old_logprobs: Tensor, phi: Tensor | None, config: LossConfig) -> Tensor:
    """Return the loss of each token, elementwise; r is the ratio, A the advantage, and sg() stops the gradient.

    clip       max(-min(r, delta) A, -clip(r, 1 - eps_low, 1 + eps_high) A)      GRPO, arXiv:2402.03300; delta: arXiv:2505.07291
               and at most -c A where A < 0, with dual_clip = c                  arXiv:1912.09729
    cispo      -sg(clip(r, cispo_ratio_low, eps_high)) A log p                   MiniMax-M1, arXiv:2506.13585
    sapo       -4/tau sigmoid(tau (r - 1)) A, tau by the sign of A               SAPO, arXiv:2511.20347
    vespo      -phi A log p, phi from vespo_phi                                  VESPO, arXiv:2602.10693
    gmpo       -r A, with the ratio of the clipped log-ratios                    GMPO, arXiv:2507.20673
    dppo_tv    -r A; 0 for the tokens that clipped_tokens drops                  DPPO, arXiv:2602.04879
               with dppo_ratio_max: -sg(min(r, dppo_ratio_max)) A log p          verl
    dppo_kl    as dppo_tv, with the KL divergence in place of the total variation
    reinforce  -A log p
    custom     the user's function, which policy_loss calls (loss/custom_surrogate.py)
    """
    if config.surrogate == "clip":
        unclipped = ratio if config.delta is None else ratio.clamp(max=config.delta)
        clipped = ratio.clamp(1 - config.epsilon_low, 1 + config.epsilon_high)
        loss = torch.maximum(-unclipped * advantages, -clipped * advantages)
        if config.dual_clip is not None:
            loss = torch.where(advantages < 0, torch.minimum(loss, -config.dual_clip * advantages), loss)
        return loss
    if config.surrogate == "cispo":
        weight = ratio.detach().clamp(config.cispo_ratio_low, config.epsilon_high) * advantages
        return -torch.where(weight == 0, 0, weight * logprobs)  # 0 * -inf is NaN
    if config.surrogate == "sapo":
        tau = by_sign(advantages > 0, config.sapo_temperature_pos, config.sapo_temperature_neg, ratio.dtype)
        return -4 / tau * sigmoid(tau * (ratio - 1)) * advantages
    if config.surrogate == "vespo":
        assert phi is not None
        return -torch.where(phi * advantages == 0, 0, phi * advantages * logprobs)
    if config.surrogate == "gmpo":
        return -ratio * advantages
    if config.surrogate in ("dppo_tv", "dppo_kl"):
        low, high = clipped_tokens(ratio, advantages, logprobs, old_logprobs, config)
        loss = -ratio * advantages
        if config.dppo_ratio_max is not None:
            weight = ratio.detach().clamp(max=config.dppo_ratio_max) * advantages
            loss = -torch.where(weight == 0, 0, weight * logprobs)
        return torch.where(low | high, 0, loss)
    return -torch.where(advantages == 0, 0, advantages * logprobs)


@torch.no_grad()
def clipped_tokens(
    ratio: Tensor, advantages: Tensor, logprobs: Tensor, old_logprobs: Tensor, config: LossConfig
) -> tuple[Tensor, Tensor]:  # bool, bool
    """Return two masks of clipped tokens: those with A < 0 and those with A > 0 whose ratio has moved too far in the direction of A.

    clip     r < 1 - eps_low;  r > 1 + eps_high                              (custom: the same, which only the metrics read)
    cispo    r < cispo_ratio_low;  r > eps_high
    gmpo     log p - log p_old < -eps_low;  log p - log p_old > eps_high     (of the token, not of the sequence)
    dppo_*   D > dppo_mask_low and p < q;  D > dppo_mask_high and p > q
             with p and q the token's probability under the current and the old policy, and the divergence D:
             dppo_tv: D = |p - q|; dppo_kl: D = q log(q / p) + (1 - q) log((1 - q) / (1 - p))
    """
    below, above = torch.zeros_like(advantages, dtype=torch.bool), torch.zeros_like(advantages, dtype=torch.bool)
    if config.surrogate == "clip" or config.custom is not None:
        below, above = ratio < 1 - config.epsilon_low, ratio > 1 + config.epsilon_high
    elif config.surrogate == "cispo":
        below, above = ratio < config.cispo_ratio_low, ratio > config.epsilon_high
    elif config.surrogate == "gmpo":
        below, above = logprobs - old_logprobs < -config.epsilon_low, logprobs - old_logprobs > config.epsilon_high
    elif config.surrogate in ("dppo_tv", "dppo_kl"):
        old_logprobs = old_logprobs.clamp(max=0)
        divergence = binary_tv(logprobs, old_logprobs) if config.surrogate == "dppo_tv" else binary_kl(logprobs, old_logprobs)
        below = (divergence > config.dppo_mask_low) & (logprobs < old_logprobs)
        above = (divergence > config.dppo_mask_high) & (logprobs > old_logprobs)
    return below & (advantages < 0), above & (advantages > 0)


def binary_tv(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """Return |p - q|, the total variation between Bernoulli(p) and Bernoulli(q)."""
    return (logprobs.exp() - old_logprobs.exp()).abs()


def binary_kl(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """Return KL(Bernoulli(q) || Bernoulli(p)), in nats. 1 - p is computed as -expm1(log p), which is exact for p near 1."""
    q, others, old_others = old_logprobs.exp(), -torch.expm1(logprobs), -torch.expm1(old_logprobs)
    token_term = torch.where(q > 0, q * (old_logprobs - logprobs), 0)
    return token_term + torch.where(old_others > 0, old_others * (old_others.log() - others.log()), 0)


def sigmoid(x: Tensor) -> Tensor:
    """Return 1 / (1 + exp(-x)), whose bits depend on x alone; those of torch.sigmoid also depend on an element's place in its tensor."""
    e = torch.exp(torch.where(x >= 0, -x, x))
    return torch.where(x >= 0, 1, e) / (1 + e)


def by_sign(positive: Tensor, if_positive: float, otherwise: float, dtype: torch.dtype) -> Tensor:
    """Return one of two settings per token, in the given dtype; torch.where of two numbers would round them to float32."""
    return torch.full_like(positive, otherwise, dtype=dtype).masked_fill(positive, if_positive)


def vespo_phi(
    log_ratio: Tensor,  # 0 where masked
    advantages: Tensor,
    rollout_weights: Tensor | None,  # like the tokens (1 where masked), or [B, 1]
    cu_seqlens: Tensor | None,
    config: LossConfig,
) -> Tensor:
    """Return VESPO's weight of each sequence, arXiv:2602.10693: phi = W^k exp(lambda (1 - W)), with k and lambda chosen by the sign of A.
    No gradient flows through it.

    W is the product of the sequence's ratios and of its rollout weights, so the loss does not multiply by the rollout weights again.
    Rollout weights [B, 1] are one number per sequence and enter W once.
    """
    smallest, largest = math.log(1e-8), config.log_ratio_clamp
    log_w = sequence_sum(log_ratio.detach().clamp(-largest, largest), cu_seqlens)
    if rollout_weights is not None:
        log_rollout = rollout_weights.log().clamp(smallest, largest)
        log_w = log_w + (log_rollout if rollout_weights.shape != log_ratio.shape else sequence_sum(log_rollout, cu_seqlens))
    log_w = log_w.clamp(smallest, largest)
    w = log_w.exp()

    def phi(k: float, lam: float) -> Tensor:
        lam = max(lam, 1e-4)
        return (k * log_w + lam * (1 - w)).exp()

    phi_of_sign = torch.where(
        advantages >= 0, phi(config.vespo_k_pos, config.vespo_lambda_pos), phi(config.vespo_k_neg, config.vespo_lambda_neg)
    )
    return torch.where(phi_of_sign.isfinite(), phi_of_sign, 0)


# 9 ------------------------------------------------------------------------------------------------------------------------


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, estimator: str, clamp: float) -> Tensor:
    """Return an estimate of KL(policy || reference) from the sampled token, with d = log p_ref - log p (Schulman,
    http://joschu.net/blog/kl-approx.html).

    k1  -d              unbiased, high variance
    k2  d^2 / 2         biased, but its gradient is unbiased
    k3  exp(d) - 1 - d  unbiased, never negative; as expm1(d) - d, since exp(d) - d - 1 cancels for small d
    """
    d = ref_logprobs - logprobs
    if estimator == "k1":
        return -d
    if estimator == "k2":
        return d**2 / 2
    d = d.clamp(-clamp, clamp)
    return torch.expm1(d) - d


# 10 ------------------------------------------------------------------------------------------------------------------------


def aggregation_weights(
    aggregation: str,
    mask: Tensor,  # bool, [B, T] or [N]
    cu_seqlens: Tensor | None,
    num_items: int | float | Tensor | None,
    max_completion_length: int | None,
    dtype: torch.dtype,
) -> Tensor:  # like the mask
    """Return the weight of each token. |o| is the number of unmasked tokens of its sequence, S the number of sequences, fully masked ones
    included.

    sequence_mean      1 / (S |o|)            GRPO, GSPO, SAPO: every sequence has the same total weight
    token_mean         1 / sum |o|            BNPO: every token has the same weight
    global_token_mean  1 / num_items          DAPO, CISPO, VESPO: the same weight in all micro-batches and processes
    fixed_length       1 / (S L_max)          Dr. GRPO, arXiv:2503.20783: no length bias
    sequence_sum       1 / S                  LUSPO, arXiv:2602.05261: the weight of a sequence grows with its length

    For nonempty_sequence_mean and nonempty_sequence_sum, S counts only the sequences that have an unmasked token (verl, OpenRLHF).
    """
    one = torch.ones_like(mask, dtype=dtype)
    length = sequence_sum(mask.to(dtype), cu_seqlens).clamp(min=1)  # |o|
    sequences = one * max(sequence_count(mask, cu_seqlens), 1)
    if aggregation.startswith("nonempty_"):
        sequences = one * torch.where(mask, 1 / length, 0).sum().round().clamp(min=1)  # the 1 / |o| of a sequence's tokens add up to 1
        aggregation = aggregation.removeprefix("nonempty_")
    if aggregation == "sequence_mean":
        return 1 / (sequences * length)
    if aggregation == "sequence_sum":
        return 1 / sequences
    if aggregation == "fixed_length":
        assert max_completion_length is not None
        return 1 / (sequences * max_completion_length)
    if aggregation == "token_mean" or num_items is None:
        num_items = mask.sum()
    if isinstance(num_items, Tensor):
        num_items = num_items.to(mask.device, dtype)
    return 1 / (one * num_items).clamp(min=1)


# 11 ------------------------------------------------------------------------------------------------------------------------


def active_tokens(mask: Tensor, advantages: Tensor, cu_seqlens: Tensor | None, config: LossConfig) -> Tensor:
    """Return the tokens whose log-probability or entropy can change the gradient: bool, like the mask.

    The KL penalty, the squared log-ratio and the entropy bonus apply to every unmasked token; the surrogate applies to every unmasked token
    whose advantage is not 0 (a custom one that does not vanish there, to every unmasked token). A ratio (or weight) of a whole sequence
    depends on all its unmasked tokens: they are all active if one of them has an advantage other than 0.
    """
    on_all_tokens = config.beta != 0 or config.squared_log_ratio_coef != 0 or config.entropy_coef != 0
    if on_all_tokens or not config.skips_zero_advantages:
        return mask
    has_signal = torch.where(mask, advantages, 0) != 0
    if config.level == "token" and config.surrogate != "vespo":
        return has_signal
    return mask & (sequence_sum(has_signal.float(), cu_seqlens) >= 1)


# 12 ------------------------------------------------------------------------------------------------------------------------


def policy_loss(
    logprobs: Tensor,  # [B, T] or [N]
    entropy: Tensor,  # like logprobs
    advantages: Tensor,  # [B], [B, T] or [N]
    config: LossConfig,
    *,
    mask: Tensor,  # bool, like logprobs
    computed: Tensor | None = None,  # bool, like logprobs: the active tokens, or all unmasked ones (None)
    old_logprobs: Tensor | None = None,  # None: on-policy
    ref_logprobs: Tensor | None = None,
    rollout_weights: Tensor | None = None,  # [B, T], [B, 1] or [N]
    surrogate_inputs: dict[str, Tensor] | None = None,  # of a custom surrogate; [B], [B, 1], [B, T] or [N]
    cu_seqlens: Tensor | None = None,  # [S + 1], packed input only
    num_items: int | float | Tensor | None = None,
    loss_scale: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss and its metrics from log-probabilities and entropies. The loss is the same whether all unmasked tokens are computed
    or only the active ones; the metrics are means over the computed tokens.

    Rollout weights multiply the surrogate and not the KL penalty, which is added afterwards (as in TRL).
    """
    clamp, computed = config.log_ratio_clamp, mask if computed is None else computed

    def select(x: Tensor, masked: float = 0.0) -> Tensor:  # before any arithmetic: 0 * inf and 0 * nan are nan
        return torch.where(computed, x.detach(), masked).to(logprobs.dtype)

    def weights(aggregation: str) -> Tensor:
        dtype = torch.float64 if logprobs.dtype == torch.float64 else torch.float32
        return aggregation_weights(aggregation, mask, cu_seqlens, num_items, config.max_completion_length, dtype)

    advantages = per_token(advantages, logprobs)
    active, advantages = active_tokens(mask, advantages, cu_seqlens, config), select(advantages)
    logprobs, entropy = torch.where(computed, logprobs, 0), torch.where(computed, entropy, 0)

    old_logprobs = logprobs.detach() if old_logprobs is None else select(old_logprobs)
    log_ratio = torch.where((logprobs == old_logprobs) & logprobs.isinf(), 0, logprobs - old_logprobs)  # not inf - inf
    ratio = importance_log_ratio(log_ratio, computed, cu_seqlens, config.level).clamp(-clamp, clamp).exp()
    clipped = ratio  # what the surrogate gets; the KL penalty and the metrics get the ratio itself
    if config.surrogate == "gmpo":
        moved = gmpo_log_ratio(log_ratio, advantages, config)
        clipped = importance_log_ratio(moved, computed, cu_seqlens, config.level).clamp(-clamp, clamp).exp()
    phi = None
    if config.surrogate == "vespo":
        per_sequence = rollout_weights is not None and rollout_weights.shape != logprobs.shape
        vespo_weights = rollout_weights if rollout_weights is None or per_sequence else select(rollout_weights, masked=1.0)
        phi = vespo_phi(log_ratio, advantages, vespo_weights, cu_seqlens, config)

    if config.custom is not None:
        given = {
            "ratio": ratio,
            "advantages": advantages,
            "logprobs": logprobs,
            "old_logprobs": old_logprobs,
            "ref_logprobs": None if ref_logprobs is None else select(ref_logprobs),
            "rollout_weights": torch.ones_like(ratio) if rollout_weights is None else select(rollout_weights),
            "entropy": entropy,
            **{name: select(per_token(x, logprobs)) for name, x in (surrogate_inputs or {}).items()},
        }
        losses = config.custom.losses(given, computed, skips_zero_advantages=config.skips_zero_advantages)
    else:
        losses = surrogate(clipped, advantages, logprobs, old_logprobs, phi, config)
    if rollout_weights is not None and not config.surrogate_weighs:
        losses = torch.where(select(rollout_weights) == 0, 0, losses * select(rollout_weights))
    kl = torch.zeros_like(logprobs) if ref_logprobs is None else kl_penalty(logprobs, select(ref_logprobs), config.kl_estimator, clamp)
    if config.beta != 0:
        losses = losses + config.beta * (ratio * kl if config.bias_corrected_kl else kl)
    if config.squared_log_ratio_coef != 0:  # Kimi-K2.5, arXiv:2602.02276
        losses = losses + config.squared_log_ratio_coef * log_ratio.clamp(-clamp, clamp) ** 2
    losses = torch.where(computed, losses, 0)

    loss = (weights(config.resolved_aggregation) * losses).sum()
    if config.entropy_coef != 0:
        same = config.entropy_aggregation == "same"
        bonus = weights(config.resolved_aggregation if same else config.entropy_aggregation) * entropy
        loss = loss - config.entropy_coef * bonus.sum()

    with torch.no_grad():
        clip_low, clip_high = clipped_tokens(ratio, advantages, logprobs, old_logprobs, config)

        def mean(x: Tensor) -> Tensor:
            return (torch.where(computed, x.double(), 0).sum() / computed.sum().clamp(min=1)).float()

        metrics = {
            "kl": mean(kl),
            "entropy": mean(entropy),
            "ratio_mean": mean(ratio),
            "ratio_max": (torch.where(computed, ratio, 0).amax() if ratio.numel() else ratio.new_zeros(())).float(),
            "clip_low": mean(clip_low),
            "clip_high": mean(clip_high),
            "clip_region": mean(clip_low | clip_high),
            "active_fraction": active.sum() / mask.sum().clamp(min=1),
        }
    return loss * loss_scale, metrics


def per_token(x: Tensor, tokens: Tensor) -> Tensor:
    """Expand one number for all tokens, [B], [B, 1], [B, T] or [N] to one number per token."""
    return (x.unsqueeze(-1) if x.dim() < tokens.dim() else x).expand(tokens.shape)


# 13 ------------------------------------------------------------------------------------------------------------------------


class ReferenceOutput(NamedTuple):
    """The fields of GRPOOutput; here log-probabilities and entropy are differentiable."""

    loss: Tensor
    logprobs: Tensor
    entropy: Tensor
    active: Tensor
    metrics: dict[str, Tensor]


def token_logprobs(
    logits: Tensor,  # [B, T, V], [B, T + 1, V] or [N, V]
    token_ids: Tensor,  # [B, T] or [N]
    mask: Tensor | None = None,  # like token_ids
    temperature: float | Tensor = 1.0,  # number, 0-d, [B], [B, 1], [B, T] or [N]
    softcap: float | None = None,
    logit_scale: float = 1.0,
    support: tuple[Tensor, Tensor] | None = None,  # ids and offsets of the kept sets of all positions
) -> tuple[Tensor, Tensor]:
    """Return the log-probability and the entropy of each token, 0 where masked."""
    logits = logits[..., : token_ids.shape[-1], :]  # [B, T + 1, V]: the last position predicts no token
    logits = logits if logits.dtype == torch.float64 else logits.float()
    kept = None
    if support is not None:
        kept = kept_sets(*support, logits.shape[-1]).view(logits.shape)
        kept = kept if mask is None else kept | (mask == 0).unsqueeze(-1)
    if mask is not None:
        mask = mask != 0
        logits, token_ids = torch.where(mask.unsqueeze(-1), logits, 0), torch.where(mask, token_ids, 0)
    if isinstance(temperature, Tensor):
        temperature = per_token(temperature.detach(), token_ids)
        temperature = (temperature if mask is None else torch.where(mask, temperature, 1)).to(logits.dtype)
    logprobs, entropy = token_statistics(logits, token_ids, temperature, softcap, logit_scale, kept)
    if mask is None:
        return logprobs, entropy
    return torch.where(mask, logprobs, 0), torch.where(mask, entropy, 0)


def grpo_loss(
    logits: Tensor,  # [B, T, V], [B, T + 1, V] or [N, V]
    token_ids: Tensor,  # [B, T] or [N]
    advantages: Tensor,  # [B], [B, T] or [N]
    config: LossConfig,
    *,
    old_logprobs: Tensor | None = None,  # like token_ids
    ref_logprobs: Tensor | None = None,  # like token_ids
    mask: Tensor | None = None,  # bool or 0/1, like token_ids
    rollout_weights: Tensor | None = None,  # [B, T], [B, 1] or [N]
    temperature: float | Tensor = 1.0,  # number, 0-d, [B], [B, 1], [B, T] or [N]
    cu_seqlens: Tensor | None = None,  # [S + 1]
    num_items: int | float | Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    support: tuple[Tensor, Tensor] | None = None,  # ids and offsets of the kept sets of B * T or N positions
    surrogate_inputs: dict[str, Tensor] | None = None,  # of a custom surrogate; [B], [B, 1], [B, T] or [N]
    loss_scale: float = 1.0,
    metrics_on: str = "all",
) -> ReferenceOutput:
    """Return the loss from logits; the arguments are those of ``grpo_fast.grpo_loss``."""
    mask = torch.ones_like(token_ids, dtype=torch.bool) if mask is None else mask != 0
    computed = mask
    if metrics_on == "active":
        computed = active_tokens(mask, per_token(advantages.detach(), token_ids), cu_seqlens, config)
    logprobs, entropy = token_logprobs(logits, token_ids, computed, temperature, softcap, logit_scale, support)
    loss, metrics = policy_loss(
        logprobs,
        entropy,
        advantages,
        config,
        mask=mask,
        computed=computed,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        rollout_weights=rollout_weights,
        surrogate_inputs=surrogate_inputs,
        cu_seqlens=cu_seqlens,
        num_items=num_items,
        loss_scale=loss_scale,
    )
    return ReferenceOutput(loss, logprobs, entropy, computed, metrics)
