"""Evaluation: several completions per prompt at ``eval_temperature``, averaged over rounds, with the standard error over the rounds."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

import torch
from accelerate.utils import gather_object
from torch import Tensor

from grpo_fast.data.streams import Stream
from grpo_fast.trainer.diagnostics import mean_weighted_reward
from grpo_fast.trainer.evaluation_loss import EvaluationLoss
from grpo_fast.trainer.metrics import MetricAccumulator
from grpo_fast.trainer.prompt_source import RowDataset
from grpo_fast.trainer.prompt_stream import evaluation_rows
from grpo_fast.utils.statistics import standard_error
from grpo_fast.utils.text_statistics import repeated_ngrams

if TYPE_CHECKING:
    from grpo_fast.trainer.grpo_trainer import GRPOTrainer

__all__ = ["EvaluatedCompletion", "add_means", "evaluate_dataset", "summarize_round", "summarize_rounds"]


class EvaluatedCompletion(NamedTuple):
    """The values of a completion that an evaluation keeps."""

    rewards: list[float]  # R, NaN where a reward does not apply
    length: int  # tokens
    truncated: bool  # cut at the length limit
    repetition: float  # share of repeated n-grams


def evaluate_dataset(trainer: GRPOTrainer, dataset: RowDataset | Stream, prefix: str) -> dict[str, float]:
    """Evaluate a dataset in ``eval_rounds`` rounds of one completion per prompt.

    Every process must call it. The random numbers depend on the run's seed and on the round only, so that evaluations of one run differ by
    their weights alone.

    Args:
        trainer: whose model, sampler, rewards and settings are used.
        dataset: rows with a ``prompt``; a stream is read to its end.
        prefix: of the metrics' names, such as "eval".

    Returns:
        Means over the rounds, the standard errors of the rewards, the loss (see `EvaluationLoss`), the temperature and the seconds.
    """
    started = time.perf_counter()
    rows = evaluation_rows(dataset)
    as_chat = trainer.completions.sends_as_chat(rows, f"{prefix}_dataset")
    step_metrics, trainer.metrics = trainer.metrics, MetricAccumulator()  # keep the seconds of an evaluation out of the step's metrics
    loss = EvaluationLoss(trainer, len(rows))
    try:
        rounds = [_evaluate_round(trainer, rows, number, as_chat, loss) for number in range(trainer.args.eval_rounds)]
        of_loss = loss.metrics()
    finally:
        trainer.metrics = step_metrics
    metrics = {f"{prefix}_{name}": value for name, value in of_loss.items()} | summarize_rounds(rounds, prefix)
    metrics[f"{prefix}_temperature"] = trainer.args.eval_temperature
    metrics[f"{prefix}_runtime"] = time.perf_counter() - started
    return metrics


def _evaluate_round(trainer: GRPOTrainer, dataset: RowDataset, number: int, as_chat: bool, loss: EvaluationLoss) -> dict[str, float]:
    args, process = trainer.args, trainer.accelerator.process_index
    share = -(-len(dataset) // trainer.accelerator.num_processes)  # rows per process; the last row pads the last process's share
    indices = [min(i, len(dataset) - 1) for i in range(process * share, (process + 1) * share)]
    evaluated = []
    for start in range(0, share, args.per_device_eval_batch_size):
        rows = [dataset[i] for i in indices[start : start + args.per_device_eval_batch_size]]
        temperatures = [args.eval_temperature] * len(rows)
        completions = trainer.completions.generate_completions(
            rows, temperatures, "evaluation", number, start, as_chat=as_chat, top_p=args.eval_top_p
        )
        rewards = trainer.completions.score(rows, completions, temperatures).tolist()
        for row, (values, generated) in enumerate(zip(rewards, completions, strict=True), start):
            loss.add(row, generated, values)
            completion, ids = generated.completion, generated.completion.token_ids
            evaluated.append(EvaluatedCompletion(values, len(ids), not completion.finished, repeated_ngrams(ids)))
    everyone = gather_object(evaluated)[: len(dataset)]  # without the rows that pad the last process's share, which are at the end
    return summarize_round(trainer.rewards.names, trainer.rewards.weights, everyone)


def summarize_round(names: Sequence[str], weights: Tensor, evaluated: Sequence[EvaluatedCompletion]) -> dict[str, float]:
    """Means over the completions of an evaluation round.

    Args:
        names: R names of rewards.
        weights: float32 [R], their weights.
        evaluated: the completions of all processes.
    """
    rewards = torch.tensor([each.rewards for each in evaluated])
    means = {"reward": mean_weighted_reward(rewards, weights).item()}
    for name, column in zip(names, rewards.unbind(1), strict=True):
        means[f"rewards/{name}/mean"] = column.nanmean().item()
    return means | {
        "completions/mean_length": fmean(each.length for each in evaluated),
        "completions/clipped_ratio": fmean(each.truncated for each in evaluated),
        "completions/repetition": fmean(each.repetition for each in evaluated),
    }


def summarize_rounds(rounds: Sequence[dict[str, float]], prefix: str) -> dict[str, float]:
    """Mean of each measure over the rounds of an evaluation and, for the rewards, its standard error, which is 0 for a single round.

    Example:
        >>> summarize_rounds([{"reward": 1.0}, {"reward": 3.0}], "eval")
        {'eval_reward': 2.0, 'eval_reward_se': 1.0, 'eval_rounds': 2.0}
    """
    summary = {f"{prefix}_{name}": fmean(measured[name] for measured in rounds) for name in rounds[0]}
    for name in [name for name in rounds[0] if name.startswith("reward")]:
        error = standard_error([measured[name] for measured in rounds]) if len(rounds) > 1 else 0.0
        summary[f"{prefix}_{name.removesuffix('/mean')}{'/se' if '/' in name else '_se'}"] = error
    return summary | {f"{prefix}_rounds": float(len(rounds))}


def add_means(results: dict[str, float], names: Sequence[str], prefix: str) -> dict[str, float]:
    """Add reward and loss as means over several datasets, by which the best checkpoint can be chosen.

    Example:
        >>> add_means({"eval_a_reward": 1.0, "eval_b_reward": 2.0}, ["a", "b"], "eval")["eval_reward"]
        1.5
    """
    for metric in ("reward", "loss"):
        values = [results[key] for name in names if (key := f"{prefix}_{name}_{metric}") in results]
        if values and len(values) == len(names):
            results[f"{prefix}_{metric}"] = fmean(values)
    return results
