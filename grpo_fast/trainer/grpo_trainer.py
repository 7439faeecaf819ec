"""GRPOTrainer: group-relative policy optimisation on transformers' Trainer. Read it from top to bottom.

    a rollout     get_batch_samples -> roll_out: prompts, temperatures, completions, rewards, advantages; old and reference policy
    a step        compute_loss on each micro-batch of the rollout; backward, optimiser and the rest are transformers'
    an evaluation evaluate: a few samples per prompt at the temperature of use, averaged

A rollout is a function of the settings' seed, its number and the weights: prompts, temperatures and random numbers have no other state.
So a run that was killed and is resumed draws what it would have drawn. A rollout that is not used up is part of a checkpoint.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainerCallback

import grpo_fast as gf
from grpo_fast.data.prompts import check_evaluation, encode_prompt
from grpo_fast.generation import Sampler, SamplingParams, make_sampler
from grpo_fast.generation.transformers_sampler import TransformersSampler
from grpo_fast.models.forward import ModelForward
from grpo_fast.models.loading import load_policy
from grpo_fast.models.unwrap import end_tokens_of, inner_model, is_sharded
from grpo_fast.rewards import RewardRunner, SoftOverlongPunishment
from grpo_fast.trainer.callbacks import add_default_callbacks
from grpo_fast.trainer.checkpoints import STATE, CompleteCheckpoints
from grpo_fast.trainer.config import GRPOConfig
from grpo_fast.trainer.diagnostics import (
    Answer,
    MicroBatch,
    completion_records,
    gradient_norm,
    measure_loss,
    measure_rewards,
    measure_rollout,
    sampler_gap,
    summary_of_round,
    summary_of_rounds,
    what_is_not_finite,
    whole,
)
from grpo_fast.trainer.metrics import MetricAccumulator
from grpo_fast.trainer.prompt_source import PromptSource
from grpo_fast.trainer.reference_policy import ReferencePolicy
from grpo_fast.trainer.rollout import Rollout
from grpo_fast.trainer.temperature import explain_mismatch
from grpo_fast.utils.seeds import derived_seed
from grpo_fast.utils.text_statistics import repeated_ngrams

__all__ = ["GRPOConfig", "GRPOTrainer"]

TOLERANCES = {torch.float32: 0.02, torch.bfloat16: 0.1, torch.float16: 0.1}  # nats a token between sampler and trainer, in the mean


class GRPOTrainer(CompleteCheckpoints):
    """Trains a causal language model by GRPO (arXiv:2402.03300) and its relatives. Constructor and reward functions are TRL's.

    Args:
        model: a causal language model of transformers, a PEFT model, or the name of one.
        reward_funcs: one or several functions ``reward(prompts, completions, completion_ids, **columns) -> list[float | None]``, or
            names of grpo_fast.rewards.
        args: settings; None = GRPOConfig().
        train_dataset: rows with a ``prompt``, a string or a list of chat messages; the other columns go to the rewards.
        eval_dataset: the same, or a dictionary of several.
        processing_class: the tokenizer; None = the model's own, by name.
        callbacks, optimizers: as of transformers' Trainer.
        peft_config: makes a PEFT model of the model. Its reference is the model without adapter, and costs no memory.
        quantization_config: of ``from_pretrained``, for a model given by name.
        sampler: whoever draws completions, in place of the one that args name (grpo_fast.generation.Sampler).

    Example:
        >>> trainer = GRPOTrainer("Qwen/Qwen3-0.6B", accuracy_reward, GRPOConfig("out"), train_dataset=rows)  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """

    def __init__(
        self,
        model: Any,
        reward_funcs: Any,
        args: GRPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: Any = None,
        *,
        quantization_config: Any = None,
        sampler: Sampler | None = None,
    ) -> None:
        args = GRPOConfig() if args is None else args
        rewards, weights = _with_overlong(reward_funcs, args)
        self.rewards = RewardRunner(
            rewards, weights=weights, timeout=args.reward_timeout, on_error=args.reward_on_error, isolation=args.reward_isolation
        )
        self.prompts: PromptSource | None = None
        if train_dataset is not None:
            self.prompts = PromptSource(train_dataset, args.prompts_per_rollout, seed=args.prompt_seed, shuffle=args.shuffle_dataset)
            self.rewards.check_columns(self.prompts.columns)
        check_evaluation(eval_dataset, args.eval_strategy.value)
        self.temperatures = args.schedule()
        self.metrics_on = "all" if self.temperatures.adaptive else args.metrics_on  # it steers by what is measured
        self.loss_config = args.loss_config()

        model, tokenizer = load_policy(
            model,
            processing_class,
            peft_config=peft_config,
            quantization_config=quantization_config,
            **args.loading_options(),
        )
        self.reference = ReferencePolicy(model, args, for_rewards=self.rewards.reads("ref_logprobs"))

        super().__init__(
            model=model,
            args=args,
            data_collator=lambda rows: rows,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=[*(callbacks or ()), _Hooks(self)],
            optimizers=optimizers,
        )
        self.model_accepts_loss_kwargs = True  # the loss is normalised over the whole step here, not by the number of micro-batches
        self.model_forward = ModelForward(self.accelerator, tokenizer.pad_token_id, **args.forward_options())
        options: Any = args.sampler_options or {}
        self.sampler = make_sampler(args.sampler if sampler is None else sampler, self.model, tokenizer, **options)
        correction = args.vllm_importance_sampling_correction
        self.corrects_sampler = not isinstance(self.sampler, TransformersSampler) if correction is None else correction
        self.metrics, self.metrics_to_log = MetricAccumulator(), MetricAccumulator()  # of this step; of those since the last log
        self.rollout: Rollout | None = None
        self.last_completions: list[dict[str, Any]] = []  # of the last rollout, in this process: for tables
        self._step_tokens: list[int] = []  # of each optimiser step that the rollout feeds
        self._losses: list[tuple[gf.GRPOOutput, MicroBatch]] = []  # of the current step
        self._sampler_step, self._sampler_checked = -1, False  # whose weights the sampler has
        self._logged_at, self._tokens_logged = 0.0, 0
        self._grad_norm: Any = None
        add_default_callbacks(self)

    # Rollout ------------------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """A clock for transformers' loop: a tick per micro-batch. What is in the batches is decided in get_batch_samples."""
        if self.prompts is None:
            raise ValueError("train_dataset is None; expected one, to train on.")
        ticks = self.prompts.rollouts_per_epoch * self.args.steps_per_generation * self.args.num_iterations
        return DataLoader(range(ticks), batch_size=1)  # type: ignore[arg-type]

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[MicroBatch], int]:
        """The micro-batches of the next optimiser step, from the current rollout or a new one."""
        if self.stop_if_finished():
            return [], 0
        for _ in range(num_batches):
            next(epoch_iterator, None)
        step, args = self.state.global_step, self.args
        self.reference.follow(self.model_wrapped, self.accelerator.unwrap_model(self.model_wrapped), step)
        number, position = divmod(step, args.updates_per_rollout)
        if position == 0 or self.rollout is None:
            if position != 0:
                raise ValueError(f"the rollout of step {step} is missing; expected it in the checkpoint that was resumed from.")
            self.rollout = self.roll_out(number)
        part, size = position % args.minibatches, args.per_device_train_batch_size
        first, tokens = part * args.gradient_accumulation_steps, self._step_tokens[part]
        sequences = size * args.gradient_accumulation_steps * self.accelerator.num_processes
        batches = []
        for i in range(args.gradient_accumulation_steps):
            rows = self.rollout.select(range((first + i) * size, (first + i + 1) * size))
            batches.append(MicroBatch(rows, tokens, sequences, on_policy=position == 0))
        return batches, tokens

    def roll_out(self, number: int) -> Rollout:
        """Draw and score the completions of a rollout; this process's part of it."""
        assert self.prompts is not None
        args, group = self.args, self.args.num_generations
        step, mine = self.state.global_step, self._rows_of_this_process()
        place = {row: position for position, row in enumerate(mine)}
        rows = self.prompts.rows(number)
        temperatures = self.temperatures.temperatures(step, len(rows), group)
        answers: list[Any] = [None] * len(mine)
        rewards = torch.full((len(mine), len(self.rewards.names)), math.nan)
        wanted = list(range(len(rows)))
        for attempt in range(1 + args.dynamic_sampling_attempts):
            if attempt:  # prompts whose completions are all as good as one another teach nothing: others in their place
                for prompt, row in zip(wanted, self.prompts.replacements(number, attempt, len(wanted)), strict=True):
                    rows[prompt] = row
            again = set(wanted)
            drawn = [i for i in mine if i // group in again]
            new = self._answers([rows[i // group] for i in drawn], [temperatures[i] for i in drawn], "rollout", number, attempt)
            scores = self._scores([rows[i // group] for i in drawn], new, [temperatures[i] for i in drawn])
            for i, answer, score in zip(drawn, new, scores, strict=True):
                answers[place[i]], rewards[place[i]] = answer, score
            everyone = self._in_order(self.accelerator.gather(rewards.to(args.device)))  # [B over all processes, R]
            groups = gf.group_advantages(
                everyone,
                group_size=group,
                scale=args.scale_rewards,
                reward_weights=self.rewards.weights.to(everyone.device),
                normalize=args.multi_objective_aggregation,
            )
            wanted = groups.degenerate.nonzero().flatten().tolist()
            if not wanted or attempt == args.dynamic_sampling_attempts:
                break
        self.metrics.mean("dynamic_sampling/attempts", attempt)

        rollout = Rollout(
            [answer.prompt_ids for answer in answers],
            [answer.completion.token_ids for answer in answers],
            torch.tensor([temperatures[i] for i in mine], dtype=torch.float32),
            groups.advantages[mine].cpu(),
            torch.tensor([a.completion.finished or not args.mask_truncated_completions for a in answers]),
        )
        if all(answer.completion.logprobs is not None for answer in answers):
            values = [value for answer in answers for value in answer.completion.logprobs]
            rollout.tokens["sampler"] = torch.tensor(values, dtype=torch.float32, device=args.device)
        with self.metrics.timed("step_time/logprobs"):
            self._score_tokens(rollout)
        self._count_tokens(rollout)
        self._measure(rows, answers, everyone, groups, rollout)
        return rollout

    def _rows_of_this_process(self) -> list[int]:
        """A part of each optimiser step's rows: so a step has the same rows however many processes share them."""
        each = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        parts = torch.arange(self.args.generation_batch_size).view(self.args.minibatches, self.accelerator.num_processes, each)
        return parts[:, self.accelerator.process_index].flatten().tolist()

    def _in_order(self, gathered: Tensor) -> Tensor:  # [B, R]
        """What was gathered, one process's rows after the other's, in the order of the rows."""
        parts = gathered.view(self.accelerator.num_processes, self.args.minibatches, -1, gathered.shape[1])
        return parts.transpose(0, 1).reshape(gathered.shape)

    def _answers(self, rows: Sequence[dict[str, Any]], temperatures: Sequence[float], *seed: object, **cut: Any) -> list[Answer]:
        """A completion for each row."""
        if self._sampler_step != self.state.global_step:
            self.sampler.update_weights(self.model_wrapped, self.state.global_step)
            self._sampler_step = self.state.global_step
        extra = 0
        different = {id(row): row["prompt"] for row in rows}  # a group's rows are one
        encoded = {key: encode_prompt(text, self.processing_class, self.args.chat_template_kwargs) for key, text in different.items()}
        prompts = [encoded[id(row)] for row in rows]
        if not rows and is_sharded(self.model_wrapped):  # the others wait for this process in every forward pass
            prompts, temperatures, extra = [[self.processing_class.eos_token_id]], [1.0], 1
        params = SamplingParams(
            self.args.max_completion_length,
            list(temperatures),
            seed=derived_seed(self.args.seed, *seed, self.accelerator.process_index),
            eos_token_id=end_tokens_of(self.model, self.processing_class),
            pad_token_id=self.processing_class.pad_token_id,
            **(cut or {"top_p": self.args.top_p, "top_k": self.args.top_k, "min_p": self.args.min_p or 0.0}),
        )
        with self.metrics.timed("step_time/generate"), self.model_forward.unsharded(self.model_wrapped):
            drawn = self.sampler.generate(prompts, params) if prompts else []
        drawn = drawn[: len(drawn) - extra]
        if len(drawn) != len(rows):
            raise ValueError(f"the sampler returned {len(drawn)} completions for {len(rows)} prompts; expected one for each, in order.")
        texts = self.processing_class.batch_decode([c.token_ids for c in drawn], skip_special_tokens=True) if drawn else []
        return [Answer(*parts, {}) for parts in zip(prompts, drawn, texts, strict=False)]

    def _scores(self, rows: Sequence[dict[str, Any]], answers: Sequence[Answer], temperatures: Sequence[float]) -> Tensor:  # [B, R]
        ref_logprobs = {}
        if self.reference.for_rewards:
            with self.metrics.timed("step_time/logprobs"):
                ref_logprobs = {"ref_logprobs": self._reference_logprobs(answers, temperatures)}
        if not rows:
            return torch.empty(0, len(self.rewards.names))
        columns = {name: [row[name] for row in rows] for name in rows[0] if name not in ("prompt", "completion", "completion_ids")}
        texts: list[Any] = [
            answer.text if isinstance(row["prompt"], str) else [{"role": "assistant", "content": answer.text}]
            for row, answer in zip(rows, answers, strict=True)
        ]
        columns_to_log: dict[str, list[Any]] = {}
        extras = {
            "trainer_state": self.state,
            "log_metric": self.metrics.mean,
            "log_extra": lambda column, values: columns_to_log.setdefault(column, []).extend(values),
            "logprobs": [answer.completion.logprobs for answer in answers],
            **ref_logprobs,
        }
        with self.metrics.timed("step_time/reward"):
            table = self.rewards(
                [row["prompt"] for row in rows], texts, [a.completion.token_ids for a in answers], extras=extras, **columns
            )
        for name, value in table.metrics.items():
            if not name.endswith(("/mean", "/std")):  # those are taken over all processes
                self.metrics.mean(name, value)
        for name, values in columns_to_log.items():
            for answer, value in zip(answers, values, strict=True):
                answer.extra[name] = value
        return table.values

    @torch.no_grad()
    def _reference_logprobs(self, answers: Sequence[Answer], temperatures: Sequence[float]) -> list[list[float]]:
        """Of each completion's tokens, for rewards that read them."""
        ids, flat = [answer.completion.token_ids for answer in answers], torch.zeros(len(answers))
        rollout = Rollout([answer.prompt_ids for answer in answers], ids, flat + torch.tensor(temperatures), flat, flat == 0)
        with self.reference.of(self.model_wrapped, self.accelerator.unwrap_model(self.model_wrapped)) as reference:
            found = self.model_forward.logprobs(reference, rollout, batch_size=self.args.per_device_train_batch_size).logprobs
        return [part.tolist() for part in found.cpu().split(rollout.lengths)]

    def _score_tokens(self, rollout: Rollout) -> None:
        """Log-probabilities of the old policy and of the reference, and the weights made from them, where something asks for them."""
        args = self.args
        corrects = self.corrects_sampler and "sampler" in rollout.tokens
        several = args.updates_per_rollout > 1
        # Sharded, every process must make as many forward passes as the others.
        rows = list(range(len(rollout))) if is_sharded(self.model_wrapped) else self._that_matter(rollout)
        part = rollout.select(rows)
        if several or corrects or args.top_entropy_quantile < 1:
            old = self.model_forward.logprobs(self.model_wrapped, part, batch_size=args.per_device_train_batch_size)
            if several:
                rollout.tokens["old"] = rollout.scatter_tokens(old.logprobs, rows)
            weights = self._weights(part, old, corrects)
            if weights is not None:
                rollout.tokens["weights"] = rollout.scatter_tokens(weights, rows)
        if args.beta != 0:
            with self.reference.of(self.model_wrapped, self.accelerator.unwrap_model(self.model_wrapped)) as reference:
                ref = self.model_forward.logprobs(reference, part, batch_size=args.per_device_train_batch_size)
            rollout.tokens["ref"] = rollout.scatter_tokens(ref.logprobs, rows)

    def _that_matter(self, rollout: Rollout) -> list[int]:
        """Rows that can change the gradient (at least one: all processes must do a backward pass), or all if the metrics want them."""
        if self.metrics_on == "all" or self.args.beta != 0 or self.args.entropy_coef != 0:
            return list(range(len(rollout)))
        return ((rollout.advantages != 0) & rollout.loss_mask).nonzero().flatten().tolist() or [0]

    def _weights(self, rows: Rollout, old: gf.TokenLogprobs, corrects: bool) -> Tensor | None:  # [n]
        """What multiplies each token's surrogate: the correction of the sampler, and the mask of the tokens with the highest entropy."""
        args = self.args
        lengths = torch.tensor(rows.lengths)
        counts = rows.loss_mask.repeat_interleave(lengths).to(old.logprobs.device)
        weights = None
        if corrects:
            level, mode = args.vllm_importance_sampling_mode.split("_")
            bounds = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int().to(counts.device)
            weights = gf.rollout_weights(
                old.logprobs,
                rows.tokens["sampler"],
                counts,
                mode=mode,
                level=level,
                low=args.vllm_importance_sampling_clip_min,
                high=args.vllm_importance_sampling_clip_max,
                cu_seqlens=bounds,
            )
            self.metrics.add("sampling/importance_sampling_ratio/mean", (weights * counts).sum(), counts.sum())
            self.metrics.largest("sampling/importance_sampling_ratio/max", (weights * counts).max())
        if args.top_entropy_quantile < 1:
            everyone = torch.cat([values.to(old.entropy.device) for values in gather_object([old.entropy[counts].cpu()])])
            threshold = torch.quantile(everyone, 1 - args.top_entropy_quantile)
            highest = (old.entropy >= threshold).float()
            weights = highest if weights is None else weights * highest
        return weights

    def _count_tokens(self, rollout: Rollout) -> None:
        """Tokens that count in each optimiser step, over all processes: the denominator that makes the loss the same for any split."""
        tokens = rollout.loss_lengths().to(self.args.device)
        steps = self.accelerator.gather(tokens).view(self.accelerator.num_processes, self.args.minibatches, -1)
        self._step_tokens = steps.sum((0, 2)).tolist()

    # Step ----------------------------------------------------------------------------------------------------------------------

    def _prepare_inputs(self, inputs: Any) -> Any:
        return inputs  # they are where they belong

    def floating_point_ops(self, inputs: Any) -> int:
        """Six per parameter and token, the usual estimate."""
        if not isinstance(inputs, MicroBatch):
            return 0
        tokens = sum(inputs.rows.lengths) + sum(map(len, inputs.rows.prompt_ids))
        return 6 * tokens * sum(p.numel() for p in inner_model(self.model).parameters())

    def _track_num_input_tokens(self, inputs: Any) -> None:
        """They are counted when they are drawn."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """transformers' own; here for its time."""
        before = self.metrics.total_seconds("step_time/loss")
        started = time.perf_counter()
        loss = super().training_step(model, inputs, num_items_in_batch)
        spent = time.perf_counter() - started - (self.metrics.total_seconds("step_time/loss") - before)
        self.metrics.seconds("step_time/backward", spent)
        return loss

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """The loss of a micro-batch, as its share in the loss of the step.

        Gradients are averaged over processes and summed over micro-batches. So sums are divided by what the whole step has, and multiplied
        by the number of processes: any split of the step gives the same loss and gradient.
        """
        batch: MicroBatch = inputs
        scale, num_items = float(self.accelerator.num_processes), None
        rows = batch.rows.select(self._that_matter(batch.rows))
        if self.loss_config.resolved_aggregation == "global_token_mean":
            num_items = max(batch.step_tokens, 1)
        else:
            scale *= len(rows) / batch.step_sequences
        with self.metrics.timed("step_time/loss"):
            out = self.model_forward.loss(
                model,
                rows,
                config=self.loss_config,
                num_items=num_items,
                loss_scale=scale,
                metrics_on=self.metrics_on,
            )
        self._losses.append((out._replace(loss=out.loss.detach()), batch._replace(rows=rows)))
        measure_loss(self.metrics, out, rows, batch, truncated=self.args.truncates)
        return (out.loss, out) if return_outputs else out.loss

    def _clip_grad_norm(self, model: Any) -> Any:
        self._grad_norm = whole(super()._clip_grad_norm(model))
        return self._grad_norm

    def before_optimizer(self) -> None:
        """The last look before the weights change: are the numbers finite, and is the sampler's policy ours?"""
        losses, self._losses = self._losses, []
        finite = torch.stack([out.loss for out, _ in losses]).isfinite().all()
        norm = self._grad_norm if self.args.max_grad_norm else gradient_norm(self.model)
        if isinstance(norm, Tensor) and getattr(self.accelerator, "scaler", None) is None:  # a scaler meets infinities, and skips them
            finite = finite & norm.isfinite().to(finite.device)
        if self.accelerator.reduce(finite.float(), reduction="sum") < self.accelerator.num_processes:  # all processes stop, not some
            where = f"step {self.state.global_step + 1}, process {self.accelerator.process_index}"
            raise FloatingPointError(what_is_not_finite(losses, norm, self.model, where))
        if not self._sampler_checked:
            self._check_sampler(losses)
            self._sampler_checked = True

    def _check_sampler(self, losses: list[tuple[gf.GRPOOutput, MicroBatch]]) -> None:
        """On the first step: the sampler's log-probabilities must be those of the loss, or it is another policy that is trained."""
        args = self.args
        dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
        tolerance = args.sampler_tolerance or TOLERANCES[dtype]
        if max(gather_object([sampler_gap(losses, args.most_left_out)])) <= tolerance:
            return
        rows = losses[0][1].rows
        assumed = float(rows.temperature.mean())
        found = explain_mismatch(
            lambda other: self.model_forward.logprobs_at(self.model_wrapped, rows, rows.temperature * (other / assumed)),
            rows.tokens["sampler"],
            temperature=assumed,
        )
        raise RuntimeError(f"{found.sentence(assumed)} Nothing was trained. (Allowed: sampler_tolerance = {tolerance:g} nats a token.)")

    def after_step(self) -> None:
        """When the weights have changed: steer the temperature, if a rollout was new in this step, and add the step to what is logged."""
        self.metrics.steps += 1
        if self.temperatures.adaptive and (self.state.global_step - 1) % self.args.updates_per_rollout == 0:
            self.temperatures.observe(self.metrics.read())
        self.metrics_to_log.merge(self.metrics)
        self.metrics = MetricAccumulator()

    # Evaluation ----------------------------------------------------------------------------------------------------------------

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Mean reward over ``eval_rounds`` samples per prompt at ``eval_temperature``, with the standard error over the rounds."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            dataset = self.eval_dataset[dataset]
        if isinstance(dataset, dict):
            found: dict[str, float] = {}
            for name, part in dataset.items():
                found |= self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}")
            return found
        if dataset is None:
            raise ValueError("eval_dataset is None; expected one, to evaluate on.")
        started = time.perf_counter()
        step_metrics, self.metrics = self.metrics, MetricAccumulator()  # an evaluation's time is not a step's
        try:
            rounds = [self._evaluation_round(dataset, number) for number in range(self.args.eval_rounds)]
        finally:
            self.metrics = step_metrics
        metrics = summary_of_rounds(rounds, metric_key_prefix)
        metrics[f"{metric_key_prefix}_temperature"] = self.args.eval_temperature
        metrics[f"{metric_key_prefix}_runtime"] = time.perf_counter() - started
        self.log(dict(metrics))
        control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.control: Any = control
        return metrics

    def _evaluation_round(self, dataset: Any, number: int) -> dict[str, float]:
        world, size = self.accelerator.num_processes, self.args.per_device_eval_batch_size
        each = -(-len(dataset) // world)
        mine = [min(i, len(dataset) - 1) for i in range(self.accelerator.process_index * each, (self.accelerator.process_index + 1) * each)]
        measured = []
        for start in range(0, each, size):
            rows = [dataset[i] for i in mine[start : start + size]]
            temperatures = [self.args.eval_temperature] * len(rows)
            answers = self._answers(rows, temperatures, "evaluation", number, start, top_p=self.args.eval_top_p)
            for scores, answer in zip(self._scores(rows, answers, temperatures).tolist(), answers, strict=True):
                ids = answer.completion.token_ids
                measured.append((scores, len(ids), not answer.completion.finished, repeated_ngrams(ids)))
        everyone = gather_object(measured)[: len(dataset)]  # what was repeated to fill the last process's share is at the end
        return summary_of_round(self.rewards.names, self.rewards.weights, everyone)

    # Log -----------------------------------------------------------------------------------------------------------------------

    def _measure(self, rows: Sequence[dict[str, Any]], answers: list[Answer], rewards: Tensor, groups: Any, rollout: Rollout) -> None:
        mine = self._rows_of_this_process()
        of_group = [i // self.args.num_generations for i in mine]
        measure_rewards(self.metrics, self.rewards.names, rewards, self.rewards.weights, groups)
        measure_rollout(self.metrics, answers, of_group, rollout)
        self.state.num_input_tokens_seen += sum(gather_object([sum(rollout.lengths) + sum(map(len, rollout.prompt_ids))]))
        prompts = [rows[group]["prompt"] for group in of_group]
        self.last_completions = completion_records(self.state.global_step, prompts, answers, self.rewards.names, rewards[mine], rollout)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """transformers' own, with what the steps since the last time have measured."""
        if "loss" in logs:
            logs, self.metrics_to_log = {**logs, **self.metrics_to_log.read()}, MetricAccumulator()
            now, tokens = time.perf_counter(), self.state.num_input_tokens_seen
            logs["num_tokens"] = tokens
            if tokens != self._tokens_logged:  # steps that draw nothing belong to the next rollout's time
                logs["tokens_per_second"] = (tokens - self._tokens_logged) / max(now - self._logged_at, 1e-9)
                self._logged_at, self._tokens_logged = now, tokens
            if self.args.log_completions and self.accelerator.is_main_process:
                folder = Path(self.args.output_dir) / "completions"
                folder.mkdir(parents=True, exist_ok=True)
                lines = [json.dumps(row, default=str) for row in self.last_completions[: self.args.num_completions_to_print]]
                (folder / f"step-{self.state.global_step:06d}.jsonl").write_text("\n".join(lines) + "\n")
        super().log(logs, start_time)

    # State ---------------------------------------------------------------------------------------------------------------------

    def extra_state(self, folder: Path) -> None:
        """Temperature, a reference that has moved, and a rollout that is not used up."""
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = self.state.global_step % self.args.updates_per_rollout != 0
        if unfinished and self.rollout is not None:
            self.rollout.save(folder / f"rollout-{self.accelerator.process_index}.safetensors")
        if not self.args.should_save:
            return
        self.reference.save(folder)
        state = {
            "version": 1,
            "batches": self._batches(),
            "temperature": self.temperatures.state_dict(),
            "step_tokens": self._step_tokens if unfinished else [],
        }
        (folder / STATE).write_text(json.dumps(state, indent=2) + "\n")

    def _batches(self) -> dict[str, int]:
        names = ("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation", "num_iterations")
        return {"processes": self.accelerator.num_processes} | {name: getattr(self.args, name) for name in names}

    def load_extra_state(self, folder: Path) -> None:
        """What `extra_state` wrote."""
        state = json.loads((folder / STATE).read_text())
        self.temperatures.load_state_dict(state["temperature"])
        self._step_tokens = state["step_tokens"]
        rollout = folder / f"rollout-{self.accelerator.process_index}.safetensors"
        if self._step_tokens and state["batches"] != self._batches():
            raise ValueError(
                f"{folder} was written in the middle of a rollout, with {state['batches']}, and now it is {self._batches()}; expected the "
                "same. Resume from a checkpoint at the end of a rollout."
            )
        self.rollout = Rollout.load(rollout, self.args.device) if rollout.exists() else None
        self.reference.load(folder)

    def create_model_card(self, *args: Any, dataset_name: str | None = None, **kwargs: Any) -> None:
        """transformers' own; by TRL's name for the data set, too."""
        super().create_model_card(*args, **kwargs, **({} if dataset_name is None else {"dataset": dataset_name}))


class _Hooks(TrainerCallback):
    """The places of transformers' loop where this trainer has something to do."""

    def __init__(self, trainer: GRPOTrainer) -> None:
        self.trainer, self.started = trainer, 0.0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.trainer._logged_at, self.trainer._tokens_logged = time.perf_counter(), self.trainer.state.num_input_tokens_seen
        self.trainer._sampler_step = -1

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.before_optimizer()
        self.started = time.perf_counter()

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.metrics.seconds("step_time/optimizer", time.perf_counter() - self.started)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.after_step()


def _with_overlong(reward_funcs: Any, args: GRPOConfig) -> tuple[list[Any], list[float] | None]:
    rewards = list(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
    weights = None if args.reward_weights is None else list(args.reward_weights)
    if args.soft_punish_cache is not None:
        rewards.append(SoftOverlongPunishment(args.max_completion_length, args.soft_punish_cache))
        weights = None if weights is None else [*weights, 1.0]
    return rewards, weights
