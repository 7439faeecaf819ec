"""The command ``grpo-fast train``. Everything that is quick to check is checked before the model is loaded."""

from __future__ import annotations

import gc
import json
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console

from grpo_fast.cli.messages import exit_on_wrong_settings, print_error
from grpo_fast.generation import SamplerError
from grpo_fast.rewards import RewardError
from grpo_fast.trainer.run_parts import load_run_parts
from grpo_fast.trainer.run_settings import TrainOptions, parse
from grpo_fast.trainer.run_settings_help import help_tables, usual_tables
from grpo_fast.utils.disk import DiskFullError
from grpo_fast.utils.errors import SettingsError
from grpo_fast.utils.files import write_text
from grpo_fast.utils.install_hints import require_packages
from grpo_fast.utils.redaction import redact

if TYPE_CHECKING:
    from grpo_fast.trainer import GRPOConfig, GRPOTrainer

__all__ = ["PreparedTraining", "app", "prepare", "run"]

SETTINGS_FILE = "settings.json"
USAGE = """usage: grpo-fast train [FILE] [--name value ...]

Train a causal language model by GRPO. FILE is YAML or JSON with lines 'name: value'; options take precedence over it.

  grpo-fast train config.yaml --learning_rate 2e-6
  grpo-fast train --model Qwen/Qwen3-0.6B --dataset reasoning_gym:chain_sum --rewards task format --output_dir runs/sum
  grpo-fast train runs/sum/settings.json --resume_from_checkpoint auto
"""


class PreparedTraining(NamedTuple):
    """A training whose settings have been checked; the model is not loaded yet."""

    trainer_arguments: dict[str, Any]  # of GRPOTrainer
    resume_from: str | bool | None  # folder of a checkpoint; True: the newest one
    overrides: dict[str, Any]  # the settings that were given explicitly


def app(args: Sequence[str] | None = None, prog_name: str = "grpo-fast train", *, trainer_class: type[GRPOTrainer] | None = None) -> None:
    """Run the command. It exits with status 2 for a wrong setting, before the model is loaded; 1 if the run failed; 130 if interrupted.

    Args:
        args: of the command line.
        prog_name: name of the command in messages.
        trainer_class: a class to use in place of GRPOTrainer.
    """
    args = list(sys.argv[1:] if args is None else args)
    wants_all = "--help-all" in args
    with exit_on_wrong_settings(prog_name):
        require_packages("transformers", "datasets", "accelerate", "griffe", extras=("train",), needed_by="training")
    from grpo_fast.trainer.config import GRPOConfig

    if not args or wants_all or "--help" in args or "-h" in args:
        console = Console()
        console.print(USAGE, highlight=False, markup=False, soft_wrap=True)
        for table in help_tables(GRPOConfig) if wants_all else usual_tables(GRPOConfig):
            console.print(table)
        if not wants_all:
            console.print(f"\nAll settings, rewards and samplers: {prog_name} --help-all", highlight=False)
        raise SystemExit(0 if args else 2)
    with exit_on_wrong_settings(prog_name):
        prepared = prepare(args, GRPOConfig)
    run(prepared, trainer_class, prog_name=prog_name)
    _leave_process_group()


def prepare(args: Sequence[str], config_class: type[GRPOConfig]) -> PreparedTraining:
    """Parse the settings, load rewards, tokenizer and data, and check that they fit together.

    Args:
        args: of the command line.
        config_class: `grpo_fast.trainer.GRPOConfig`, or a subclass.

    Raises:
        SettingsError, ValueError, TypeError: names the setting, what it was, what was expected and the fix.
    """
    options, config, overrides = parse(args, config_class, TrainOptions)
    if not overrides.get("output_dir"):
        raise SettingsError("output_dir is not set; expected the folder of this run, in the settings file or as --output_dir.")
    assert options.model and options.dataset and config.output_dir
    resume_from = _checkpoint(config)
    _check_writable(config.output_dir)
    parts = load_run_parts(options, config)
    arguments = {
        "model": options.model,
        "reward_funcs": parts.rewards,
        "args": config,
        "train_dataset": parts.train_dataset,
        "eval_dataset": parts.eval_dataset,
        "processing_class": parts.tokenizer,
        "peft_config": parts.peft_config,
    }
    return PreparedTraining(arguments, resume_from, overrides)


