"""The model: a real causal language model of the transformers library, small enough for one core, and its warm start by imitation."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from grpo_fast.data.tasks.sorting import question
from grpo_fast.demo.teacher import Teacher
from grpo_fast.utils.install_hints import require_packages

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SFT_BATCH = 64
SFT_LEARNING_RATE = 5e-3
IGNORE = -100  # the label that transformers' cross entropy leaves out


def make_model(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A randomly initialised Qwen2 of about 0.1 million parameters."""
    require_packages("transformers", extras=("demo",), needed_by="The demo")
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=192,
        max_position_embeddings=256,
        tie_word_embeddings=False,  # tied, or with the usual 0.02, a model this narrow needs twice the imitation to become crisp
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="eager",  # at these sizes quicker on a CPU than the fused attention's set-up
    )
    return Qwen2ForCausalLM(config)


def imitate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    digits: list[str],
    teacher: Teacher,
    *,
    steps: int,
    max_new_tokens: int,
    seed: int,
    on_step: Callable[[float], None] = lambda loss: None,
) -> None:
    """Cross entropy on the teacher's completions, not on the prompts. What is longer than ``max_new_tokens`` is cut, and has no end."""
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=SFT_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0)
    total = max(steps, 11)  # with ten, the first tenth has a length of 0, by which OneCycleLR divides
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, SFT_LEARNING_RATE, total_steps=total, pct_start=0.1)
    model.train()
    for _ in range(steps):
        batch = rng.sample(digits, SFT_BATCH)
        prompts = tokenizer([question(d)["prompt"] for d in batch])["input_ids"]
        answers = tokenizer([teacher.complete(d, rng) for d in batch])["input_ids"]
        rows = [(p, [*a, tokenizer.eos_token_id][:max_new_tokens]) for p, a in zip(prompts, answers, strict=True)]
        width = max(len(p) + len(a) for p, a in rows)
        input_ids = torch.tensor([p + a + [tokenizer.pad_token_id] * (width - len(p) - len(a)) for p, a in rows])
        labels = torch.tensor([[IGNORE] * len(p) + a + [IGNORE] * (width - len(p) - len(a)) for p, a in rows])
        loss = model(input_ids=input_ids, labels=labels, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        on_step(loss.item())
