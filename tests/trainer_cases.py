"""A small model, tokenizer, prompts, rewards and samplers for tests of the trainer."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from grpo_fast.data.tasks.sorting import make_tokenizer, question
from grpo_fast.generation import Completion
from grpo_fast.trainer import GRPOTrainer
from grpo_fast.trainer.config import GRPOConfig

TOKENIZER = make_tokenizer()
ROWS = [question(f"{number:04d}") for number in random.Random(0).sample(range(10_000), 40)]


def model(seed: int = 0, **settings: Any) -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    settings = {
        "attn_implementation": "eager",
        "tie_word_embeddings": False,
        "num_hidden_layers": 2,
        "max_position_embeddings": 64,
    } | settings
    config = Qwen2Config(
        vocab_size=len(TOKENIZER),
        hidden_size=16,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=32,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=TOKENIZER.eos_token_id,
        pad_token_id=TOKENIZER.pad_token_id,
        **settings,
    )
    return Qwen2ForCausalLM(config)


def odd_tokens(prompts: Any, completions: Any, completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """The share of odd tokens, which varies within a group and is the same in every process."""
    return [sum(token % 2 for token in ids) / max(len(ids), 1) for ids in completion_ids]


def short(prompts: Any, completions: Any, completion_ids: list[list[int]], **columns: Any) -> list[float]:
    return [-0.1 * len(ids) for ids in completion_ids]


class Scripted:
    """A sampler whose completions depend only on the prompt and on how often the same call has had it before."""

    def __init__(self, longest: int = 8, logprobs: Any = None) -> None:
        self.longest, self.logprobs = longest, logprobs
        self.calls: list[Any] = []

    def generate(self, prompts: Any, params: Any) -> list[Completion]:
        self.calls.append((prompts, params))
        asked: Counter[str] = Counter()
        found = []
        for prompt in prompts:
            rng = random.Random(f"{prompt} {asked[str(prompt)]}")
            asked[str(prompt)] += 1
            ids = [rng.randrange(3, len(TOKENIZER)) for _ in range(rng.randint(1, self.longest))]
            finished = len(ids) < self.longest
            ids = [*ids, params.eos_token_id[0]] if finished else ids
            found.append(Completion(ids, finished, None))
        return found if self.logprobs is None else self.logprobs(prompts, found, params)

    def update_weights(self, model: Any, step: int) -> None:
        pass

    def close(self) -> None:
        pass


def config(output: Path | str, **settings: Any) -> GRPOConfig:
    options: dict[str, Any] = {
        "per_device_train_batch_size": 16,
        "num_generations": 4,
        "max_completion_length": 8,
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": False,
        "max_steps": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
    } | settings
    return GRPOConfig(str(output), **options)


def trainer(output: Path | str, *, of: Any = None, rewards: Any = odd_tokens, rows: Any = ROWS, **settings: Any) -> GRPOTrainer:
    """A trainer; ``sampler``, ``eval_dataset`` and other constructor arguments are passed to it, the rest to its settings."""
    names = ("sampler", "eval_dataset", "peft_config", "optimizers", "callbacks", "quantization_config")
    own = {name: settings.pop(name) for name in names if name in settings}
    return GRPOTrainer(
        model() if of is None else of, rewards, config(output, **settings), train_dataset=rows, processing_class=TOKENIZER, **own
    )


def logs(run: GRPOTrainer) -> list[dict[str, float]]:
    """The logs of the steps."""
    return [record for record in run.state.log_history if "loss" in record]


def parameters(of: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in of.named_parameters()}
