"""The metrics of a rollout and of a loss, and the description of a loss or gradient that is not finite."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import grpo_fast as gf
from grpo_fast.trainer.completions import GeneratedCompletion
from grpo_fast.trainer.metrics import MetricAccumulator
from grpo_fast.trainer.rollout import MicroBatch, Rollout
from grpo_fast.utils.text_statistics import distinct_share, repeated_ngrams

__all__ = [
    "completion_records",
    "describe_nonfinite",
    "full_norm",
    "gradient_norm",
    "mean_weighted_reward",
    "measure_loss",
    "measure_rewards",
    "measure_rollout",
]

T = TypeVar("T")
_LOSS_METRICS = {  # key of GRPOOutput.metrics -> name in the log
    "entropy": "entropy",
    "clip_low": "clip_ratio/low_mean",
    "clip_high": "clip_ratio/high_mean",
    "clip_region": "clip_ratio/region_mean",
    "ratio_mean": "ratio/mean",
    "kl": "kl",
}


def measure_rewards(metrics: MetricAccumulator, names: Sequence[str], rewards: Tensor, weights: Tensor, groups: gf.GroupAdvantages) -> None:
    """Add the metrics of the rewards of a rollout.

    Args:
        metrics: where to add them.
        names: R names of rewards.
        rewards: float32 [B, R] of the completions of all processes, NaN where a reward does not apply.
        weights: float32 [R].
        groups: what `group_advantages` returned for them.
    """
    metrics.add_mean("reward", mean_weighted_reward(rewards, weights).nan_to_num())
    metrics.add_mean("reward_std_group", groups.std.mean())
    metrics.add_mean("frac_reward_zero_std", groups.degenerate.float().mean())
    for name, column in zip(names, rewards.unbind(1), strict=True):
        values = column[~column.isnan()]
        if values.numel():
            metrics.add_mean(f"rewards/{name}/mean", values.mean())
            metrics.add_mean(f"rewards/{name}/std", values.std(correction=min(1, values.numel() - 1)))


def mean_weighted_reward(rewards: Tensor, weights: Tensor) -> Tensor:
    """Return the mean over the completions of the weighted sum of the rewards that apply; completions without a reward are left out.

    Args:
        rewards: float32 [B, R], NaN where a reward does not apply.
        weights: float32 [R].

    Returns:
        float32, no dimensions; NaN if no reward applies to any completion.
    """
    return (rewards.nan_to_num() @ weights.to(rewards.device))[~rewards.isnan().all(1)].mean()


def measure_rollout(
    metrics: MetricAccumulator, completions: Sequence[GeneratedCompletion], groups: Sequence[int], rollout: Rollout
) -> None:
    """Add the metrics of the completions of this process; ``groups`` has the prompt's number of each of them."""
    lengths, count = rollout.lengths, len(rollout)
    finished = [each.completion.finished for each in completions]
    terminated = [length for length, done in zip(lengths, finished, strict=True) if done]
    texts: dict[int, list[str]] = {}
    for group, each in zip(groups, completions, strict=True):
        texts.setdefault(group, []).append(each.text)
    metrics.add_sum("completions/mean_length", sum(lengths), count)
    metrics.add_sum("completions/mean_terminated_length", sum(terminated), len(terminated))
    metrics.add_max("completions/max_length", float(max(lengths)))
    metrics.add_sum("completions/clipped_ratio", finished.count(False), count)
    metrics.add_sum("completions/repetition", sum(repeated_ngrams(ids) for ids in rollout.completion_ids), count)
    metrics.add_sum("completions/distinct", sum(distinct_share(group) for group in texts.values()), len(texts))
    metrics.add_sum("temperature", rollout.temperature.sum(), count)


