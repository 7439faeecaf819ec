"""The specification: from rewards to advantages, and from logits to the loss of the GRPO family, in plain PyTorch of any float type.
Read it from top to bottom.

A prompt is answered by a group of completions, each is scored, and what counts is how much better a completion did than its siblings:

    1. weighted_sum            rewards r_ik     ->  one number x_i per completion; NaN where no reward applies ("unscorable")
    2. group_moments           x, group         ->  count, mean and unbiased std of each group, and whether its values are all equal
    3. normalized              x, moments       ->  (x_i - baseline) / (std + eps), exactly 0 in a group of equal values
    4. group_advantages        1 to 3, over the group or over the batch, rewards summed before or after

For a token with logits z and temperature T the policy is p = softmax(s), s = f(z) / T, where f is an optional scale followed by an optional
soft cap. The sampler drew the token y from this same p, so the policy that is trained is this same p:

    5. token_statistics        z, y             ->  log p_y  and the entropy of p
    6. importance_log_ratio    log p_y, old     ->  how far the policy has moved: per token (PPO), or per sequence (GSPO)
    7. surrogate               ratio, A         ->  the objective of one token
    8. kl_penalty              log p_y, ref     ->  the distance to a reference policy
    9. aggregation_weights     mask             ->  one weight per token:  loss = sum_n w_n * l_n
   10. policy_loss             6 to 9 in one: everything behind the logits

Autograd through this page is the gradient; the kernels compute the same by hand. Whatever stands under a 0 of the mask (NaN, -100) has no
effect: it is replaced before any arithmetic, so that it can reach neither the value nor the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from grpo_fast.loss.config import LossConfig

# 1 ------------------------------------------------------------------------------------------------------------------------


def weighted_sum(
    rewards: Tensor,  # [B, R], NaN = does not apply
    weights: Tensor,  # [R]
) -> Tensor:  # [B]
    """Sum the rewards that apply to a completion; NaN where none does, so that 0 keeps meaning a reward of 0."""
    applies = ~rewards.isnan()
    total = torch.where(applies, weights * rewards, 0.0).sum(1)
    return torch.where(applies.any(1), total, math.nan)


# 2 ------------------------------------------------------------------------------------------------------------------------


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


# 3 ------------------------------------------------------------------------------------------------------------------------


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


# 5 ------------------------------------------------------------------------------------------------------------------------


def token_statistics(
    logits: Tensor,  # [..., V]
    token_ids: Tensor,  # [...]
    temperature: float | Tensor = 1.0,  # number, or [...]
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:  # [...], [...]
    """Log-probability of the sampled token, and entropy of the policy it was sampled from.

    The target is left out of the log-sum-exp: ``log p_y = -softplus(lse_{v != y}(s_v) - s_y)``. The usual ``s_y - lse`` is the
    difference of two almost equal numbers when p_y is almost 1, and exactly 0 in float32 from a margin of some 14 nats on; this form keeps
    every digit.
    """
    s = logits * logit_scale
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)  # Gemma 2, arXiv:2408.00118
    s = s / (temperature.unsqueeze(-1) if isinstance(temperature, Tensor) else temperature)

    is_target = torch.arange(s.shape[-1], device=s.device) == token_ids.unsqueeze(-1)  # [..., V]
    s_target = s.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
    others = s.masked_fill(is_target, -math.inf)
    alone = (others == -math.inf).all(-1)  # every other token suppressed: certain, where the gradient of logsumexp would be NaN
    lse_others = others.masked_fill(alone.unsqueeze(-1), 0.0).logsumexp(-1).masked_fill(alone, -math.inf)
    logprob = F.logsigmoid(s_target - lse_others)  # = -softplus(lse_others - s_target)

    # H = -sum p log p over logits that are not -inf, with the exact log p of the target.
    log_p = torch.where(is_target, logprob.unsqueeze(-1), s - (s_target - logprob).unsqueeze(-1))
    p = log_p.exp()
    entropy = -(p * log_p.masked_fill(p == 0, 0.0)).sum(-1)
    return logprob, entropy


# 6 ------------------------------------------------------------------------------------------------------------------------


class Sequences:
    """Which tokens belong together: the rows of a padded [B, T] batch, or the slices of a packed [N] one."""

    def __init__(self, token_ids: Tensor, cu_seqlens: Tensor | None = None):
        self.segment: Tensor | None = None  # sequence of each token in rising order, packed input only
        if cu_seqlens is None:
            self.count = token_ids.shape[0] if token_ids.dim() == 2 else 1
        else:
            self.count = cu_seqlens.shape[0] - 1
            position = torch.arange(token_ids.shape[-1], device=token_ids.device)
            self.segment = torch.searchsorted(cu_seqlens[1:].contiguous(), position, right=True)

    @classmethod
    def numbered(cls, segment: Tensor, count: int) -> Sequences:
        """From the number of each packed token's sequence, [N] in rising order."""
        sequences = cls(segment)
        sequences.segment, sequences.count = segment, count
        return sequences

    def total(self, x: Tensor) -> Tensor:
        """Give every token the sum of x over its sequence; x and result shaped like the tokens (padded: the result is [B, 1])."""
        if self.segment is None:
            return x.sum(-1, keepdim=True)
        # Slices, and not index_add, which adds up in another order each time on a GPU.
        offsets = torch.searchsorted(self.segment, torch.arange(self.count + 1, device=x.device))
        per_sequence = torch.segment_reduce(
            x.expand(*x.shape[:-1], self.segment.shape[0]).reshape(-1), "sum", offsets=offsets, axis=0, unsafe=True
        )
        return per_sequence.index_select(0, self.segment).view(*x.shape[:-1], -1)

    def take(self, tokens: Tensor | slice) -> Sequences:
        """The same of some tokens, in their order; packed input only."""
        assert self.segment is not None
        return Sequences.numbered(self.segment[tokens], self.count)

    def mean(self, x: Tensor, mask: Tensor) -> Tensor:
        """Give every token the mean of x over its sequence's unmasked tokens; 0 for a sequence without any."""
        return self.total(x * mask) / self.total(mask.to(x.dtype)).clamp(min=1)


