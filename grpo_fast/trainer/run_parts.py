"""Rewards, tokenizer, rows and adapter of a run, loaded from its settings and checked before any model is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from grpo_fast.data.loading import load_rewards, load_tokenizer, make_task, prompt_rows
from grpo_fast.data.tasks import Task
from grpo_fast.generation import check_options
from grpo_fast.rewards import Reward, RewardRunner
from grpo_fast.trainer.run_settings import TrainOptions
from grpo_fast.utils.errors import SettingsError

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PreTrainedTokenizerBase

    from grpo_fast.trainer.config import GRPOConfig

__all__ = ["RunParts", "load_run_parts"]


class RunParts(NamedTuple):
    """What `GRPOTrainer` takes beside the model and its settings."""

    task: Task | None  # that the training rows are of, if they are generated
    rewards: list[Reward]
    runner: RewardRunner
    tokenizer: PreTrainedTokenizerBase
    train_dataset: Dataset
    eval_dataset: Dataset | None
    peft_config: LoraConfig | None


def load_run_parts(options: TrainOptions, config: GRPOConfig) -> RunParts:
    """Load rewards, tokenizer and rows, and check that they fit together.

    Args:
        options: names of the model, the data and the rewards; ``dataset`` is set.
        config: settings of the training.

    Raises:
        SettingsError, ValueError, TypeError: names the setting, what it was, what was expected and the fix.
    """
    assert options.dataset is not None
    seed = config.prompt_seed
    task = make_task(options.dataset, size=options.dataset_size, seed=seed)
    rewards = load_rewards(options.rewards, task)
    runner = RewardRunner(
        rewards,
        weights=config.reward_weights,
        timeout=config.reward_timeout,
        on_error=config.reward_on_error,
        isolation=config.reward_isolation,
    )
    chat = config.chat_template_kwargs
    assert not isinstance(config.sampler_options, str) and not isinstance(chat, str)  # GRPOConfig parses JSON
    check_options(config.sampler, config.sampler_options or {})
    peft_config = _peft_config(options)
    tokenizer = load_tokenizer(options)

    def load_rows(name: str, split: str, generated: Task | None) -> Dataset:
        return prompt_rows(name, split, generated, options, tokenizer, runner, chat=config.chat, chat_template_kwargs=chat)

    rows, evaluation = load_rows(options.dataset, options.dataset_split, task), None
    if options.eval_dataset is not None:
        eval_task = make_task(options.eval_dataset, size=options.eval_size, seed=seed + 1)
        evaluation = load_rows(options.eval_dataset, options.eval_split, eval_task)
    elif (strategy := getattr(config.eval_strategy, "value", config.eval_strategy)) != "no":
        raise SettingsError(f"eval_strategy is {strategy!r}, and there is no eval_dataset; expected one, or eval_strategy 'no'.")
    return RunParts(task, rewards, runner, tokenizer, rows, evaluation, peft_config)


def _peft_config(options: TrainOptions) -> LoraConfig | None:
    if not options.use_peft:
        return None
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise SettingsError("use_peft needs the package peft, which is not installed. Fix: pip install peft") from error
    return LoraConfig(
        r=options.lora_r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=options.lora_target_modules or "all-linear",
        modules_to_save=options.lora_modules_to_save,
        task_type="CAUSAL_LM",
    )
