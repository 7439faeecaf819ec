"""``grpo-fast train``: everything cheap is checked before the model is loaded."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from grpo_fast.commands.data import check_columns, load_rows, make_task, shape_prompts
from grpo_fast.commands.settings import SettingsError, TrainOptions, help_tables, parse
from grpo_fast.tasks import Task

__all__ = ["app", "prepare", "run"]

SETTINGS_FILE = "settings.json"
USAGE = """usage: grpo-fast train [FILE] [--name value ...]

Train a causal language model by GRPO. FILE is YAML or JSON, of lines 'name: value'; what is said on the command line wins.

  grpo-fast train config.yaml --learning_rate 2e-6
  grpo-fast train --model Qwen/Qwen3-0.6B --dataset 'reasoning_gym:chain_sum' --rewards task format --output_dir runs/sum
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
    from datasets import Dataset

    from grpo_fast.data import load_prompts

    options, config, given = parse(args, config_class)
    assert options.model and options.dataset
    resume = _checkpoint(config)
    seed = getattr(config, "data_seed", None)
    seed = config.seed if seed is None else seed
    task = make_task(options.dataset, size=options.dataset_size, seed=seed)
    rewards = [_reward(name, task) for name in (options.rewards or (["task"] if task is not None else []))]
    if not rewards:
        raise SettingsError("rewards is not set; expected at least one, in the settings file or as --rewards. See grpo-fast train --help.")
    weights = getattr(config, "reward_weights", None)
    if weights is not None and len(weights) != len(rewards):
        raise SettingsError(f"reward_weights has {len(weights)} entries; expected {len(rewards)}, one for each reward.")
    peft_config = _peft(options)
    tokenizer = _tokenizer(options)

    def rows_of(name: str, split: str, generated: Task | None) -> Any:
        rows = generated.rows if generated is not None else load_rows(name, config=options.dataset_config, split=split)
        rows = Dataset.from_list(rows) if isinstance(rows, list) else rows
        rows = shape_prompts(rows, column=options.prompt_column, template=options.prompt_template, system=options.system_prompt)
        check_columns(rewards, rows.column_names)
        chat = getattr(config, "chat_template_kwargs", None)
        return load_prompts(rows, tokenizer, max_prompt_length=options.max_prompt_length, chat_template_kwargs=chat).rows

    rows, evaluation = rows_of(options.dataset, options.dataset_split, task), None
    if options.eval_dataset is not None:
        eval_task = make_task(options.eval_dataset, size=options.eval_size, seed=seed + 1)
        evaluation = rows_of(options.eval_dataset, options.eval_split, eval_task)
    elif (strategy := getattr(config.eval_strategy, "value", config.eval_strategy)) != "no":
        raise SettingsError(f"eval_strategy is {strategy!r}, and there is no eval_dataset; expected one, or eval_strategy 'no'.")
    trainer = {
        "model": options.model,
        "reward_funcs": rewards,
        "args": config,
        "train_dataset": rows,
        "eval_dataset": evaluation,
        "processing_class": tokenizer,
        "peft_config": peft_config,
    }
    return {"trainer": trainer, "resume": resume, "given": given}


def run(prepared: dict[str, Any], trainer_class: Any = None) -> Any:
    """Make the trainer, train, and leave model, metrics and settings in the output folder. Returns the trainer."""
    from grpo_fast import monitor

    if trainer_class is None:
        from grpo_fast.trainer import GRPOTrainer as trainer_class  # noqa: N813
    trainer = trainer_class(**prepared["trainer"])
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


def _reward(name: str, task: Task | None) -> Any:
    if name == "task":
        if task is None:
            raise SettingsError("rewards has 'task', and the dataset is no task, which brings its own reward; expected other rewards.")
        return task.reward
    from grpo_fast.rewards import load_reward

    return load_reward(name)


def _tokenizer(options: TrainOptions) -> Any:
    """Loaded before the model: it is quick, and shows that the name is right."""
    from transformers import AutoTokenizer

    name = options.tokenizer or options.model
    if name is not None and name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise SettingsError(f"{'tokenizer' if options.tokenizer else 'model'} is {name!r}; there is no such folder.")
    try:
        return AutoTokenizer.from_pretrained(name, padding_side="left")
    except Exception as error:  # no such name, no network, a broken file: each library raises its own
        reason = " ".join(str(error).split())[:400]
        raise SettingsError(f"the tokenizer of {name!r} cannot be loaded: {type(error).__name__}: {reason}. Is the name right?") from error


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