def importance_log_ratio(log_ratio: Tensor, mask: Tensor, sequences: Sequences, level: str) -> Tensor:
    """The log of the importance ratio at its level; log_ratio is 0 under the mask's zeros.

    token           log p_y - log p_y^old                               PPO, arXiv:1707.06347; GRPO, arXiv:2402.03300
    sequence        its mean over the sequence, shared by its tokens    GSPO, arXiv:2507.18071
    sequence_token  the value of the mean, the gradient of the token    GSPO-token, arXiv:2507.18071 section 4.3
    """
    if level == "token":
        return log_ratio
    mean = sequences.mean(log_ratio, mask)
    if level == "sequence":
        return mean.expand_as(log_ratio)
    gradient_alone = (log_ratio - log_ratio.detach()).nan_to_num(nan=0.0)  # 0; inf - inf where the sampler's log-probability is -inf
    return mean.detach() + gradient_alone


# 7 ------------------------------------------------------------------------------------------------------------------------


def surrogate(ratio: Tensor, advantages: Tensor, logprobs: Tensor, phi: Tensor | None, config: LossConfig) -> Tensor:
    """The loss of one token, elementwise; r the ratio, A the advantage, sg() stops the gradient.

    clip       max(-min(r, delta) A, -clip(r, 1 - eps_low, 1 + eps_high) A)      GRPO, arXiv:2402.03300; delta: arXiv:2505.07291
               and at most -c A where A < 0, with dual_clip = c                  arXiv:1912.09729
    cispo      -sg(min(r, eps_high)) A log p                                     MiniMax-M1, arXiv:2506.13585
    sapo       -4/tau sigmoid(tau (r - 1)) A, tau by the sign of A               SAPO, arXiv:2511.20347
    vespo      -phi A log p, phi from vespo_phi                                  VESPO, arXiv:2602.10693
    reinforce  -A log p
    """
    if config.surrogate == "clip":
        unclipped = ratio if config.delta is None else ratio.clamp(max=config.delta)
        clipped = ratio.clamp(1 - config.epsilon_low, 1 + config.epsilon_high)
        loss = torch.maximum(-unclipped * advantages, -clipped * advantages)
        if config.dual_clip is not None:
            loss = torch.where(advantages < 0, torch.minimum(loss, -config.dual_clip * advantages), loss)
        return loss
    if config.surrogate == "cispo":
        return -ratio.detach().clamp(max=config.epsilon_high) * advantages * logprobs
    if config.surrogate == "sapo":
        tau = by_sign(advantages > 0, config.sapo_temperature_pos, config.sapo_temperature_neg, ratio.dtype)
        return -4 / tau * torch.sigmoid(tau * (ratio - 1)) * advantages
    if config.surrogate == "vespo":
        assert phi is not None
        return -phi * advantages * logprobs
    return -advantages * logprobs


