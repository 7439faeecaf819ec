"""Completions at one temperature: drawn, scored, and looked at, by the trainer's own samplers, rewards and forward passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

import grpo_fast as gf
from grpo_fast.data.prompts import encode_prompt
from grpo_fast.generation import Completion, SamplingParams, make_sampler
from grpo_fast.models.forward import ModelForward
from grpo_fast.models.unwrap import end_tokens_of
from grpo_fast.study.sampling_setup import Prepared
from grpo_fast.trainer.rollout import Rollout
from grpo_fast.utils.seeds import derived_seed
from grpo_fast.utils.text_statistics import completion_statistics

__all__ = ["Call", "Drawer", "Drawn"]


@dataclass
class Drawn:
    """What was drawn at one temperature: B = N * rounds * samples completions, prompt by prompt, and of each prompt round by round."""

    temperature: float
    samples: int
    rounds: int
    rewards: torch.Tensor  # [B, R], NaN where one does not apply
    no_signal: list[bool]  # [B / samples] a group whose rewards are all equal
    shape: dict[str, list[float]]  # each [B], see `completion_statistics`
    texts: list[str]  # [B]
    coherence: list[float] | None  # [B]
    entropy: list[float]  # [N] of softmax(z/T), mean over the prompt's tokens, in nats
    entropy_at_1: list[float]  # [N] of softmax(z), on the same tokens
    sampler_gap: list[float] | None  # [N] mean difference of a token's log-probability between sampler and loss; None where it says none


class Drawer:
    """Draws and scores, call by call of the sampler: whole groups, about as many completions as an evaluation of the trainer has at once.

    Args:
        prepared: see `prepare`.
        model: a causal language model; its head and its sampler are those that the settings name.
    """

    def __init__(self, prepared: Prepared, model: Any) -> None:
        config, self.prepared, self.model = prepared.config, prepared, model
        tokenizer = prepared.tokenizer
        self.pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        precision = "bf16" if config.bf16 else "fp16" if config.fp16 else "no"
        self.model_forward = ModelForward(Accelerator(cpu=config.use_cpu, mixed_precision=precision), self.pad, **config.forward_options())
        self.sampler = make_sampler(config.sampler, model, tokenizer, **(config.sampler_options or {}))
        self.sampler.update_weights(model, 0)
        self.ends = end_tokens_of(model, tokenizer)
        chat = config.chat_template_kwargs
        self.rows = [dict(row) for row in prepared.rows]
        self.encoded = [encode_prompt(row["prompt"], tokenizer, chat) for row in self.rows]
        self.columns = [name for name in self.rows[0] if name not in ("prompt", "completion", "completion_ids")]

    def at(self, temperature: float, on_calls: Callable[[float, int, int], None]) -> Drawn:
        """All prompts, round by round.

        Args:
            temperature: 0 is greedy decoding, of which one round stands for all.
            on_calls: told the temperature and how many calls of the sampler are done, of how many; once before the first.
        """
        options, config = self.prepared.options, self.prepared.config
        greedy = temperature == 0
        at_once = max(config.per_device_eval_batch_size // (1 if greedy else options.samples), 1)  # prompts
        starts = range(0, len(self.rows), at_once)
        rounds = 1 if greedy else options.rounds  # every round of greedy decoding would be the same
        total = rounds * len(starts)
        on_calls(temperature, 0, total)
        calls: list[list[Call]] = []
        for number in range(rounds):
            calls.append([])
            for start in starts:
                calls[-1].append(self.call(range(start, min(start + at_once, len(self.rows))), temperature, number))
                on_calls(temperature, len(calls[-1]) + number * len(starts), total)
        if greedy:
            calls = calls * options.rounds
        return self._put_together(temperature, calls)

    def call(self, which: range, temperature: float, number: int) -> Call:
        """One round of some of the prompts. At T = 0 one completion stands for the whole group."""
        options, config = self.prepared.options, self.prepared.config
        copies = 1 if temperature == 0 else options.samples
        prompts = [self.encoded[i] for i in which for _ in range(copies)]
        params = SamplingParams(
            config.max_completion_length,
            [temperature] * len(prompts),
            top_p=config.top_p,
            top_k=config.top_k,
            min_p=config.min_p or 0.0,
            seed=derived_seed(config.seed, "study", number, which.start),  # the same at every temperature
            eos_token_id=self.ends,
            pad_token_id=self.pad,
        )
        drawn = self.sampler.generate(prompts, params)
        at_t, at_1 = self._statistics(prompts, drawn, temperature)
        lengths = [len(completion.token_ids) for completion in drawn]
        logprobs = at_t.logprobs.cpu().split(lengths)
        gaps = [
            None if completion.logprobs is None else (torch.tensor(completion.logprobs) - own).abs()
            for completion, own in zip(drawn, logprobs, strict=True)
        ]
        per_completion = torch.tensor(
            [
                (0.0 if temperature == 0 else h.sum(), h_1.sum(), len(h), 0.0 if gap is None else gap.sum(), 0 if gap is None else len(gap))
                for h, h_1, gap in zip(at_t.entropy.cpu().split(lengths), at_1.entropy.cpu().split(lengths), gaps, strict=True)
            ],
            dtype=torch.float64,
        )
        if copies != options.samples:
            drawn = [completion for completion in drawn for _ in range(options.samples)]
        ref = [part.tolist() for part in logprobs for _ in range(options.samples // copies)]
        texts = self.prepared.tokenizer.batch_decode([completion.token_ids for completion in drawn], skip_special_tokens=True)
        rows = [self.rows[i] for i in which for _ in range(options.samples)]
        rewards = self._scores(rows, drawn, texts, ref)
        groups = gf.group_advantages(
            rewards,
            group_size=options.samples,
            scale=config.scale_rewards,
            reward_weights=self.prepared.runner.weights,
            normalize=config.multi_objective_aggregation,
        )
        sums = per_completion.view(-1, copies, 5).sum(1)
        return Call(rows, drawn, texts, rewards, groups.degenerate.tolist(), sums)

    def _statistics(
        self, prompts: list[list[int]], drawn: list[Completion], temperature: float
    ) -> tuple[gf.TokenLogprobs, gf.TokenLogprobs]:
        """Log-probabilities and entropies of the tokens, at T and at 1. Of greedy decoding both are those at 1: softmax(z/T) has none."""
        flat = torch.zeros(len(prompts))
        at_once = self.prepared.config.per_device_eval_batch_size

        def score(value: float) -> gf.TokenLogprobs:
            rollout = Rollout(prompts, [completion.token_ids for completion in drawn], flat + value, flat, flat == 0)
            return self.model_forward.logprobs(self.model, rollout, batch_size=at_once)

        plain = score(1.0)
        return (plain if temperature in (0.0, 1.0) else score(temperature)), plain

    def _scores(self, rows: list[dict[str, Any]], drawn: list[Completion], texts: list[str], ref: list[list[float]]) -> torch.Tensor:
        columns = {name: [row[name] for row in rows] for name in self.columns}
        chats: list[Any] = [
            text if isinstance(row["prompt"], str) else [{"role": "assistant", "content": text}]
            for row, text in zip(rows, texts, strict=True)
        ]
        extras: dict[str, Any] = {
            "trainer_state": None,
            "log_metric": lambda name, value: None,
            "log_extra": lambda column, values: None,
            "logprobs": [completion.logprobs for completion in drawn],
            "ref_logprobs": ref,  # before training the policy is its own reference
        }
        prompts = [row["prompt"] for row in rows]
        return self.prepared.runner(prompts, chats, [completion.token_ids for completion in drawn], extras=extras, **columns).values

    def _put_together(self, temperature: float, calls: list[list[Call]]) -> Drawn:
        """From the order in which it was drawn, round by round, to prompt by prompt."""
        options = self.prepared.options
        rounds = [[(call, group) for call in of_round for group in range(len(call.no_signal))] for of_round in calls]
        groups = [rounds[number][i] for i in range(len(self.rows)) for number in range(len(rounds))]  # [N * rounds]
        k = options.samples
        completions = [completion for call, group in groups for completion in call.drawn[group * k : (group + 1) * k]]
        texts = [text for call, group in groups for text in call.texts[group * k : (group + 1) * k]]
        coherence = None
        if self.prepared.coherence is not None:
            prompts = [row["prompt"] for call, group in groups for row in call.rows[group * k : (group + 1) * k]]
            coherence = [float(value or 0.0) for value in self.prepared.coherence(prompts, texts)]
        sums = torch.stack([call.sums[group] for call, group in groups]).view(len(self.rows), -1, 5).sum(1)  # [N, 5]
        entropy, entropy_at_1, tokens, gap, compared = sums.unbind(1)
        return Drawn(
            temperature,
            k,
            options.rounds,
            rewards=torch.cat([call.rewards[group * k : (group + 1) * k] for call, group in groups]),
            no_signal=[call.no_signal[group] for call, group in groups],
            shape=completion_statistics([c.token_ids for c in completions], [not c.finished for c in completions], options.ngram),
            texts=texts,
            coherence=coherence,
            entropy=(entropy / tokens).tolist(),
            entropy_at_1=(entropy_at_1 / tokens).tolist(),
            sampler_gap=(gap / compared).tolist() if compared.all() else None,
        )


@dataclass
class Call:
    """What one call of the sampler gave: b rows, groups side by side."""

    rows: list[dict[str, Any]]
    drawn: list[Completion]
    texts: list[str]
    rewards: torch.Tensor  # [b, R]
    no_signal: list[bool]  # [b / samples]
    sums: torch.Tensor  # float64 [b / samples, 5]: entropy, entropy at 1, tokens; gap to the sampler, tokens compared
