"""The loss of the policy on the completions of an evaluation, and their other metrics that TRL's evaluations report."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

import grpo_fast as gf
from grpo_fast.models.unwrap import eval_mode
from grpo_fast.trainer.advantages import compute_advantages
from grpo_fast.trainer.completions import GeneratedCompletion
from grpo_fast.trainer.metrics import MetricAccumulator
from grpo_fast.trainer.rollout import Rollout
from grpo_fast.trainer.surrogate_columns import add_columns
from grpo_fast.trainer.trl_metrics import measure_lengths, measure_reward_spread

if TYPE_CHECKING:
    from grpo_fast.trainer.grpo_trainer import GRPOTrainer

__all__ = ["EvaluationLoss"]


class _Drawn(NamedTuple):
    """A completion of an evaluation with its rewards, R numbers."""

    completion: GeneratedCompletion
    rewards: list[float]


class EvaluationLoss:
    """Collects the completions of an evaluation in this process, and computes the loss of the policy on them.

    The completions of a prompt, one per round, are a group. The policy is the one that drew them, so that all ratios are 1, and the loss
    is that of a training step before its first update, without a gradient. Its temperature is ``eval_temperature``, or that of training
    if completions are drawn greedily.

    Args:
        trainer: whose model, reference policy and settings are used.
        prompts: how many, over all processes.
    """

    def __init__(self, trainer: GRPOTrainer, prompts: int) -> None:
        self.trainer = trainer
        processes, process = trainer.accelerator.num_processes, trainer.accelerator.process_index
        share = -(-prompts // processes)  # the last processes repeat prompts, which do not count
        self._counted = min(max(prompts - process * share, 0), share)
        self._drawn: list[list[_Drawn]] = [[] for _ in range(share)]

    def add(self, prompt: int, completion: GeneratedCompletion, rewards: list[float]) -> None:
        """Add a completion of a prompt, which is counted from 0 in this process, with its rewards."""
        self._drawn[prompt].append(_Drawn(completion, rewards))

    def metrics(self) -> dict[str, float]:
        """The metrics by TRL's names without a prefix, over the completions of all processes. Every process must call it."""
        trainer, args = self.trainer, self.trainer.args
        rollout, rewards, groups = self._rollout()
        found = MetricAccumulator()
        found.add_mean("reward_std_group", groups.std.nanmean())
        found.add_mean("frac_reward_zero_std", groups.degenerate.float().mean())
        measure_reward_spread(found, rewards, trainer.rewards.weights)
        drawn = [each.completion.completion for group in self._drawn[: self._counted] for each in group]
        if drawn:
            lengths = [len(each.token_ids) for each in drawn]
            terminated = [length for length, each in zip(lengths, drawn, strict=True) if each.finished]
            measure_lengths(found, lengths, [each.finished for each in drawn])
            found.add_max("completions/max_length", float(max(lengths)))
            found.add_sum("completions/mean_terminated_length", sum(terminated), len(terminated))
        model = trainer.model_wrapped
        if args.beta != 0:
            with trainer.reference.of(model, trainer.accelerator.unwrap_model(model)) as reference:
                ref = trainer.model_forward.logprobs(reference, rollout, batch_size=args.per_device_eval_batch_size)
            rollout.tokens["ref"] = ref.logprobs
        config = trainer.entropy_control.loss_config(trainer.loss_config)
        with torch.no_grad(), eval_mode(model):
            for start in range(0, len(rollout), args.per_device_eval_batch_size):
                part = rollout.select(range(start, min(start + args.per_device_eval_batch_size, len(rollout))))
                out = trainer.model_forward.loss(model, part, config=config, metrics_on="all")
                found.add_mean("loss", out.loss, float(part.loss_mask.sum()))
                for name in ("entropy", "kl") if "ref" in part.tokens else ("entropy",):
                    found.add_mean(name, out.metrics[name], out.active.sum())
                if "aux_loss" in out.metrics:
                    found.add_mean("aux_loss", out.metrics["aux_loss"], float(part.loss_mask.sum()))
        return found.read()

    def _rollout(self) -> tuple[Rollout, Tensor, gf.GroupAdvantages]:
        """The completions of this process, those of a prompt one after the other, the rewards of all processes [B, R], and the groups."""
        trainer, args = self.trainer, self.trainer.args
        drawn = [each for group in self._drawn for each in group]
        rounds = len(self._drawn[0])
        counts = torch.arange(len(drawn)) < self._counted * rounds
        rewards = torch.tensor([each.rewards for each in drawn]).masked_fill(~counts[:, None], torch.nan)
        rewards = trainer.accelerator.gather(rewards.to(args.device))
        lengths = torch.tensor([len(each.completion.completion.token_ids) for each in drawn], device=args.device)
        groups = compute_advantages(args, rewards, trainer.rewards.weights, group_size=rounds, lengths=trainer.accelerator.gather(lengths))
        first = trainer.accelerator.process_index * len(drawn)
        temperature = args.eval_temperature or trainer.temperatures.base(trainer.state.global_step)
        rollout = Rollout(
            [each.completion.prompt_ids for each in drawn],
            [each.completion.completion.token_ids for each in drawn],
            torch.full((len(drawn),), float(temperature)),
            groups.advantages[first : first + len(drawn)].cpu(),
            counts,
        )
        add_columns(rollout, [each.completion for each in drawn], args.device)
        return rollout, rewards, groups