def by_sign(positive: Tensor, if_positive: float, otherwise: float, dtype: torch.dtype) -> Tensor:
    """One of two settings per token, in full precision: torch.where of two numbers would round them to float32."""
    return torch.full_like(positive, otherwise, dtype=dtype).masked_fill(positive, if_positive)


def vespo_phi(log_ratio: Tensor, advantages: Tensor, log_rollout: Tensor | None, sequences: Sequences, config: LossConfig) -> Tensor:
    """VESPO's weight of a sequence, arXiv:2602.10693: phi = W^k exp(lambda (1 - W)), W = the product of its tokens' ratios and of its
    rollout weights (which are therefore not applied again); (k, lambda) by the sign of A. No gradient flows through it.

    log_ratio is 0 under the mask's zeros; log_rollout is the sequence's log rollout weight, or None.
    """
    floor, clamp = math.log(1e-8), config.log_ratio_clamp
    log_w = sequences.total(log_ratio.detach().clamp(-clamp, clamp))
    log_w = (log_w if log_rollout is None else log_w + log_rollout).clamp(floor, clamp)
    k = by_sign(advantages >= 0, config.vespo_k_pos, config.vespo_k_neg, log_w.dtype)
    lam = by_sign(advantages >= 0, config.vespo_lambda_pos, config.vespo_lambda_neg, log_w.dtype).clamp(min=1e-4)
    return (lam + k * log_w - lam * log_w.exp()).exp().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


# 8 ------------------------------------------------------------------------------------------------------------------------


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, estimator: str, clamp: float) -> Tensor:
    """An estimate of KL(policy || reference) from the sampled token, d = log p_ref - log p (Schulman,
    http://joschu.net/blog/kl-approx.html).

    k1  -d              unbiased, high variance
    k2  d^2 / 2         biased, its gradient is the unbiased one
    k3  exp(d) - 1 - d  unbiased, never negative; as expm1(d) - d, since exp(d) - d - 1 cancels for small d
    """
    d = ref_logprobs - logprobs
    if estimator == "k1":
        return -d
    if estimator == "k2":
        return d * d / 2
    d = d.clamp(-clamp, clamp)
    return torch.expm1(d) - d


# 9 ------------------------------------------------------------------------------------------------------------------------


