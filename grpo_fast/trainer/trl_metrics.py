"""Metrics that are logged for dashboards made for TRL, with TRL's names, and the table of all metrics (docs/metrics.md lists it)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

import grpo_fast as gf
from grpo_fast.trainer.metrics import MetricAccumulator
from grpo_fast.trainer.rollout import Rollout

__all__ = ["METRICS", "NOT_LOGGED", "measure_clipping", "measure_lengths", "measure_reward_spread", "step_seconds"]

# NAME stands for the name of a reward, PART for a part of a step. Minima and maxima are those since the last log.
METRICS: dict[str, str] = {
    "loss": "loss of the step",
    "grad_norm": "norm of the gradient before clipping",
    "learning_rate": "of the step",
    "epoch": "passes over the dataset",
    "num_tokens": "tokens of prompts and completions since the start",
    "tokens_per_second": "since the last log",
    "temperature": "mean over the completions",
    "reward": "mean over the completions of the weighted sum of the rewards",
    "reward_std": "standard deviation over all completions of the rollout, as in TRL 1.16",
    "reward_std_all": "the same as `reward_std`",
    "reward_std_group": "mean over the groups of their standard deviation",
    "frac_reward_zero_std": "share of the groups whose rewards are all equal",
    "rewards/NAME/mean": "of the reward, without the completions to which it does not apply",
    "rewards/NAME/std": "likewise, over all completions",
    "rewards/NAME/applicable": "share of the completions to which it applies",
    "rewards/NAME/errors": "calls that failed; likewise `timeouts`, and other counts that are not 0",
    "rewards/NAME/seconds": "of a call",
    "completions/mean_length": "tokens",
    "completions/min_length": "tokens",
    "completions/max_length": "tokens",
    "completions/mean_terminated_length": "tokens, of the completions that ended before the limit",
    "completions/min_terminated_length": "likewise",
    "completions/max_terminated_length": "likewise",
    "completions/clipped_ratio": "share of the completions that were cut at the limit",
    "completions/repetition": "share of repeated n-grams",
    "completions/distinct": "share of distinct n-grams in a group",
    "entropy": "nats per token, at the temperature of the loss",
    "kl": "divergence from the reference policy, nats per token",
    "clip_ratio/low_mean": "share of the tokens that are clipped at the lower bound",
    "clip_ratio/low_min": "least such share of a sequence",
    "clip_ratio/high_mean": "share of the tokens that are clipped at the upper bound",
    "clip_ratio/high_max": "largest such share of a sequence",
    "clip_ratio/region_mean": "share of the tokens that are clipped",
    "cispo_clip_ratio": "with `cispo`: share of the tokens whose ratio is above the bound, with a positive advantage",
    "ratio/mean": "of current to old policy",
    "ratio/max": "likewise",
    "active_fraction": "share of the tokens that can change the gradient",
    "aux_loss": "load-balancing loss of a mixture of experts, without its coefficient",
    "entropy_coef": "coefficient of the entropy bonus after the step; while adaptive",
    "off_policy_masked": "share of the sequences that `off_policy_mask_threshold` leaves out",
    "sampling/sampling_logp_difference/mean": "absolute difference of sampler and loss, nats per token",
    "sampling/sampling_logp_difference/max": "likewise",
    "sampling/importance_sampling_ratio/min": "weight that corrects for the sampler",
    "sampling/importance_sampling_ratio/mean": "likewise",
    "sampling/importance_sampling_ratio/max": "likewise",
    "sampling/rejected_tokens": "share of the tokens in the loss that `rollout_rs` rejects",
    "sampling/rejected_sequences": "share of the sequences in the loss of which it rejects a token",
    "sampling/kept_mass": "probability of the tokens that truncated sampling keeps",
    "dynamic_sampling/attempts": "how often groups were drawn again",
    "step_time": "seconds of a step without its optimizer",
    "step_time/PART": "seconds of its parts",
}

NOT_LOGGED: dict[str, str] = {  # TRL's names that have no equivalent
    "policy_loss": "is loss + entropy_coef * entropy with the losses that average over tokens",
    "vespo/phi_seq_mean": "the weight is computed inside the kernel only",
    "tools/call_frequency": "there are no tools",
    "tools/failure_frequency": "there are no tools",
}


def measure_lengths(metrics: MetricAccumulator, lengths: Sequence[int], finished: Sequence[bool]) -> None:
    """Add the least length of completions, and the least and largest of those that ended before the limit."""
    metrics.add_min("completions/min_length", float(min(lengths)))
    terminated = [float(length) for length, done in zip(lengths, finished, strict=True) if done]
    if terminated:
        metrics.add_min("completions/min_terminated_length", min(terminated))
        metrics.add_max("completions/max_terminated_length", max(terminated))


def measure_reward_spread(metrics: MetricAccumulator, rewards: Tensor, weights: Tensor) -> None:
    """Add TRL's ``reward_std``: the unbiased standard deviation of the weighted sum of the rewards, over all completions with a reward.

    Args:
        metrics: where to add it.
        rewards: float32 [B, R] of all processes, NaN where a reward does not apply.
        weights: float32 [R].
    """
    total = (rewards.nan_to_num() @ weights.to(rewards.device))[~rewards.isnan().all(1)]
    if total.numel() > 1:
        for name in ("reward_std", "reward_std_all"):
            metrics.add_mean(name, total.std())


@torch.no_grad()
def measure_clipping(metrics: MetricAccumulator, out: gf.GRPOOutput, rows: Rollout, config: gf.LossConfig, *, left_out: bool) -> None:
    """Add the extremes over the sequences of the shares of clipped tokens, for losses that clip; and CISPO's share.

    Args:
        metrics: where to add them.
        out: the loss of ``rows``.
        rows: a micro-batch's rows that went through the model.
        config: of the loss.
        left_out: whether the micro-batch has other rows, which did not go through the model: nothing in them is clipped.
    """
    surrogate = "clip" if config.custom is not None else config.surrogate
    if surrogate == "cispo":
        metrics.add_mean("cispo_clip_ratio", out.metrics["clip_high"], out.active.sum())
    if surrogate != "clip" or not bool(rows.loss_mask.any()):
        return
    device = out.logprobs.device
    lengths = torch.tensor(rows.lengths)
    sequence = torch.arange(len(rows)).repeat_interleave(lengths).to(device)
    log_ratio = torch.zeros_like(out.logprobs)
    if "old" in rows.tokens:
        log_ratio = torch.where(out.active, out.logprobs - rows.tokens["old"], 0.0)

    def mean(values: Tensor) -> Tensor:  # [N] -> [S]
        return values.new_zeros(len(rows)).index_add(0, sequence, values) / lengths.to(device)

    if config.level != "token":
        log_ratio = mean(log_ratio)[sequence]
    ratio, advantages = log_ratio.exp(), rows.advantages.to(device)[sequence]
    counted = rows.loss_mask.to(device)
    low = mean(((ratio < 1 - config.epsilon_low) & (advantages < 0)).float())[counted].min()
    high = mean(((ratio > 1 + config.epsilon_high) & (advantages > 0)).float())[counted].max()
    metrics.add_min("clip_ratio/low_min", torch.zeros_like(low) if left_out else low)
    metrics.add_max("clip_ratio/high_max", high)


def step_seconds(logs: Mapping[str, float]) -> dict[str, float]:
    """The seconds of a step without its optimizer, as ``step_time``, from those of its parts; nothing if there are none."""
    parts = [value for name, value in logs.items() if name.startswith("step_time/") and name != "step_time/optimizer"]
    return {"step_time": sum(parts)} if parts else {}
