"""What is looked at while training: the numbers of a rollout and of a loss, and what stops a run before it trains on something wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import grpo_fast as gf
from grpo_fast.generation import Completion
from grpo_fast.trainer.metrics import MetricAccumulator
from grpo_fast.trainer.rollout import Rollout
from grpo_fast.utils.statistics import standard_error
from grpo_fast.utils.text_statistics import distinct_share, repeated_ngrams

__all__ = [
    "Answer",
    "MicroBatch",
    "completion_records",
    "gradient_norm",
    "measure_loss",
    "measure_rewards",
    "measure_rollout",
    "sampler_gap",
    "summary_of_round",
    "summary_of_rounds",
    "what_is_not_finite",
    "whole",
]

_LOSS_METRICS = {
    "entropy": "entropy",
    "clip_low": "clip_ratio/low_mean",
    "clip_high": "clip_ratio/high_mean",
    "clip_region": "clip_ratio/region_mean",
    "ratio_mean": "ratio/mean",
    "kl": "kl",
}


class Answer(NamedTuple):
    """A completion, its prompt's tokens before it and its text after."""

    prompt_ids: list[int]
    completion: Completion
    text: str
    extra: dict[str, Any]  # what rewards say of it by ``log_extra``


class MicroBatch(NamedTuple):
    """Some rows of a rollout, and what is said of the whole optimiser step, over all processes: its tokens and its sequences."""

    rows: Rollout
    step_tokens: int
    step_sequences: int
    on_policy: bool  # the policy is still the one that sampled


def measure_rewards(metrics: MetricAccumulator, names: Sequence[str], rewards: Tensor, weights: Tensor, groups: gf.GroupAdvantages) -> None:
    """Of all processes' completions: ``rewards`` [B, R], whose ``weights`` are [R]."""
    metrics.mean("reward", _mean_of_sums(rewards, weights).nan_to_num())
    metrics.mean("reward_std", groups.std.mean())
    metrics.mean("frac_reward_zero_std", groups.degenerate.float().mean())
    for name, column in zip(names, rewards.unbind(1), strict=True):
        values = column[~column.isnan()]
        if values.numel():
            metrics.mean(f"rewards/{name}/mean", values.mean())
            metrics.mean(f"rewards/{name}/std", values.std(correction=min(1, values.numel() - 1)))


def measure_rollout(metrics: MetricAccumulator, answers: Sequence[Answer], groups: Sequence[int], rollout: Rollout) -> None:
    """Of this process's completions; ``groups``: to which prompt each belongs."""
    lengths, count = rollout.lengths, len(rollout)
    finished = [answer.completion.finished for answer in answers]
    terminated = [length for length, done in zip(lengths, finished, strict=True) if done]
    together: dict[int, list[str]] = {}
    for group, answer in zip(groups, answers, strict=True):
        together.setdefault(group, []).append(answer.text)
    metrics.add("completions/mean_length", sum(lengths), count)
    metrics.add("completions/mean_terminated_length", sum(terminated), len(terminated))
    metrics.largest("completions/max_length", float(max(lengths)))
    metrics.add("completions/clipped_ratio", finished.count(False), count)
    metrics.add("completions/repetition", sum(repeated_ngrams(ids) for ids in rollout.completion_ids), count)
    metrics.add("completions/distinct", sum(distinct_share(texts) for texts in together.values()), len(together))
    metrics.add("temperature", rollout.temperature.sum(), count)


@torch.no_grad()
def measure_loss(metrics: MetricAccumulator, out: gf.GRPOOutput, rows: Rollout, batch: MicroBatch, *, truncated: bool) -> None:
    """Means over the tokens that were computed, so that micro-batches count by their tokens.

    rows: those of the batch that were run through the model; truncated: the sampler draws from a part of the vocabulary.
    """
    computed = out.active.sum()
    for metric, name in _LOSS_METRICS.items():
        if metric != "kl" or "ref" in rows.tokens:
            metrics.mean(name, out.metrics[metric], computed)
    metrics.largest("ratio/max", out.metrics["ratio_max"])
    metrics.add("active_fraction", out.metrics["active_fraction"] * rows.num_loss_tokens(), batch.rows.num_loss_tokens())
    if batch.on_policy and "sampler" in rows.tokens:
        gap = torch.where(out.active, out.logprobs - rows.tokens["sampler"], 0.0).nan_to_num()
        metrics.add("sampling/sampling_logp_difference/mean", gap.abs().sum(), computed)
        metrics.largest("sampling/sampling_logp_difference/max", gap.abs().max())
        if truncated:  # p over the whole vocabulary / p over what was kept = the mass that was kept
            metrics.add("sampling/kept_mass", (gap.exp() * out.active).sum(), computed)


def sampler_gap(losses: Sequence[tuple[gf.GRPOOutput, MicroBatch]], most_left_out: float = 0.0) -> float:
    """Mean absolute difference of a token's log-probability between sampler and loss, in nats; 0 where the sampler says none.

    most_left_out: a sampler that truncates gives the tokens it keeps up to so much more; that is no difference.
    """
    scored = [(out, batch.rows) for out, batch in losses if batch.on_policy and "sampler" in batch.rows.tokens]
    gaps = [(rows.tokens["sampler"] - out.logprobs)[out.active] for out, rows in scored]
    together = torch.cat(gaps) if gaps else torch.zeros(0)
    together = (-together).clamp(min=0) + (together - most_left_out).clamp(min=0)
    return float(together.mean()) if together.numel() else 0.0