def aggregation_weights(
    aggregation: str,
    mask: Tensor,  # bool, [B, T] or [N]
    sequences: Sequences,
    num_items: int | float | Tensor | None = None,
    max_completion_length: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:  # broadcastable to the mask
    """The weight of each token, |o| its sequence's unmasked tokens and S the number of sequences, fully masked ones included.

    sequence_mean      1 / (S |o|)            GRPO, GSPO, SAPO: each sequence counts the same
    token_mean         1 / sum |o|            BNPO: each token counts the same
    global_token_mean  1 / num_items          DAPO, CISPO, VESPO: the same over all micro-batches and processes
    fixed_length       1 / (S L_max)          Dr. GRPO, arXiv:2503.20783: no length bias
    sequence_sum       1 / S                  LUSPO, arXiv:2602.05261: a sequence counts by its length

    nonempty_sequence_mean and nonempty_sequence_sum count the sequences that have an unmasked token alone (verl, OpenRLHF).
    """
    if aggregation.startswith("nonempty_"):
        share = sequences.total(mask.to(dtype)).clamp(min=1).reciprocal()
        count_nonempty = (mask * share).sum().round().clamp(min=1)
        return share / count_nonempty if aggregation == "nonempty_sequence_mean" else count_nonempty.reciprocal()
    count = max(sequences.count, 1)
    if aggregation == "sequence_mean":
        return (count * sequences.total(mask.to(dtype)).clamp(min=1)).reciprocal()
    if aggregation == "fixed_length":
        assert max_completion_length is not None  # LossConfig sees to it
        return torch.full((), 1 / (count * max_completion_length), dtype=dtype, device=mask.device)
    if aggregation == "sequence_sum":
        return torch.full((), 1 / count, dtype=dtype, device=mask.device)
    if aggregation == "global_token_mean" and num_items is not None:
        if not isinstance(num_items, Tensor):  # filled on the device: a number copied there would be waited for
            num_items = torch.full((), num_items, dtype=dtype, device=mask.device)
        return num_items.to(mask.device, dtype).clamp(min=1).reciprocal()
    return mask.sum().to(dtype).clamp(min=1).reciprocal()


# 10 ------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Policy:
    """What is known of the tokens beside the logits; tensors shaped like the tokens, or broadcastable to them."""

    config: LossConfig
    mask: Tensor  # bool: the tokens that count
    sequences: Sequences
    advantages: Tensor
    weights: Tensor  # of each token in the loss, from aggregation_weights
    entropy_weights: Tensor  # of each token in the entropy bonus
    old_logprobs: Tensor | None = None  # None: on-policy
    ref_logprobs: Tensor | None = None
    rollout_weights: Tensor | None = None
    rollout_per_sequence: bool = False  # the rollout weights are one number per sequence, shared by its tokens
    loss_scale: float = 1.0

    def active(self) -> Tensor:
        """The tokens that can change the gradient: those that count and have a KL or entropy term or an advantage other than 0. Where
        a weight is made from a whole sequence, all of a sequence's tokens are active or none."""
        if self.config.beta != 0 or self.config.entropy_coef != 0:
            return self.mask
        active = self.mask & (self.advantages != 0)
        if self.config.level != "token" or self.config.surrogate == "vespo":
            active = self.mask & (self.sequences.total(active.float()) > 0)
        return active

    def active_fraction(self) -> Tensor:
        """The share of the tokens that count which are active, 0-d float32."""
        return self.active().sum() / self.mask.sum().clamp(min=1)

    def packed(self) -> Policy:
        """The same with every tensor [1, N], the sequences of a padded batch one after the other."""
        shape = self.mask.shape
        sequences = self.sequences
        if sequences.segment is None:
            ends = torch.arange(shape[0] + 1, device=self.mask.device) * shape[1]
            sequences = Sequences(self.mask.reshape(1, -1), ends)
        return self._each(lambda x: x.expand(shape).reshape(1, -1), sequences)

    def take(self, tokens: Tensor | slice) -> Policy:
        """The same of some tokens, from a packed one."""
        return self._each(lambda x: x[:, tokens], self.sequences.take(tokens))

    def _each(self, change: Callable[[Tensor], Tensor], sequences: Sequences) -> Policy:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        changed: dict[str, Any] = {name: change(x) for name, x in values.items() if isinstance(x, Tensor)}
        return replace(self, sequences=sequences, **changed)

    def token_level(self) -> Policy | None:
        """A policy of ratios that belong to single tokens with the same loss and gradient; None where a token's gradient depends on the
        log-probabilities of other tokens.

        On-policy every ratio is 1 whatever its level, so that only its slope counts: that of exp(mean of lr) spreads the sequence's mean of
        the advantages over its tokens, and VESPO's weight is a constant.
        """
        config = self.config
        if config.level == "token" and config.surrogate != "vespo":
            return self
        if self.old_logprobs is not None or (config.level == "sequence" and config.beta != 0 and config.bias_corrected_kl):
            return None
        if config.surrogate == "vespo":
            zero = torch.zeros_like(self.weights.expand(self.mask.shape))
            phi = torch.where(self.mask, vespo_phi(zero, self.advantages, self.log_rollout(self.mask), self.sequences, config), 0)
            return replace(self, config=replace(config, loss_type="reinforce"), advantages=phi * self.advantages, rollout_weights=None)
        if config.level == "sequence_token" or config.surrogate == "cispo":  # the slope is the token's own
            return replace(self, config=replace(config, importance_sampling_level="token"))
        if config.surrogate == "sapo":  # its value depends on the sign of each advantage
            return None
        advantages = self.advantages if self.rollout_weights is None else self.advantages * self.rollout_weights
        mean = self.sequences.mean(torch.where(self.mask, advantages, 0), self.mask)
        return replace(self, config=replace(config, importance_sampling_level="token"), advantages=mean, rollout_weights=None)

    def log_rollout(self, computed: Tensor) -> Tensor | None:
        """The logarithm of each sequence's rollout weight, for VESPO."""
        if self.rollout_weights is None:
            return None
        logs = torch.where(computed, self.rollout_weights, 1).log().clamp(math.log(1e-8), self.config.log_ratio_clamp)
        return self.sequences.mean(logs, computed) if self.rollout_per_sequence else self.sequences.total(logs)


def policy_loss(logprobs: Tensor, entropy: Tensor, policy: Policy, computed: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and its metrics from log-probabilities and entropies, which are only looked at where ``computed`` (all the tokens that
    count, or just the active ones: the loss is the same)."""
    loss, ratio, kl = token_losses(logprobs, policy, computed)
    entropy = torch.where(computed, entropy, 0).to(logprobs.dtype)
    total = (policy.weights * loss).sum()
    if policy.config.entropy_coef != 0:
        total = total - policy.config.entropy_coef * (policy.entropy_weights * entropy).sum()
    advantages = torch.where(computed, policy.advantages, 0).to(logprobs.dtype)
    return total * policy.loss_scale, policy_metrics(ratio, kl, entropy, advantages, policy, computed)


def token_losses(logprobs: Tensor, policy: Policy, computed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the weights are applied to: the loss of each token, 0 where not computed; and its ratio and KL estimate.

    Order of the factors as in TRL: rollout weights multiply the surrogate and not the KL, which is added after.
    """
    config, sequences, clamp = policy.config, policy.sequences, policy.config.log_ratio_clamp

    def select(x: Tensor) -> Tensor:  # before any arithmetic: 0 * inf and 0 * nan are nan
        return torch.where(computed, x, 0).to(logprobs.dtype)

    logprobs, advantages = select(logprobs), select(policy.advantages)
    rollout_weights = None if policy.rollout_weights is None else select(policy.rollout_weights)

    log_ratio = logprobs - (logprobs.detach() if policy.old_logprobs is None else select(policy.old_logprobs))
    ratio = importance_log_ratio(log_ratio, computed, sequences, config.level).clamp(-clamp, clamp).exp()
    phi = None
    if config.surrogate == "vespo":
        phi = vespo_phi(log_ratio, advantages, policy.log_rollout(computed), sequences, config)

    loss = surrogate(ratio, advantages, logprobs, phi, config)
    if rollout_weights is not None and config.surrogate != "vespo":
        loss = loss * rollout_weights
    kl = torch.zeros_like(logprobs)
    if policy.ref_logprobs is not None:
        kl = kl_penalty(logprobs, select(policy.ref_logprobs), config.kl_estimator, clamp)
    if config.beta != 0:
        loss = loss + config.beta * (kl * ratio if config.bias_corrected_kl else kl)
    return select(loss), ratio, kl


@torch.no_grad()
def policy_metrics(ratio: Tensor, kl: Tensor, entropy: Tensor, advantages: Tensor, policy: Policy, computed: Tensor) -> dict[str, Tensor]:
    """Means over the computed tokens as 0-d float32 tensors: what each says is in GRPOOutput's docstring."""
    config = policy.config
    below, above = torch.zeros_like(computed), torch.zeros_like(computed)
    if config.surrogate == "clip":
        below, above = ratio < 1 - config.epsilon_low, ratio > 1 + config.epsilon_high
    elif config.surrogate == "cispo":
        above = ratio > config.epsilon_high
    clip_low, clip_high = below & (advantages < 0), above & (advantages > 0)

    def mean(x: Tensor, over: Tensor) -> Tensor:
        return (torch.where(over, x, 0).sum(dtype=torch.float64) / over.sum().clamp(min=1)).float()

    ratio_max = torch.where(computed, ratio, 0).amax() if computed.numel() else torch.zeros((), device=computed.device)
    return {
        "kl": mean(kl, computed),
        "entropy": mean(entropy, computed),
        "ratio_mean": mean(ratio, computed),
        "ratio_max": ratio_max.float(),
        "clip_low": mean(clip_low.float(), computed),
        "clip_high": mean(clip_high.float(), computed),
        "clip_region": mean((clip_low | clip_high).float(), computed),
        "active_fraction": policy.active_fraction(),
    }
