"""``grpo-fast train``: everything cheap is checked before the model is loaded."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from grpo_fast.commands.data import check_columns, load_rows, shape_prompts
from grpo_fast.commands.gym import ReasoningGymReward
from grpo_fast.commands.settings import SettingsError, TrainOptions, help_tables, parse

__all__ = ["app", "prepare", "run"]

SETTINGS_FILE = "settings.json"
USAGE = """usage: grpo-fast train [FILE] [--name value ...]

Train a causal language model by GRPO. FILE is YAML or JSON, of lines 'name: value'; what is said on the command line wins.

  grpo-fast train config.yaml --learning_rate 2e-6
  grpo-fast train --model Qwen/Qwen3-0.6B --dataset 'reasoning_gym:chain_sum' --rewards reasoning_gym format --output_dir runs/sum
"""


def app(args: Sequence[str] | None = None, prog_name: str = "grpo-fast train", *, trainer_class: Any = None) -> None:
    """The command. Exit status 2: a setting is wrong, said in one line and before the model was loaded.

    Args:
        args: of the command line.
        prog_name: for messages.
        trainer_class: a class like GRPOTrainer in its place.
    """
    args = list(sys.argv[1:] if args is None else args)
    from grpo_fast.grpo_config import GRPOConfig

    if not args or "--help" in args or "-h" in args:
        console = Console()
        console.print(USAGE, highlight=False, markup=False)
        for table in help_tables(GRPOConfig):
            console.print(table)
        raise SystemExit(0 if args else 2)
    try:
        prepared = prepare(args, GRPOConfig)
    except (ValueError, TypeError, ImportError) as error:
        Console(stderr=True).print(f"{prog_name}: {error}", highlight=False, markup=False, soft_wrap=True)
        raise SystemExit(2) from error
    run(prepared, trainer_class)


def prepare(args: Sequence[str], config_class: Any) -> dict[str, Any]:
    """Parse, load rewards and data, check that all fits. Returns the trainer's arguments, under ``trainer``, and the rest.

    Raises:
        SettingsError, ValueError, TypeError: name the setting, what it was, what was expected and the cure.
    """
    options, config, given = parse(args, config_class)
    assert options.model and options.dataset and options.rewards
    if options.model.startswith((".", "/", "~")) and not Path(options.model).expanduser().is_dir():
        raise SettingsError(f"model is {options.model!r}; there is no such folder.")
    resume = _checkpoint(config)
    rewards = [_reward(name) for name in options.rewards]
    weights = getattr(config, "reward_weights", None)
    if weights is not None and len(weights) != len(rewards):
        raise SettingsError(f"reward_weights has {len(weights)} entries; expected {len(rewards)}, one for each reward.")
    peft_config = _peft(options)
    seed = getattr(config, "data_seed", None)
    seed = config.seed if seed is None else seed
    shape = {"column": options.prompt_column, "template": options.prompt_template, "system": options.system_prompt}
    rows = load_rows(options.dataset, config=options.dataset_config, split=options.dataset_split, size=options.dataset_size, seed=seed)
    rows = shape_prompts(rows, **shape)
    check_columns(rewards, rows.column_names)
    evaluation = None
    if options.eval_dataset is not None:
        evaluation = load_rows(
            options.eval_dataset, config=options.dataset_config, split=options.eval_split, size=options.eval_size, seed=seed + 1
        )
        evaluation = shape_prompts(evaluation, **shape)
        check_columns(rewards, evaluation.column_names)
    elif (strategy := getattr(config.eval_strategy, "value", config.eval_strategy)) != "no":
        raise SettingsError(f"eval_strategy is {strategy!r}, and there is no eval_dataset; expected one, or eval_strategy 'no'.")
    trainer = {
        "model": options.model,
        "reward_funcs": rewards,
        "args": config,
        "train_dataset": rows,
        "eval_dataset": evaluation,
        "peft_config": peft_config,
    }
    return {"trainer": trainer, "tokenizer": options.tokenizer, "resume": resume, "given": given}


def run(prepared: dict[str, Any], trainer_class: Any = None) -> Any:
    """Make the trainer, train, and leave model, metrics and settings in the output folder. Returns the trainer."""
    from grpo_fast import monitor

    if trainer_class is None:
        from grpo_fast.trainer import GRPOTrainer as trainer_class  # noqa: N813
    tokenizer = None
    if prepared["tokenizer"] is not None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(prepared["tokenizer"])
    trainer = trainer_class(processing_class=tokenizer, **prepared["trainer"])
    monitor.attach(trainer)
    output = Path(trainer.args.output_dir)
    if trainer.is_world_process_zero():
        _write(output / SETTINGS_FILE, prepared["given"])
    trainer.train(resume_from_checkpoint=prepared["resume"])
    trainer.save_model(str(output))
    if trainer.is_world_process_zero():
        Console(stderr=True).print(
            f"Model, {SETTINGS_FILE} and {monitor.METRICS_FILE} are in {output}. Curves: grpo-fast plot {output}",
            highlight=False,
            markup=False,
        )
    return trainer


def _reward(name: str) -> Any:
    if name in ("reasoning_gym", "reasoning_gym(partial=True)"):
        return ReasoningGymReward(partial="True" in name)
    from grpo_fast.rewards import load_reward

    return load_reward(name)


def _peft(options: TrainOptions) -> Any:
    if not options.use_peft:
        return None
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise SettingsError("use_peft needs the package peft, which is not installed. Cure: pip install peft") from error
    return LoraConfig(
        r=options.lora_r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=options.lora_target_modules or "all-linear",
        modules_to_save=options.lora_modules_to_save,
        task_type="CAUSAL_LM",
    )


def _checkpoint(config: Any) -> str | None:
    """The folder to resume from; "auto" or true: the last of the output folder, or none if there is none yet."""
    from transformers.trainer_utils import get_last_checkpoint

    wanted = config.resume_from_checkpoint
    if wanted is None or str(wanted).lower() == "false":
        return None
    if str(wanted).lower() in ("auto", "true"):
        return get_last_checkpoint(config.output_dir) if Path(config.output_dir).is_dir() else None
    if not (Path(wanted) / "trainer_state.json").is_file():
        raise SettingsError(f"resume_from_checkpoint is {wanted!r}; expected a checkpoint's folder (with trainer_state.json), or 'auto'.")
    return str(wanted)


def _write(path: Path, given: dict[str, Any]) -> None:
    """The settings of this run, to run it again: ``grpo-fast train settings.json``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(given, indent=1, default=str) + "\n", encoding="utf-8")
    partial.replace(path)