@torch.no_grad()
def measure_loss(metrics: MetricAccumulator, out: gf.GRPOOutput, batch: MicroBatch, computed: Rollout, *, truncated: bool) -> None:
    """Add the metrics of a micro-batch's loss: means over the computed tokens, so that micro-batches are weighted by their tokens.

    Args:
        metrics: where to add them.
        out: the loss of ``computed``.
        batch: the micro-batch.
        computed: those of its rows that went through the model.
        truncated: whether the sampler draws from a part of the vocabulary (top-k, top-p, min-p) whose sets are not replayed, and nothing
            else makes its log-probabilities differ from the loss's.
    """
    num_computed = out.active.sum()
    for metric, name in _LOSS_METRICS.items():
        if metric != "kl" or "ref" in computed.tokens:
            metrics.add_mean(name, out.metrics[metric], num_computed)
    if "off_policy_masked" in out.metrics:
        metrics.add_mean("off_policy_masked", out.metrics["off_policy_masked"], float(len(computed)))
    if "rejected_tokens" in out.metrics:
        metrics.add_mean("sampling/rejected_tokens", out.metrics["rejected_tokens"], float(computed.num_loss_tokens()))
        metrics.add_mean("sampling/rejected_sequences", out.metrics["rejected_sequences"], float(computed.loss_mask.sum()))
    if "aux_loss" in out.metrics:
        metrics.add_mean("aux_loss", out.metrics["aux_loss"])
    metrics.add_max("ratio/max", out.metrics["ratio_max"])
    metrics.add_sum("active_fraction", out.metrics["active_fraction"] * computed.num_loss_tokens(), batch.rows.num_loss_tokens())
    if batch.on_policy and "sampler" in computed.tokens:
        gap = torch.where(out.active, out.logprobs - computed.tokens["sampler"], 0.0).nan_to_num()
        metrics.add_sum("sampling/sampling_logp_difference/mean", gap.abs().sum(), num_computed)
        metrics.add_max("sampling/sampling_logp_difference/max", gap.abs().max())
        if truncated:  # probability over the whole vocabulary / probability over the kept tokens = probability of the kept tokens
            metrics.add_sum("sampling/kept_mass", (gap.exp() * out.active).sum(), num_computed)


def full_norm(norm: T) -> T:
    """Return the full value of a gradient norm that FSDP2 returns as a DTensor; every process must call this. Other norms are unchanged."""
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def gradient_norm(model: nn.Module) -> Tensor:
    """Total norm of the gradients, for runs that do not clip gradients and so do not compute it otherwise."""
    return torch.as_tensor(full_norm(nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])))


def describe_nonfinite(
    losses: Sequence[tuple[gf.GRPOOutput, MicroBatch]], norm: float | Tensor | None, model: nn.Module, where: str
) -> str:
    """Describe why a step is rejected: which micro-batch, completion and input of the loss is not finite, and how to fix it.

    Args:
        losses: the outputs and micro-batches of the step in this process.
        norm: the gradient's norm, if it was computed.
        model: the model, whose parameters are checked too.
        where: step and process, for the message.
    """
    number = next((i for i, (out, _) in enumerate(losses) if not bool(out.loss.isfinite())), None)
    if number is None:
        gradient = norm is not None and not bool(torch.as_tensor(norm).isfinite())
        cause = "The gradient" if gradient else "The loss of another process"
        message = f"{cause} is not finite at {where}; the weights have not been changed."
    else:
        message = f"The loss is not finite at {where}; the weights have not been changed by it. " + _describe_loss(number, *losses[number])
    nonfinite = [name for name, p in model.named_parameters() if not bool(p.detach().isfinite().all())]
    message += f" Parameters: {', '.join(nonfinite[:3]) + ' not finite' if nonfinite else 'all finite'}."
    return message + " Fix: a lower learning rate or max_grad_norm, bf16 in place of fp16; resume from the last checkpoint."


def _describe_loss(number: int, out: gf.GRPOOutput, batch: MicroBatch) -> str:
    wrong = (~out.logprobs.isfinite()).nonzero().flatten().tolist()
    message = f"Micro-batch {number}: loss {float(out.loss)}; {len(wrong)} of {out.logprobs.numel()} log-probabilities are not finite"
    if wrong:
        ends = torch.tensor(batch.rows.lengths).cumsum(0).tolist()
        row = next(r for r, end in enumerate(ends) if wrong[0] < end)
        message += f", the first at token {wrong[0] - (ends[row - 1] if row else 0)} of completion {row}"
    columns = {"advantages": batch.rows.advantages, "temperature": batch.rows.temperature, **batch.rows.tokens}
    return message + "".join(f"; {name} is not finite" for name, column in columns.items() if not bool(column.isfinite().all())) + "."


def completion_records(
    step: int,
    prompts: Sequence[object],
    completions: Sequence[GeneratedCompletion],
    names: Sequence[str],
    rewards: Tensor,
    rollout: Rollout,
) -> list[dict[str, Any]]:
    """The completions of a rollout as records for JSON.

    Args:
        step: the optimizer step at which they were drawn.
        prompts: B prompts, strings or lists of chat messages.
        completions: B completions.
        names: R names of rewards.
        rewards: float32 [B, R].
        rollout: its B rows.
    """
    return [
        {
            "step": step,
            "prompt": prompt,
            "completion": each.text,
            "rewards": {name: None if math.isnan(value) else value for name, value in zip(names, values, strict=True)},
            "advantage": advantage,
            "temperature": temperature,
            "extra": each.extra,
        }
        for prompt, each, values, advantage, temperature in zip(
            prompts, completions, rewards.tolist(), rollout.advantages.tolist(), rollout.temperature.tolist(), strict=True
        )
    ]
