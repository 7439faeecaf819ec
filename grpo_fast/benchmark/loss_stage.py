"""What the suites of trainers share: the loss stage of a training step is what lies between a prepared batch and its gradients.

Timed are compute_loss (backbone, head, loss), backward, and the metrics read as they are logged. No generation, no optimizer. The model has
a real head on one thin layer, so that the head is what is timed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from grpo_fast.benchmark.eager import eager_logprobs
from grpo_fast.benchmark.harness.settings import BenchmarkSettings, require, setting
from grpo_fast.benchmark.harness.suite import Result, mebibytes, table
from grpo_fast.ops.environment import caption

__all__ = ["LossStageSettings", "make_batch", "make_model", "make_tokenizer", "print_loss_stage", "trainer_arguments"]

_NOISE = 0.2  # nats between the old log-probabilities and the model's: ratios on both sides of the clip band


@dataclass(frozen=True, kw_only=True)
class LossStageSettings(BenchmarkSettings):
    """What is measured. With this width, the vocabulary is that of Qwen2.5-0.5B's head, which is tied to its embedding."""

    sequences: int = setting(8, "Of a batch.")
    group: int = setting(4, "Sequences of one prompt.", least=1)
    tokens: int = setting(128, "Of each completion.", least=1)
    width: int = setting(896, "Of the hidden states.", least=1)
    vocabulary: int = setting(151_936, "Rows of the head's weight.", least=2)
    active: tuple[float, ...] = setting((1.0, 0.5), "Share of groups with unequal rewards; may be repeated.")

    def __post_init__(self) -> None:
        super().__post_init__()
        whole = self.sequences >= self.group and self.sequences % self.group == 0
        require(whole, "sequences", self.sequences, f"a multiple of group, {self.group}")
        groups = self.sequences // self.group
        for active in self.active:
            whole = 0 < active <= 1 and (active * groups) % 1 == 0
            require(whole, "active", active, f"a share above 0 that is a whole number of {groups} groups")


def make_model(settings: LossStageSettings) -> Any:
    """One layer and the head, random; logits with a standard deviation of about 1.5. The same in every process."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(settings.seed)
    sizes = {"vocab_size": settings.vocabulary, "hidden_size": settings.width, "intermediate_size": 2 * settings.width}
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}
    tokens = {"max_position_embeddings": settings.tokens + 1, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
    return Qwen2ForCausalLM(Qwen2Config(**sizes, **layers, **tokens, initializer_range=1.5 / settings.width**0.5))


def trainer_arguments(settings: LossStageSettings, folder: str) -> dict[str, Any]:
    """The arguments that both libraries' GRPOConfig take; the rest are their defaults."""
    sizes = {"num_generations": settings.group, "per_device_train_batch_size": settings.sequences}
    quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    options = {"use_cpu": True, "gradient_checkpointing": False, "max_completion_length": settings.tokens}
    return {"output_dir": folder, **sizes, **quiet, **options}


def make_tokenizer() -> Any:
    """The smallest tokenizer that a trainer accepts."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def make_batch(settings: LossStageSettings) -> dict[str, Tensor]:
    """What TRL hands to compute_loss, for all groups active."""
    model = make_model(settings)
    generator = torch.Generator().manual_seed(settings.seed)
    ids = torch.randint(2, settings.vocabulary, (settings.sequences, settings.tokens + 1), generator=generator)
    with torch.no_grad():  # sequence by sequence: the logits of all are gigabytes
        logprobs = torch.cat([eager_logprobs(model(row[None, :-1]).logits, row[None, 1:], 1.0)[0] for row in ids])
    rewards = torch.randn(settings.sequences // settings.group, settings.group, generator=generator)
    return {
        "prompt_ids": ids[:, :1],
        "prompt_mask": torch.ones_like(ids[:, :1]),
        "completion_ids": ids[:, 1:],
        "completion_mask": torch.ones_like(ids[:, 1:]),
        "advantages": ((rewards - rewards.mean(1, keepdim=True)) / rewards.std(1, keepdim=True)).flatten(),
        "num_items_in_batch": torch.tensor(settings.sequences * settings.tokens),
        "old_per_token_logps": logprobs + _NOISE * torch.randn(settings.sequences, settings.tokens, generator=generator),
    }


def print_loss_stage(result: Result, console: Console, labels: dict[str, str]) -> None:
    """The table of a loss stage: times, multiples of the baseline's, memory."""
    (faster,) = (key for key in result["results"][0] if key.startswith("faster_than"))
    rows = [
        (labels[e["implementation"]], f"{e['active']:.0%}", f"{e['median']:.3g}", f"{e[faster]:.2f}x", mebibytes(e["peak_bytes"]))
        for e in result["results"]
    ]
    columns = ("groups active", "seconds", faster.replace("_", " "), "extra memory, MiB")
    console.print(table("Loss stage: compute_loss, backward, metrics", columns, rows))
    console.print(caption(result["machine"], result["settings"]["threads"]))
