"""``grpo-fast train``: everything cheap is checked before the model is loaded."""

from __future__ import annotations

import gc
import json
import sys
import tempfile
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from grpo_fast.data.loading import load_rewards, load_tokenizer, make_task, prompt_rows
from grpo_fast.data.tasks import Task
from grpo_fast.generation import SamplerError, check_options
from grpo_fast.rewards import RewardError, RewardRunner
from grpo_fast.trainer.run_settings import TrainOptions, parse
from grpo_fast.trainer.run_settings_help import help_tables
from grpo_fast.utils.errors import SettingsError
from grpo_fast.utils.files import write_text

__all__ = ["app", "prepare", "run"]

SETTINGS_FILE = "settings.json"
USAGE = """usage: grpo-fast train [FILE] [--name value ...]

Train a causal language model by GRPO. FILE is YAML or JSON, of lines 'name: value'; what is said on the command line wins.

  grpo-fast train config.yaml --learning_rate 2e-6
  grpo-fast train --model Qwen/Qwen3-0.6B --dataset reasoning_gym:chain_sum --rewards task format --output_dir runs/sum
  grpo-fast train runs/sum/settings.json --resume_from_checkpoint auto
"""


def app(args: Sequence[str] | None = None, prog_name: str = "grpo-fast train", *, trainer_class: Any = None) -> None:
    """The command. Exit status 2: a setting is wrong, said in one line and before the model was loaded. 1: the run could not go on. 130:
    it was interrupted.

    Args:
        args: of the command line.
        prog_name: for messages.
        trainer_class: a class like GRPOTrainer in its place.
    """
    args = list(sys.argv[1:] if args is None else args)
    from grpo_fast.trainer.config import GRPOConfig

    if not args or "--help" in args or "-h" in args:
        console = Console()
        console.print(USAGE, highlight=False, markup=False, soft_wrap=True)
        for table in help_tables(GRPOConfig):
            console.print(table)
        raise SystemExit(0 if args else 2)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *where, **more: _say(f"{prog_name}: warning: {message}")
        try:
            prepared = prepare(args, GRPOConfig)
        except (ValueError, TypeError, ImportError, OSError) as error:
            _say(f"{prog_name}: {error}")
            raise SystemExit(2) from error
    run(prepared, trainer_class, prog_name=prog_name)
    _part()


def prepare(args: Sequence[str], config_class: Any) -> dict[str, Any]:
    """Parse, load rewards and data, check that all fits. Returns the trainer's arguments, under ``trainer``, and the rest.

    Raises:
        SettingsError, ValueError, TypeError: name the setting, what it was, what was expected and the cure.
    """
    options, config, given = parse(args, config_class)
    assert options.model and options.dataset
    resume = _checkpoint(config)
    _check_writable(config.output_dir)
    seed = config.prompt_seed
    task = make_task(options.dataset, size=options.dataset_size, seed=seed)
    rewards = load_rewards(options.rewards, task)
    runner = RewardRunner(rewards, weights=config.reward_weights, on_error=config.reward_on_error, isolation=config.reward_isolation)
    check_options(config.sampler, config.sampler_options or {})
    peft_config = _peft(options)
    tokenizer = load_tokenizer(options)

    def rows_of(name: str, split: str, generated: Task | None) -> Any:
        return prompt_rows(name, split, generated, options, tokenizer, runner, chat=config.chat_template_kwargs)

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


def run(prepared: dict[str, Any], trainer_class: Any = None, *, prog_name: str = "grpo-fast train") -> Any:
    """Make the trainer, train, and leave model, metrics and settings in the output folder. Returns the trainer."""
    from grpo_fast.trainer.callbacks import METRICS_FILE, stop_progress

    if trainer_class is None:
        from grpo_fast.trainer.grpo_trainer import GRPOTrainer as trainer_class  # noqa: N813
    try:
        trainer = trainer_class(**prepared["trainer"])
    except (ValueError, OSError, SamplerError) as error:  # settings that do not fit the model or the rows; no weights; no server
        _say(f"{prog_name}: {error}")
        raise SystemExit(2) from error
    output = Path(trainer.args.output_dir)
    if trainer.is_world_process_zero():
        given = {name: value for name, value in prepared["given"].items() if name != "resume_from_checkpoint"}
        write_text(output / SETTINGS_FILE, json.dumps(given, indent=1, default=str) + "\n")
    try:
        trainer.train(resume_from_checkpoint=prepared["resume"])
    except (KeyboardInterrupt, RewardError, SamplerError, FloatingPointError) as error:
        stop_progress(trainer)
        interrupted = isinstance(error, KeyboardInterrupt)
        if trainer.is_world_process_zero() or not interrupted:
            _say(f"{prog_name}: {_how_it_ended(error, trainer.state.global_step, output)}")
        raise SystemExit(130 if interrupted else 1) from error
    trainer.save_model(str(output))
    if trainer.is_world_process_zero():
        _say(f"Model, {SETTINGS_FILE} and {METRICS_FILE} are in {output}. Curves: grpo-fast plot {output}")
    return trainer


def _part() -> None:
    """Several processes end their connection while Python runs. The trainer, whose cycles of references hold it, is collected first: its
    threads, where they outlive the interpreter, can end the process with an error."""
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gc.collect()
        torch.distributed.destroy_process_group()


def _how_it_ended(error: BaseException, step: int, output: Path) -> str:
    from grpo_fast.trainer.checkpoints import last_checkpoint

    said = "interrupted." if isinstance(error, KeyboardInterrupt) else str(error)
    if isinstance(error, RewardError) and error.__cause__ is not None:  # where in the user's own code
        said += "\n" + "".join(traceback.format_exception(error.__cause__)).rstrip()
    last = last_checkpoint(output)
    kept = "There is no checkpoint yet: save_steps says how often one is written."
    if last is not None:
        kept = f"{last} is complete. To go on from there: the same command with --resume_from_checkpoint auto."
    return f"{said}\n{step} steps were done. {kept}"


def _say(message: str) -> None:
    console = Console(stderr=True)
    console.print(message, highlight=False, markup=False, soft_wrap=not console.is_terminal)


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
    from grpo_fast.trainer.checkpoints import last_checkpoint, missing_from

    wanted, last = config.resume_from_checkpoint, last_checkpoint(config.output_dir)
    if wanted is None or str(wanted).lower() == "false":
        if last is not None:  # a new run would write its checkpoints among those, and some day resume from one that is not its own
            raise SettingsError(
                f"output_dir is {config.output_dir!r}, which holds a run already ({Path(last).name}); expected another folder, or "
                "--resume_from_checkpoint auto, to go on with that run."
            )
        return None
    if str(wanted).lower() in ("auto", "true"):
        return last
    if (lacking := missing_from(wanted)) is not None:
        raise SettingsError(
            f"resume_from_checkpoint is {wanted!r}, which lacks {lacking}; expected the folder of a complete checkpoint, or 'auto'."
        )
    return str(wanted)


def _check_writable(output_dir: str) -> None:
    try:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir):
            pass
    except OSError as error:
        raise SettingsError(f"output_dir is {output_dir!r}; expected a folder to write to ({type(error).__name__}: {error}).") from error
