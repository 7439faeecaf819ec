"""The warm start: the model imitates the teacher's completions, and has the teacher's habits before GRPO begins."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch

from grpo_fast.data.tasks.sorting import make_tokenizer, question, split_questions
from grpo_fast.demo.model import make_model
from grpo_fast.demo.options import MAX_NEW_TOKENS, DemoOptions
from grpo_fast.demo.teacher import Teacher

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["WarmStart", "imitate", "one_thread", "warm_start"]

BATCH_SIZE = 64
LEARNING_RATE = 5e-3
IGNORE_INDEX = -100  # label that the cross entropy of transformers ignores


class WarmStart(NamedTuple):
    """The state in which GRPO begins."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    training: list[dict[str, str]]  # rows, see `question`
    held_out: list[dict[str, str]]


def warm_start(options: DemoOptions, on_loss: Callable[[float], None] = lambda loss: None) -> WarmStart:
    """Train the demonstration's model by imitation. The result depends on ``options.seed`` and ``options.warm_start_steps`` only.

    Args:
        options: of the demonstration.
        on_loss: called with the loss of each step.
    """
    torch.manual_seed(options.seed)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    training, held_out = split_questions()
    steps, seed = options.warm_start_steps, options.seed
    imitate(model, tokenizer, training, Teacher(), steps=steps, max_new_tokens=MAX_NEW_TOKENS, seed=seed, on_step=on_loss)
    return WarmStart(model, tokenizer, [question(digits) for digits in training], [question(digits) for digits in held_out])


def imitate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    digits: Sequence[str],
    teacher: Teacher,
    *,
    steps: int,
    max_new_tokens: int,
    seed: int,
    on_step: Callable[[float], None] = lambda loss: None,
) -> None:
    """Minimize the cross entropy of the teacher's completions in place; prompts have no loss.

    Completions longer than ``max_new_tokens`` are cut and have no end token.

    Args:
        model: to train.
        tokenizer: of the task.
        digits: numbers to ask for, see `question`.
        teacher: writes the completions.
        steps: number of optimizer steps.
        max_new_tokens: length limit of a completion, end token included.
        seed: of the batches and of the teacher.
        on_step: called with the loss of each step.
    """
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0)
    total = max(steps, 11)  # with 10 or fewer steps, OneCycleLR divides by the length of its first tenth, which is 0
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=total, pct_start=0.1)
    model.train()
    for _ in range(steps):
        batch = rng.sample(digits, BATCH_SIZE)
        prompts = tokenizer([question(d)["prompt"] for d in batch])["input_ids"]
        answers = tokenizer([teacher.complete(d, rng) for d in batch])["input_ids"]
        rows = [(p, [*a, tokenizer.eos_token_id][:max_new_tokens]) for p, a in zip(prompts, answers, strict=True)]
        width = max(len(p) + len(a) for p, a in rows)
        input_ids = torch.tensor([p + a + [tokenizer.pad_token_id] * (width - len(p) - len(a)) for p, a in rows])
        labels = torch.tensor([[IGNORE_INDEX] * len(p) + a + [IGNORE_INDEX] * (width - len(p) - len(a)) for p, a in rows])
        loss = model(input_ids=input_ids, labels=labels, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        on_step(loss.item())


@contextmanager
def one_thread() -> Iterator[None]:
    """Run PyTorch on one thread: a model this small gains nothing from a second, which spins and slows other processes down."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
