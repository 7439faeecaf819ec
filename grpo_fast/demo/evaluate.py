"""Evaluation at several sampling temperatures: accuracy, format, endless loops, repetition, coherence, diversity, entropy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

import torch

import grpo_fast as gf
from grpo_fast.demo.grpo import sample
from grpo_fast.loss.statistics import entropy_summary
from grpo_fast.rewards import accuracy_reward, format_reward
from grpo_fast.utils.text_statistics import coherence, completion_statistics, distinct_shares, is_truncated

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["KEY_PATTERN", "NGRAM", "TEMPERATURES", "SamplingQuality", "evaluate", "sample_texts"]

TEMPERATURES = (0.0, 0.2, 0.6, 1.0, 1.4)
KEY_PATTERN = r"\d"  # coherence compares single digits
NGRAM = 6  # above 4, since a correct completion repeats the four digits in its answer, and below two repetitions of a line


@dataclass(frozen=True)
class SamplingQuality:
    """Means over the completions of one temperature. All are shares, except ``entropy`` (nats per token) and ``length`` (tokens)."""

    temperature: float
    samples: int
    accuracy: float
    format: float
    truncated: float  # reached the length limit
    endless: float  # reached the length limit while repeating one block of tokens
    repetition: float  # n-grams that occurred before
    coherence: float
    diversity: float  # distinct completions of a group, as a share of its size
    entropy: float  # of softmax(z/T), the distribution sampled from; 0 at T = 0
    length: float


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict[str, str]],
    *,
    group_size: int,
    max_new_tokens: int,
    seed: int,
    temperatures: Sequence[float] = TEMPERATURES,
    on_temperature: Callable[[], None] = lambda: None,
) -> list[SamplingQuality]:
    """Evaluate a model at each temperature, with the same random numbers each time.

    Args:
        model: to sample from.
        tokenizer: of the task.
        rows: questions, see `question`.
        group_size: completions per question.
        max_new_tokens: length limit of a completion.
        seed: of sampling.
        temperatures: 0 is greedy decoding.
        on_temperature: called after each temperature.
    """
    model.eval()
    table = []
    for temperature in temperatures:
        torch.manual_seed(seed)
        table.append(_evaluate_at(model, tokenizer, rows, temperature, group_size, max_new_tokens))
        on_temperature()
    return table


def _evaluate_at(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict[str, str]],
    temperature: float,
    group_size: int,
    max_new_tokens: int,
) -> SamplingQuality:
    prompts = [row["prompt"] for row in rows for _ in range(group_size)]
    answers = [row["answer"] for row in rows for _ in range(group_size)]
    batch = sample(model, tokenizer, prompts, temperature, max_new_tokens, scores=True)
    ids = [row[kept].tolist() for row, kept in zip(batch.completion_ids, batch.mask, strict=True)]
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    truncated = [is_truncated(row, tokenizer.eos_token_id) for row in ids]
    entropy = 0.0
    if temperature > 0:
        # the sampler's scores are z/T already, so the temperature of this call is 1
        scored = gf.token_logprobs(torch.as_tensor(batch.scores), batch.completion_ids, mask=batch.mask)
        entropy = entropy_summary(scored.entropy, batch.mask).mean
    return SamplingQuality(
        temperature=temperature,
        samples=len(texts),
        accuracy=_mean(accuracy_reward(prompts, texts, ids, answer=answers)),
        format=_mean(format_reward(prompts, texts, ids)),
        **{name: fmean(values) for name, values in completion_statistics(ids, truncated, NGRAM).items()},
        coherence=fmean(coherence(p, t, key_pattern=KEY_PATTERN) for p, t in zip(prompts, texts, strict=True)),
        diversity=fmean(distinct_shares(texts, group_size)),
        entropy=entropy,
    )


def sample_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    temperature: float,
    max_new_tokens: int,
    seed: int,
) -> list[str]:
    """Sample one completion per prompt to be shown; truncated ones end in an ellipsis."""
    torch.manual_seed(seed)
    batch = sample(model, tokenizer, prompts, temperature, max_new_tokens)
    texts = tokenizer.batch_decode(batch.completion_ids, skip_special_tokens=True)
    ended = (batch.completion_ids == tokenizer.eos_token_id).any(1).tolist()
    return [text if done else f"{text}…" for text, done in zip(texts, ended, strict=True)]


def _mean(values: Sequence[float | None]) -> float:
    return fmean(value for value in values if value is not None)
