"""Makes rollouts: completions, rewards and advantages, and the log-probabilities and weights per token that the loss needs.

A rollout is a function of the run's seed, its number and the weights. Nothing else, such as a position in the dataset or the state of a
random number generator, decides what is drawn; so a resumed run draws what the interrupted run would have drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate.utils import gather_object
from torch import Tensor

import grpo_fast as gf
from grpo_fast.generation import SamplerError
from grpo_fast.generation.transformers_sampler import TransformersSampler
from grpo_fast.loss.statistics import top_threshold
from grpo_fast.models.unwrap import is_sharded
from grpo_fast.trainer.advantages import compute_advantages
from grpo_fast.trainer.completions import CompletionRunner, GeneratedCompletion
from grpo_fast.trainer.diagnostics import completion_records, measure_rewards, measure_rollout
from grpo_fast.trainer.length_check import check_lengths
from grpo_fast.trainer.off_policy import reject, require_sampler
from grpo_fast.trainer.prompt_source import PromptSource, Row
from grpo_fast.trainer.prompt_stream import PromptStream
from grpo_fast.trainer.replay import SupportReplay
from grpo_fast.trainer.rollout import Rollout
from grpo_fast.trainer.sampling_settings import check_importance_weights, check_rejection, corrects_sampler, warn_of_penalties
from grpo_fast.trainer.surrogate_columns import add_columns
from grpo_fast.trainer.trl_metrics import measure_lengths, measure_reward_spread

if TYPE_CHECKING:
    from grpo_fast.trainer.grpo_trainer import GRPOTrainer

__all__ = ["RolloutGenerator"]


class _Groups(NamedTuple):
    """The groups of a rollout, after dynamic sampling."""

    rows: list[Row]  # one per group, of all processes
    completions: list[GeneratedCompletion]  # of this process
    rewards: Tensor  # float32 [B, R], of all processes
    advantages: gf.GroupAdvantages  # of all processes


class RolloutGenerator:
    """Makes the rollouts of a trainer.

    Args:
        trainer: whose settings, model and reference policy are used, and whose metrics are updated.
        prompts: the prompts of each rollout.
        completions: draws and scores completions.
    """

    def __init__(self, trainer: GRPOTrainer, prompts: PromptSource | PromptStream, completions: CompletionRunner) -> None:
        self.trainer, self.prompts, self.completions = trainer, prompts, completions
        self.corrects_sampler = corrects_sampler(trainer.args, own_model=isinstance(trainer.sampler, TransformersSampler))
        self.as_chat = completions.sends_as_chat(prompts.dataset, "train_dataset")
        evaluated = trainer.eval_dataset
        parts = (
            {f"eval_{name}_dataset": part for name, part in evaluated.items()}
            if isinstance(evaluated, dict)
            else {"eval_dataset": evaluated}
        )
        completions.check_first_prompts({"train_dataset": prompts.dataset, **parts})
        rows = prompts.dataset if isinstance(prompts.dataset, list) or hasattr(prompts.dataset, "column_names") else None
        options: Any = trainer.args.chat_template_kwargs  # TrainingArguments has parsed JSON
        tokenizer, longest = trainer.processing_class, trainer.args.max_completion_length
        check_lengths(trainer.model, tokenizer, None if isinstance(prompts, PromptStream) else rows, longest, options, as_chat=self.as_chat)
        self.replay = SupportReplay(trainer.args, trainer.sampler)
        self.step_sequences: list[int] = []  # of each optimizer step of the last rollout, over all processes: those in the denominators
        # Again, since the settings do not know of a sampler that the caller made.
        check_rejection(trainer.args, replays=self.replay.wanted)
        check_importance_weights(trainer.args, self.corrects_sampler, replays=self.replay.wanted)
        if trainer.accelerator.is_main_process:
            warn_of_penalties(trainer.args, self.corrects_sampler)

    def generate(self, number: int) -> Rollout:
        """Draw and score this process's completions of a rollout, which is given by its number, counted from 0."""
        trainer, args, local = self.trainer, self.trainer.args, self._local_indices()
        temperatures = trainer.temperatures.temperatures(trainer.state.global_step, args.prompts_per_rollout, args.num_generations)
        groups = self._sample_groups(number, temperatures, local)
        completions = groups.completions
        counted = self._counted_rows(groups.advantages)
        self.step_sequences = counted.view(args.minibatches, -1).sum(1).tolist()
        rollout = Rollout(
            [each.prompt_ids for each in completions],
            [each.completion.token_ids for each in completions],
            torch.tensor([temperatures[i] for i in local], dtype=torch.float32),
            groups.advantages.advantages[local].cpu(),
            torch.tensor([self._is_scored(each) for each in completions]) & counted[local],
        )
        add_columns(rollout, completions, args.device)
        drawn = [each.completion for each in completions]
        rollout.support = self.replay.of(drawn, args.device)
        self.replay.measure(drawn, trainer.metrics)
        sampler_logprobs = [each.completion.logprobs for each in completions if each.completion.logprobs is not None]
        if len(sampler_logprobs) == len(completions):
            values = [value for logprobs in sampler_logprobs for value in logprobs]
            rollout.tokens["sampler"] = torch.tensor(values, dtype=torch.float32, device=args.device)
        elif args.penalises and self.corrects_sampler:
            raise SamplerError(
                f"{type(trainer.sampler).__name__} returned completions without log-probabilities; expected them, to correct for "
                f"{args.penalties}. Fix: a sampler that returns them, or vllm_importance_sampling_correction=False."
            )
        with trainer.metrics.timed("step_time/logprobs"):
            self._add_token_values(rollout)
        self._measure(groups, rollout, local)
        return rollout

    def step_tokens(self, rollout: Rollout) -> list[int]:
        """Tokens in the loss of each optimizer step of a rollout, over all processes: the denominator of the step's loss."""
        args, accelerator = self.trainer.args, self.trainer.accelerator
        tokens = accelerator.gather(rollout.loss_lengths().to(args.device))
        per_step: list[int] = tokens.view(accelerator.num_processes, args.minibatches, -1).sum((0, 2)).tolist()
        return per_step

    def _is_scored(self, completion: GeneratedCompletion) -> bool:
        """Return whether a completion is in the loss, unless its group is left out."""
        return completion.completion.finished or not self.trainer.args.mask_truncated_completions

    def _counted_rows(self, groups: gf.GroupAdvantages) -> Tensor:
        """Return which rows of the rollout, of all processes, count in the loss's denominators, bool on the CPU."""
        counted = torch.ones_like(groups.degenerate) if not self.trainer.args.exclude_degenerate else ~groups.degenerate
        return counted.cpu().repeat_interleave(self.trainer.args.num_generations)

    # Completions and rewards -----------------------------------------------------------------------------------------------------

    def _sample_groups(self, number: int, temperatures: Sequence[float], local: Sequence[int]) -> _Groups:
        """Draw a group per prompt. With dynamic sampling (DAPO, arXiv:2503.14476) groups whose rewards are all equal, and so do not train
        the model, are drawn again with other prompts.
        """
        args, group_size = self.trainer.args, self.trainer.args.num_generations
        position = {index: p for p, index in enumerate(local)}
        rows = self.prompts.rows(number)
        completions: dict[int, GeneratedCompletion] = {}
        rewards = torch.full((len(local), len(self.trainer.rewards.names)), math.nan)
        pending = list(range(len(rows)))
        for attempt in range(1 + args.dynamic_sampling_attempts):
            if attempt:
                for group, row in zip(pending, self.prompts.replacements(number, attempt, len(pending)), strict=True):
                    rows[group] = row
            wanted = set(pending)
            indices = [i for i in local if i // group_size in wanted]
            drawn_rows, at = [rows[i // group_size] for i in indices], [temperatures[i] for i in indices]
            options: dict[str, Any] = {"top_p": args.top_p, "top_k": args.top_k, "min_p": args.min_p or 0.0}
            options |= {"as_chat": self.as_chat, "return_support": self.replay.wanted}
            drawn = self.completions.generate_completions(drawn_rows, at, "rollout", number, attempt, **options)
            scores = self.completions.score(drawn_rows, drawn, at)
            for i, completion, score in zip(indices, drawn, scores, strict=True):
                completions[i], rewards[position[i]] = completion, score
            lengths = [len(each.completion.token_ids) * self._is_scored(each) for each in (completions[i] for i in local)]
            all_rewards, advantages = self._advantages(rewards, torch.tensor(lengths))
            pending = advantages.degenerate.nonzero().flatten().tolist()
            if not pending or attempt == args.dynamic_sampling_attempts:
                break
        self.trainer.metrics.add_mean("dynamic_sampling/attempts", attempt)
        return _Groups(rows, [completions[i] for i in local], all_rewards, advantages)

    def _advantages(self, rewards: Tensor, lengths: Tensor) -> tuple[Tensor, gf.GroupAdvantages]:
        """Rewards [B, R] and advantages of all processes, from the rewards and the tokens in the loss of this process's completions."""
        trainer, args = self.trainer, self.trainer.args
        columns = torch.cat([rewards, lengths[:, None].to(rewards)], 1).to(args.device)  # a length is exact in float32
        *reward_columns, tokens = self._in_row_order(trainer.accelerator.gather(columns)).unbind(1)
        all_rewards = torch.stack(reward_columns, 1)
        groups = compute_advantages(args, all_rewards, trainer.rewards.weights, group_size=args.num_generations, lengths=tokens)
        return all_rewards, groups

    def _local_indices(self) -> list[int]:
        """Return which completions of the rollout this process draws: a share of the rows of each optimizer step, so that a step consists
        of the same rows for any number of processes.
        """
        args, accelerator = self.trainer.args, self.trainer.accelerator
        assert args.generation_batch_size is not None
        per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps
        parts = torch.arange(args.generation_batch_size).view(args.minibatches, accelerator.num_processes, per_step)
        indices: list[int] = parts[:, accelerator.process_index].flatten().tolist()
        return indices

    def _in_row_order(self, gathered: Tensor) -> Tensor:
        """Reorder gathered values [B, R], which are ordered by process, to the order of the rollout's rows."""
        parts = gathered.view(self.trainer.accelerator.num_processes, self.trainer.args.minibatches, -1, gathered.shape[1])
        return parts.transpose(0, 1).reshape(gathered.shape)

    # Log-probabilities and weights -----------------------------------------------------------------------------------------------

    def _add_token_values(self, rollout: Rollout) -> None:
        """Add the log-probabilities of the old policy and of the reference, and the weights, if the settings need them."""
        trainer, args = self.trainer, self.trainer.args
        corrects = self.corrects_sampler and "sampler" in rollout.tokens
        require_sampler(args, rollout, trainer.sampler)
        needs_old = args.updates_per_rollout > 1 and not args.bypass_mode
        rejects = args.rollout_rs is not None and not args.bypass_mode
        if args.bypass_mode:  # the sampler is the old policy, so that the one ratio is that of the current policy to it
            rollout.tokens["old"] = rollout.tokens["sampler"]
        # With a sharded model every process must make as many forward passes as the others, so none may leave rows out.
        rows = list(range(len(rollout))) if is_sharded(trainer.model_wrapped) else trainer.rows_with_gradient(rollout)
        part = rollout.select(rows)
        if needs_old or corrects or rejects or args.top_entropy_quantile < 1:
            old = trainer.model_forward.logprobs(trainer.model_wrapped, part, batch_size=args.per_device_train_batch_size)
            if needs_old:
                rollout.tokens["old"] = rollout.scatter_tokens(old.logprobs, rows)
            weights = self._token_weights(part, old, corrects)
            if weights is not None:
                rollout.tokens["weights"] = rollout.scatter_tokens(weights, rows)
        if args.beta != 0:
            with trainer.reference.of(trainer.model_wrapped, trainer.accelerator.unwrap_model(trainer.model_wrapped)) as reference:
                ref = trainer.model_forward.logprobs(reference, part, batch_size=args.per_device_train_batch_size)
            rollout.tokens["ref"] = rollout.scatter_tokens(ref.logprobs, rows)

    def _token_weights(self, rows: Rollout, old: gf.TokenLogprobs, corrects: bool) -> Tensor | None:
        """Return the factor of each token's surrogate, float32 [n]: importance weights that correct for the sampler's distribution, times
        the masks of the tokens that are not rejected, and of those with the highest entropy (arXiv:2506.01939). None = no factor.
        """
        args = self.trainer.args
        mask = rows.loss_mask.repeat_interleave(torch.tensor(rows.lengths)).to(old.logprobs.device)  # bool [n]
        weights = self._importance_weights(rows, old.logprobs, mask) if corrects else None
        kept = reject(args, rows, old.logprobs, mask, self.trainer.metrics)
        if kept is not None:
            weights = kept if weights is None else weights * kept
        if args.top_entropy_quantile < 1:
            everyone = torch.cat([values.to(old.entropy.device) for values in gather_object([old.entropy[mask].cpu()])])
            highest = (old.entropy >= top_threshold(everyone, args.top_entropy_quantile)).float()
            weights = highest if weights is None else weights * highest
        return weights

    def _importance_weights(self, rows: Rollout, old_logprobs: Tensor, mask: Tensor) -> Tensor:
        """Ratio of the trainer's probability of each token to the sampler's, truncated or masked, float32 [n]."""
        args, metrics = self.trainer.args, self.trainer.metrics
        level, mode = str(args.vllm_importance_sampling_mode).split("_")
        lengths = torch.tensor(rows.lengths)
        weights = gf.rollout_weights(
            old_logprobs,
            rows.tokens["sampler"],
            mask,
            mode=mode,
            level=level,
            low=args.vllm_importance_sampling_clip_min,
            high=args.vllm_importance_sampling_clip_max,
            cu_seqlens=torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int().to(mask.device),
        )
        metrics.add_sum("sampling/importance_sampling_ratio/mean", (weights * mask).sum(), mask.sum())
        metrics.add_max("sampling/importance_sampling_ratio/max", (weights * mask).max())
        if bool(rows.loss_mask.any()):
            metrics.add_min("sampling/importance_sampling_ratio/min", weights[mask].min())
        return weights

    # Metrics ---------------------------------------------------------------------------------------------------------------------

    def _measure(self, groups: _Groups, rollout: Rollout, local: Sequence[int]) -> None:
        trainer, names = self.trainer, self.trainer.rewards.names
        group_of = [i // trainer.args.num_generations for i in local]
        measure_rewards(trainer.metrics, names, groups.rewards, trainer.rewards.weights, groups.advantages)
        measure_reward_spread(trainer.metrics, groups.rewards, trainer.rewards.weights)
        measure_rollout(trainer.metrics, groups.completions, group_of, rollout)
        measure_lengths(trainer.metrics, rollout.lengths, [each.completion.finished for each in groups.completions])
        tokens = sum(rollout.lengths) + sum(map(len, rollout.prompt_ids))
        trainer.state.num_input_tokens_seen += sum(gather_object([tokens]))
        prompts = [groups.rows[group]["prompt"] for group in group_of]
        trainer.last_completions = completion_records(
            trainer.state.global_step, prompts, groups.completions, names, groups.rewards[local], rollout
        )
