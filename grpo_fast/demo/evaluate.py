"""How the model writes at several sampling temperatures: accuracy, format, loops, repetition, coherence, diversity, entropy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch

import grpo_fast as gf
from grpo_fast.demo.grpo import sample
from grpo_fast.loss.statistics import entropy_summary
from grpo_fast.rewards import accuracy_reward, format_reward
from grpo_fast.utils.text_statistics import coherence, completion_statistics, distinct_shares, is_truncated

TEMPERATURES = (0.0, 0.2, 0.6, 1.0, 1.4)
KEY_PATTERN = r"\d"  # of this task's questions every single digit counts
NGRAM = 6  # longer than the four digits that a good completion repeats anyway (as its answer), shorter than two turns of a loop


@dataclass(frozen=True)
class Quality:
    """Means over the samples drawn at one temperature. All but ``entropy`` (nats per token) and ``length`` (tokens) are shares."""

    temperature: float
    samples: int
    accuracy: float
    format: float
    truncated: float  # ran into the length limit
    endless: float  # ... while repeating one block of tokens
    repetition: float  # n-grams that occurred before
    coherence: float
    diversity: float  # different completions in a group, of its size
    entropy: float  # of softmax(z/T), the distribution sampled from; 0 at T = 0
    length: float


def evaluate(
    model: Any,
    tokenizer: Any,
    rows: Sequence[dict[str, str]],
    *,
    group_size: int,
    max_new_tokens: int,
    seed: int,
    temperatures: Sequence[float] = TEMPERATURES,
    on_temperature: Callable[[], None] = lambda: None,
) -> list[Quality]:
    """Draw ``group_size`` completions for each row at each temperature, always from the same random numbers."""
    model.eval()
    table = []
    for temperature in temperatures:
        torch.manual_seed(seed)
        table.append(_evaluate_at(model, tokenizer, rows, temperature, group_size, max_new_tokens))
        on_temperature()
    return table


def _evaluate_at(model: Any, tokenizer: Any, rows: Sequence[dict[str, str]], temperature: float, group_size: int, limit: int) -> Quality:
    prompts = [row["prompt"] for row in rows for _ in range(group_size)]
    answers = [row["answer"] for row in rows for _ in range(group_size)]
    rollout = sample(model, tokenizer, prompts, temperature, limit, scores=True)
    ids = [row[kept].tolist() for row, kept in zip(rollout.completion_ids, rollout.mask, strict=True)]
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    cut = [is_truncated(row, tokenizer.eos_token_id) for row in ids]
    entropy = 0.0
    if temperature > 0:
        # the sampler's scores are z/T already: their own softmax is what was drawn from
        scored = gf.token_logprobs(torch.as_tensor(rollout.scores), rollout.completion_ids, mask=rollout.mask)
        entropy = entropy_summary(scored.entropy, rollout.mask).mean
    return Quality(
        temperature=temperature,
        samples=len(texts),
        accuracy=_mean(accuracy_reward(prompts, texts, ids, answer=answers)),
        format=_mean(format_reward(prompts, texts, ids)),
        **{name: fmean(values) for name, values in completion_statistics(ids, cut, NGRAM).items()},
        coherence=fmean(coherence(p, t, key_pattern=KEY_PATTERN) for p, t in zip(prompts, texts, strict=True)),
        diversity=fmean(distinct_shares(texts, group_size)),
        entropy=entropy,
    )


def sample_texts(model: Any, tokenizer: Any, prompts: Sequence[str], temperature: float, max_new_tokens: int, seed: int) -> list[str]:
    """One completion per prompt to look at, cut ones marked by an ellipsis."""
    torch.manual_seed(seed)
    rollout = sample(model, tokenizer, prompts, temperature, max_new_tokens)
    texts = tokenizer.batch_decode(rollout.completion_ids, skip_special_tokens=True)
    ended = (rollout.completion_ids == tokenizer.eos_token_id).any(1).tolist()
    return [text if done else f"{text}…" for text, done in zip(texts, ended, strict=True)]


def _mean(values: Sequence[float | None]) -> float:
    return fmean(value for value in values if value is not None)
