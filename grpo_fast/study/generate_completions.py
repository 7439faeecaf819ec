"""Generation and scoring of the completions at one temperature, by the trainer's own samplers, rewards and forward passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from accelerate import Accelerator

import grpo_fast as gf
from grpo_fast.data.chats import sends_as_chat
from grpo_fast.data.prompts import encode_prompt
from grpo_fast.generation import Completion, SamplingParams, make_sampler
from grpo_fast.models.forward import ModelForward
from grpo_fast.models.unwrap import end_tokens_of
from grpo_fast.study.sampling_setup import Row, SamplingStudy
from grpo_fast.trainer.rollout import Rollout
from grpo_fast.utils.seeds import derived_seed
from grpo_fast.utils.text_statistics import completion_statistics

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["OnCalls", "SamplerCall", "TemperatureSampler", "TemperatureSamples"]

OnCalls = Callable[[float, int, int], None]


@dataclass
class TemperatureSamples:
    """The B = N * rounds * samples scored completions of one temperature, ordered by prompt, then round, then sample."""

    temperature: float
    samples: int
    rounds: int
    rewards: torch.Tensor  # [B, R], NaN where a reward does not apply
    zero_std: list[bool]  # [B / samples] whether all rewards of the group are equal
    statistics: dict[str, list[float]]  # each [B], see `completion_statistics`
    texts: list[str]  # [B]
    coherence: list[float] | None  # [B]
    entropy: list[float]  # [N] of softmax(z/T), mean over the prompt's tokens, in nats
    entropy_at_1: list[float]  # [N] of softmax(z) on the same tokens
    sampler_gap: list[float] | None  # [N] mean absolute difference of the tokens' logprobs between sampler and loss, if the sampler has any


@dataclass
class SamplerCall:
    """The b completions of one call of the sampler, groups side by side."""

    rows: list[Row]
    completions: list[Completion]
    texts: list[str]
    rewards: torch.Tensor  # [b, R]
    zero_std: list[bool]  # [b / samples]
    sums: torch.Tensor  # float64 [b / samples, 5], columns as in `TokenSums`


class TokenSums(NamedTuple):
    """Sums over the tokens of a group, or of all completions of a prompt; float64 [N] each."""

    entropy: torch.Tensor  # of softmax(z/T)
    entropy_at_1: torch.Tensor  # of softmax(z)
    tokens: torch.Tensor
    gap: torch.Tensor  # absolute difference of the logprobs between sampler and loss
    compared: torch.Tensor  # tokens with a logprob from the sampler


class TemperatureSampler:
    """Generates and scores completions. Each call of the sampler gets whole groups, at most ``per_device_eval_batch_size`` completions.

    Args:
        study: see `prepare_sampling`.
        model: a causal language model; the settings determine how its head and its sampler run.
    """

    def __init__(self, study: SamplingStudy, model: PreTrainedModel) -> None:
        config, self.study, self.model = study.config, study, model
        tokenizer = study.tokenizer
        self.pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        sampler_options, chat = config.sampler_options or {}, config.chat_template_kwargs
        assert not isinstance(sampler_options, str) and not isinstance(chat, str)  # parsed by the configuration
        precision = "bf16" if config.bf16 else "fp16" if config.fp16 else "no"
        accelerator = Accelerator(cpu=config.use_cpu, mixed_precision=precision)
        self.model_forward = ModelForward(accelerator, self.pad, **config.forward_options())
        self.sampler = make_sampler(config.sampler, model, tokenizer, **sampler_options)
        self.sampler.update_weights(model, 0)
        self.end_tokens = end_tokens_of(model, tokenizer)
        self.rows: list[Row] = [dict(row) for row in study.rows]
        as_chat = sends_as_chat(config.chat, study.rows, tokenizer, str(study.options.dataset))
        self.encoded = [encode_prompt(row["prompt"], tokenizer, chat, as_chat=as_chat) for row in self.rows]
        self.columns = [name for name in self.rows[0] if name not in ("prompt", "completion", "completion_ids")]

    def generate(self, temperature: float, on_calls: OnCalls) -> TemperatureSamples:
        """Generate and score the completions of all prompts, round by round.

        Args:
            temperature: 0 is greedy decoding, which is run once and counted in every round.
            on_calls: called with the temperature, the number of finished sampler calls, and their total; once before the first call.
        """
        options, config = self.study.options, self.study.config
        greedy = temperature == 0
        at_once = max(config.per_device_eval_batch_size // (1 if greedy else options.samples), 1)  # prompts
        starts = range(0, len(self.rows), at_once)
        rounds = 1 if greedy else options.rounds  # every round of greedy decoding would be the same
        total = rounds * len(starts)
        on_calls(temperature, 0, total)
        calls: list[list[SamplerCall]] = []
        for number in range(rounds):
            calls.append([])
            for start in starts:
                calls[-1].append(self.call_sampler(range(start, min(start + at_once, len(self.rows))), temperature, number))
                on_calls(temperature, len(calls[-1]) + number * len(starts), total)
        if greedy:
            calls = calls * options.rounds
        return self._collect(temperature, calls)

    def call_sampler(self, which: range, temperature: float, number: int) -> SamplerCall:
        """Generate and score one round of some of the prompts. At T = 0 one completion is generated and counted for the whole group.

        Args:
            which: indices of the prompts.
            temperature: to sample at.
            number: of the round; with the first prompt it determines the random numbers, which are the same at every temperature.
        """
        options, config = self.study.options, self.study.config
        copies = 1 if temperature == 0 else options.samples
        prompts = [self.encoded[i] for i in which for _ in range(copies)]
        params = SamplingParams(
            config.max_completion_length,
            [temperature] * len(prompts),
            top_p=config.top_p,
            top_k=config.top_k,
            min_p=config.min_p or 0.0,
            repetition_penalty=config.repetition_penalty,
            generation_kwargs=config.generation_arguments,
            seed=derived_seed(config.seed, "study", number, which.start),
            eos_token_id=self.end_tokens,
            pad_token_id=self.pad,
        )
        completions = self.sampler.generate(prompts, params)
        at_t, at_1 = self._token_statistics(prompts, completions, temperature)
        lengths = [len(completion.token_ids) for completion in completions]
        logprobs = at_t.logprobs.cpu().split(lengths)
        gaps = [
            torch.empty(0) if completion.logprobs is None else (torch.tensor(completion.logprobs) - own).abs()
            for completion, own in zip(completions, logprobs, strict=True)
        ]
        per_completion = torch.tensor(
            [
                (0.0 if temperature == 0 else h.sum(), h_1.sum(), len(h), gap.sum(), len(gap))
                for h, h_1, gap in zip(at_t.entropy.cpu().split(lengths), at_1.entropy.cpu().split(lengths), gaps, strict=True)
            ],
            dtype=torch.float64,
        )
        if copies != options.samples:
            completions = [completion for completion in completions for _ in range(options.samples)]
        ref_logprobs = [part.tolist() for part in logprobs for _ in range(options.samples // copies)]
        texts = self.study.tokenizer.batch_decode([completion.token_ids for completion in completions], skip_special_tokens=True)
        rows = [self.rows[i] for i in which for _ in range(options.samples)]
        rewards = self._score(rows, completions, texts, ref_logprobs)
        groups = gf.group_advantages(
            rewards,
            group_size=options.samples,
            reward_weights=self.study.runner.weights,
            normalize=config.multi_objective_aggregation,
        )
        sums = per_completion.view(-1, copies, len(TokenSums._fields)).sum(1)
        return SamplerCall(rows, completions, texts, rewards, groups.degenerate.tolist(), sums)

    def _token_statistics(
        self, prompts: list[list[int]], completions: list[Completion], temperature: float
    ) -> tuple[gf.TokenLogprobs, gf.TokenLogprobs]:
        """Return log-probabilities and entropies of the tokens at T and at 1. For greedy decoding both are those at 1."""
        zeros = torch.zeros(len(prompts))
        batch_size = self.study.config.per_device_eval_batch_size

        def score(value: float) -> gf.TokenLogprobs:
            rollout = Rollout(prompts, [completion.token_ids for completion in completions], zeros + value, zeros, zeros == 0)
            return self.model_forward.logprobs(self.model, rollout, batch_size=batch_size)

        at_1 = score(1.0)
        return (at_1 if temperature in (0.0, 1.0) else score(temperature)), at_1

    def _score(self, rows: Sequence[Row], completions: list[Completion], texts: list[str], ref_logprobs: list[list[float]]) -> torch.Tensor:
        columns = {name: [row[name] for row in rows] for name in self.columns}
        answers = [
            text if isinstance(row["prompt"], str) else [{"role": "assistant", "content": text}]
            for row, text in zip(rows, texts, strict=True)
        ]
        extras = {
            "trainer_state": None,
            "log_metric": lambda name, value: None,
            "log_extra": lambda column, values: None,
            "logprobs": [completion.logprobs for completion in completions],
            "ref_logprobs": ref_logprobs,  # before training the policy is its own reference
        }
        prompts = [row["prompt"] for row in rows]
        token_ids = [completion.token_ids for completion in completions]
        return self.study.runner(prompts, answers, token_ids, extras=extras, **columns).values

    def _collect(self, temperature: float, calls: list[list[SamplerCall]]) -> TemperatureSamples:
        """Reorder the completions from the order of generation, round by round, to prompt by prompt."""
        options = self.study.options
        rounds = [[(call, group) for call in of_round for group in range(len(call.zero_std))] for of_round in calls]
        groups = [rounds[number][i] for i in range(len(self.rows)) for number in range(len(rounds))]  # [N * rounds]
        k = options.samples
        completions = [completion for call, group in groups for completion in call.completions[group * k : (group + 1) * k]]
        texts = [text for call, group in groups for text in call.texts[group * k : (group + 1) * k]]
        coherence = None
        if self.study.coherence is not None:
            prompts = [row["prompt"] for call, group in groups for row in call.rows[group * k : (group + 1) * k]]
            coherence = [float(value or 0.0) for value in self.study.coherence(prompts, texts)]
        by_prompt = torch.stack([call.sums[group] for call, group in groups]).view(len(self.rows), -1, len(TokenSums._fields)).sum(1)
        sums = TokenSums(*by_prompt.unbind(1))
        ngram = options.ngram
        return TemperatureSamples(
            temperature,
            k,
            options.rounds,
            rewards=torch.cat([call.rewards[group * k : (group + 1) * k] for call, group in groups]),
            zero_std=[call.zero_std[group] for call, group in groups],
            statistics=completion_statistics([c.token_ids for c in completions], [not c.finished for c in completions], ngram),
            texts=texts,
            coherence=coherence,
            entropy=(sums.entropy / sums.tokens).tolist(),
            entropy_at_1=(sums.entropy_at_1 / sums.tokens).tolist(),
            sampler_gap=(sums.gap / sums.compared).tolist() if sums.compared.all() else None,
        )