def run(prepared: PreparedTraining, trainer_class: type[GRPOTrainer] | None = None, *, prog_name: str = "grpo-fast train") -> GRPOTrainer:
    """Make the trainer, train, and write model, metrics and settings to the output folder.

    Returns:
        the trainer.
    """
    from grpo_fast.trainer.callbacks import METRICS_FILE, stop_progress
    from grpo_fast.trainer.checkpoint_files import CheckpointError

    if trainer_class is None:
        from grpo_fast.trainer.grpo_trainer import GRPOTrainer

        trainer_class = GRPOTrainer
    try:
        trainer = trainer_class(**prepared.trainer_arguments)
    except (ValueError, OSError, SamplerError) as error:  # settings that do not fit the model or the rows; no weights; no server
        print_error(f"{prog_name}: {error}")
        raise SystemExit(2) from error
    output = Path(trainer.args.output_dir)
    try:
        with trainer.output_dir_locked():
            if trainer.is_world_process_zero():
                settings = {name: value for name, value in prepared.overrides.items() if name != "resume_from_checkpoint"}
                write_text(output / SETTINGS_FILE, json.dumps(redact(settings), indent=1, default=str) + "\n")
            trainer.train(resume_from_checkpoint=prepared.resume_from)
    except CheckpointError as error:
        print_error(f"{prog_name}: {error}")
        raise SystemExit(2) from error
    except (KeyboardInterrupt, RewardError, SamplerError, FloatingPointError, DiskFullError) as error:
        stop_progress(trainer)
        interrupted = isinstance(error, KeyboardInterrupt)
        if trainer.is_world_process_zero() or not interrupted:
            print_error(f"{prog_name}: {_describe_end(error, trainer.state.global_step, output)}")
        raise SystemExit(130 if interrupted else 1) from error
    trainer.save_model(str(output))
    if trainer.is_world_process_zero():
        print_error(f"Model, {SETTINGS_FILE} and {METRICS_FILE} are in {output}. Curves: grpo-fast plot {output}")
    return trainer


def _leave_process_group() -> None:
    """Destroy the process group while the interpreter still runs. The trainer is in reference cycles and is collected first: its threads,
    if they outlive the interpreter, can end the process with an error."""
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gc.collect()
        torch.distributed.destroy_process_group()


def _describe_end(error: BaseException, step: int, output: Path) -> str:
    """Why the run ended, how far it came, and how to resume it."""
    from grpo_fast.trainer.checkpoints import last_checkpoint

    reason = "interrupted." if isinstance(error, KeyboardInterrupt) else str(error)
    if isinstance(error, RewardError) and error.__cause__ is not None:  # the traceback leads to the user's own code
        reason += "\n" + "".join(traceback.format_exception(error.__cause__)).rstrip()
    checkpoint = last_checkpoint(output)
    resume = "There is no checkpoint yet: save_steps says how often one is written."
    if checkpoint is not None:
        resume = f"{checkpoint} is complete. To go on from there: the same command with --resume_from_checkpoint auto."
    return f"{reason}\n{step} steps were done. {resume}"


def _checkpoint(config: GRPOConfig) -> str | bool | None:
    """The folder to resume from; True: the newest undamaged checkpoint of the output folder; None: none, as with "auto" in a new folder."""
    from grpo_fast.trainer.checkpoint_files import NEW_RUN, checkpoints_in, missing_from

    requested, checkpoints = config.resume_from_checkpoint, checkpoints_in(config.output_dir)
    if requested is None or str(requested).lower() == "false":
        if checkpoints:  # the new run's checkpoints would mix with those of the old run, and a later resume could take a wrong one
            raise SettingsError(
                f"output_dir is {config.output_dir!r}, which holds a run already ({checkpoints[0].name}); expected another folder, or "
                "--resume_from_checkpoint auto, to go on with that run."
            )
        return None
    if str(requested).lower() in ("auto", "true"):
        missing = {path.name: missing_from(path) for path in checkpoints}
        if missing and all(missing.values()):
            lacks = "; ".join(f"{name} lacks {what}" for name, what in missing.items())
            raise SettingsError(
                f"resume_from_checkpoint is {requested!r}, and no checkpoint in {config.output_dir} is complete ({lacks}). {NEW_RUN}"
            )
        return True if checkpoints else None
    if (what := missing_from(requested)) is not None:
        raise SettingsError(
            f"resume_from_checkpoint is {requested!r}, which lacks {what}; expected the folder of a complete checkpoint, or 'auto'. "
            f"{NEW_RUN}"
        )
    return str(requested)


def _check_writable(output_dir: str) -> None:
    try:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir):
            pass
    except OSError as error:
        raise SettingsError(f"output_dir is {output_dir!r}; expected a folder to write to ({type(error).__name__}: {error}).") from error
