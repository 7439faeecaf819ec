"""A complete GRPO training loop: sample groups, score them, normalise within each group, take one step. Copy it for your own model.

It needs a causal language model and tokenizer of transformers, an endless iterator of batches of rows (each with a ``prompt``, and the
columns that the rewards read), and rewards as in `grpo_fast.rewards`. Nothing below depends on the demonstration's task.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

import grpo_fast as gf
from grpo_fast.rewards import Reward, reward_matrix

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class LoopSettings:
    """Settings of the loop. `sample` draws from softmax(z/T) and `policy_loss` scores the same softmax(z/T), with T = ``temperature``.

    Raises:
        ValueError: ``temperature`` or ``group_size`` is out of range.
    """

    steps: int = 60
    group_size: int = 8  # completions per prompt
    max_new_tokens: int = 32
    temperature: float = 1.0
    learning_rate: float = 3e-4
    warmup_steps: int = 3
    max_grad_norm: float = 1.0
    loss: gf.LossConfig = gf.LossConfig(loss_type="dapo", epsilon_low=0.2, epsilon_high=0.28)

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ValueError(
                f"temperature is {self.temperature}; expected a finite number above 0, since greedy decoding gives a "
                "whole group the same completion, and nothing to learn from. Fix: 1.0, as in DeepSeek-R1's training; 0 is for evaluation."
            )
        if self.group_size < 2:
            raise ValueError(f"group_size is {self.group_size}; expected at least 2: an advantage compares the completions of a group.")


class SampledBatch(NamedTuple):
    """Prompts with their completions, P and T tokens long after padding."""

    input_ids: Tensor  # int64 [B, P+T]: prompts padded on the left, then completions padded on the right
    attention_mask: Tensor  # int64 [B, P+T]
    completion_ids: Tensor  # int64 [B, T]
    mask: Tensor  # bool [B, T]: True up to and including the end token
    scores: Tensor | None  # float32 [B, T, V]: the logits that were sampled from, z/T; None unless requested


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    temperature: float,
    max_new_tokens: int,
    *,
    scores: bool = False,
) -> SampledBatch:
    """Sample one completion per prompt from softmax(z/T), without top-p or top-k; greedy decoding at T = 0, for evaluation."""
    batch = tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="left").to(model.device)
    input_ids, attention_mask = batch["input_ids"], batch["attention_mask"]
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    options = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {"do_sample": False}
    options |= {"max_new_tokens": max_new_tokens, "eos_token_id": eos, "pad_token_id": pad}
    output = model.generate(input_ids, attention_mask=attention_mask, return_dict_in_generate=True, output_scores=scores, **options)
    completion_ids = output.sequences[:, input_ids.shape[1] :]
    ended = (completion_ids == eos).long()
    mask = ended.cumsum(1) - ended == 0  # no end token before this one: the first end token is an action too
    attention_mask = torch.cat([attention_mask, mask.long()], 1)
    return SampledBatch(output.sequences, attention_mask, completion_ids, mask, torch.stack(output.scores, 1) if scores else None)


def policy_loss(model: PreTrainedModel, batch: SampledBatch, advantages: Tensor, settings: LoopSettings) -> gf.GRPOOutput:
    """Return the loss of a batch that the current model sampled: on-policy, without old log-probabilities.

    If [B, T+1, V] logits do not fit into memory, call this on slices of the batch, with `gf.grpo_loss(..., num_items=batch.mask.sum())`.
    """
    logits = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=(batch.attention_mask.cumsum(1) - 1).clamp(min=0),  # left padding must not shift the positions
        logits_to_keep=batch.completion_ids.shape[1] + 1,  # from the prompt's last token on; grpo_loss ignores the last position
        use_cache=False,
    ).logits
    T = settings.temperature  # noqa: N806
    return gf.grpo_loss(logits, batch.completion_ids, advantages, config=settings.loss, mask=batch.mask, temperature=T)


@torch.no_grad()
def check_on_policy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], settings: LoopSettings, tolerance: float = 1e-4
) -> float:
    """Check that the loss computes the log-probabilities that the sampler sampled with.

    Returns:
        The largest difference, in nats.

    Raises:
        RuntimeError: the difference is larger than ``tolerance``.
    """
    batch = sample(model, tokenizer, prompts, settings.temperature, settings.max_new_tokens, scores=True)
    drawn = torch.as_tensor(batch.scores).float().log_softmax(-1).gather(-1, batch.completion_ids[..., None]).squeeze(-1)
    out = policy_loss(model, batch, torch.zeros(len(prompts), device=model.device), settings)
    gap = (out.logprobs - drawn)[batch.mask].abs().max().item()
    if not gap <= tolerance:
        raise RuntimeError(
            f"check_on_policy: the loss's log-probabilities differ from the sampler's by up to {gap:.3g} nats; expected {tolerance:g} at "
            f"most. Most likely sampling and loss do not share one temperature (the loss has {settings.temperature}). Other causes: the "
            "sampler truncates or penalises (top_k, top_p, min_p, repetition_penalty), dropout is on, or positions ignore the padding."
        )
    return gap


def make_optimizer(model: PreTrainedModel, settings: LoopSettings) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """Return AdamW and its schedule: a linear warm-up of the learning rate, constant afterwards."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / max(settings.warmup_steps, 1)))


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batches: Iterator[list[dict[str, str]]],
    rewards: dict[Reward, float],  # reward -> weight
    settings: LoopSettings,
    on_step: Callable[[dict[str, float]], None] = lambda record: None,
) -> list[dict[str, float]]:
    """Make ``settings.steps`` updates.

    Returns:
        The metrics of each step, with which ``on_step`` was called.
    """
    model.eval()  # no dropout: the policy that is updated must be the one that was sampled
    optimizer, warmup = make_optimizer(model, settings)
    weights = torch.tensor(list(rewards.values()))
    history = []
    for step in range(settings.steps):
        started = time.perf_counter()
        rows = [row for row in next(batches) for _ in range(settings.group_size)]  # the completions of a group are adjacent
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        prompts = columns.pop("prompt")
        if step == 0:
            check_on_policy(model, tokenizer, prompts[:: settings.group_size], settings)

        batch = sample(model, tokenizer, prompts, settings.temperature, settings.max_new_tokens)
        completion_ids = [ids[kept].tolist() for ids, kept in zip(batch.completion_ids, batch.mask, strict=True)]
        completions = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        scores = reward_matrix(list(rewards), prompts, completions, completion_ids, **columns)  # [B, R]
        groups = gf.group_advantages(scores, group_size=settings.group_size, reward_weights=weights)
        out = policy_loss(model, batch, groups.advantages.to(model.device), settings)

        optimizer.zero_grad()
        out.loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        optimizer.step()
        warmup.step()

        record = {f"rewards/{reward.__name__}": value for reward, value in zip(rewards, scores.nanmean(0).tolist(), strict=True)}
        record |= {"step": step, "reward": (scores.nan_to_num() @ weights).mean().item(), "loss": out.loss.item()}
        record |= {"entropy": out.metrics["entropy"].item(), "grad_norm": grad_norm.item()}
        record["zero_variance_groups"] = groups.degenerate.float().mean().item()
        record["truncated"] = sum(tokenizer.eos_token_id not in ids for ids in completion_ids) / len(rows)
        record["length"] = batch.mask.sum(1).float().mean().item()
        record["seconds"] = time.perf_counter() - started
        history.append(record)
        on_step(record)
    return history