def whole(norm: Any) -> Any:
    """A norm under FSDP2 is a DTensor, divided among the processes, which all must call this; any other is as it is."""
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def gradient_norm(model: nn.Module) -> Tensor:  # []
    """Where nobody clips gradients, and so nobody has looked at them."""
    return torch.as_tensor(whole(nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])))


def what_is_not_finite(losses: Sequence[tuple[gf.GRPOOutput, MicroBatch]], norm: Any, model: nn.Module, where: str) -> str:
    """Why a step was refused, in words: which micro-batch, which completion, which of the loss's inputs."""
    said = f"The loss is not finite at {where}; the weights have not been changed by it."
    for number, (out, batch) in enumerate(losses):
        if bool(out.loss.isfinite()):
            continue
        wrong = (~out.logprobs.isfinite()).nonzero().flatten().tolist()
        said += f" Micro-batch {number}: loss {float(out.loss)}; "
        said += f"{len(wrong)} of {out.logprobs.numel()} log-probabilities are not finite"
        if wrong:
            ends = torch.tensor(batch.rows.lengths).cumsum(0).tolist()
            row = next(r for r, end in enumerate(ends) if wrong[0] < end)
            said += f", the first at token {wrong[0] - (ends[row - 1] if row else 0)} of completion {row}"
        columns = {"advantages": batch.rows.advantages, "temperature": batch.rows.temperature, **batch.rows.tokens}
        said += "".join(f"; {name} is not finite" for name, column in columns.items() if not bool(column.isfinite().all()))
        break
    else:
        gradient = norm is not None and not bool(torch.as_tensor(norm).isfinite())
        said = (
            f"{'The gradient' if gradient else 'The loss of another process'} is not finite at {where}; the weights have not been changed."
        )
    wrong_parameters = [name for name, p in model.named_parameters() if not bool(p.detach().isfinite().all())]
    said += f" Parameters: {'all finite' if not wrong_parameters else ', '.join(wrong_parameters[:3]) + ' not finite'}."
    return said + " Cure: a lower learning rate or max_grad_norm, bf16 in place of fp16; resume from the last checkpoint."


def completion_records(
    step: int,
    prompts: Sequence[Any],  # B
    answers: Sequence[Answer],  # B
    names: Sequence[str],  # R
    rewards: Tensor,  # [B, R]
    rollout: Rollout,  # B rows
) -> list[dict[str, Any]]:
    """What there is to see of each completion, fit for JSON."""
    return [
        {
            "step": step,
            "prompt": prompt,
            "completion": answer.text,
            "rewards": {name: None if math.isnan(x) else x for name, x in zip(names, scores, strict=True)},
            "advantage": advantage,
            "temperature": temperature,
            "extra": answer.extra,
        }
        for prompt, answer, scores, advantage, temperature in zip(
            prompts, answers, rewards.tolist(), rollout.advantages.tolist(), rollout.temperature.tolist(), strict=True
        )
    ]


def summary_of_round(names: Sequence[str], weights: Tensor, measured: Sequence[tuple[list[float], int, bool, float]]) -> dict[str, float]:
    """Means over an evaluation's completions; of each was measured: its rewards [R], its length, whether it was cut, its repetition."""
    rewards = torch.tensor([scores for scores, *_ in measured])
    found = {"reward": _mean_of_sums(rewards, weights).item()}
    for name, column in zip(names, rewards.unbind(1), strict=True):
        found[f"rewards/{name}/mean"] = column.nanmean().item()
    _, lengths, cut, repetition = zip(*measured, strict=True)
    found |= {
        "completions/mean_length": fmean(lengths),
        "completions/clipped_ratio": fmean(cut),
        "completions/repetition": fmean(repetition),
    }
    return found


def _mean_of_sums(rewards: Tensor, weights: Tensor) -> Tensor:  # [B, R], [R] -> []
    """The mean of the completions' weighted sums, each of the rewards that apply; of a completion without any there is none."""
    return (rewards.nan_to_num() @ weights.to(rewards.device))[~rewards.isnan().all(1)].mean()


def summary_of_rounds(rounds: Sequence[dict[str, float]], prefix: str) -> dict[str, float]:
    """The mean of each measure over the rounds of an evaluation and, for the rewards, its standard error: 0 for a single round.

    Example:
        >>> summary_of_rounds([{"reward": 1.0}, {"reward": 3.0}], "eval")
        {'eval_reward': 2.0, 'eval_reward_se': 1.0, 'eval_rounds': 2.0}
    """
    found = {f"{prefix}_{name}": fmean(measured[name] for measured in rounds) for name in rounds[0]}
    for name in [name for name in rounds[0] if name.startswith("reward")]:
        error = standard_error([measured[name] for measured in rounds]) if len(rounds) > 1 else 0.0
        found[f"{prefix}_{name.removesuffix('/mean')}{'/se' if '/' in name else '_se'}"] = error
    return found | {f"{prefix}_rounds": float(len(rounds))}
