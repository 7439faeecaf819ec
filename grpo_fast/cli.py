"""The command line: ``grpo-fast doctor | train | plot | demo | bench ...``."""

from __future__ import annotations

import importlib

import typer

# Errors that nobody foresaw are shown as Python shows them: in the log of a run a traceback in a frame is hard to read and to search.
app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help="grpo_fast: the GRPO core, fused.")

# Commands with optional dependencies: a module with ``app(args=..., prog_name=...)``, imported when the command runs; and its help here.
MOUNTED = {
    "train": ("grpo_fast.commands.train", "Train a language model by GRPO, from a settings file and the command line."),
    "plot": ("grpo_fast.monitor.cli", "Draw the curves of one run or several."),
    "demo": ("grpo_fast.demo.cli", "Watch a small language model learn by GRPO."),
    "bench": ("grpo_fast.benchmark.cli", "Time the loss against what you would use instead."),
    "bench-head": ("grpo_fast.benchmark.head.cli", "Time the fused head against what you would use instead."),
    "bench-trainer": ("grpo_fast.benchmark.trainer_stage", "Time the trainer's loss stage against an eager loss."),
    "bench-trl": ("grpo_fast.benchmark.trl_stage", "Time the loss stage of TRL's trainer, stock and with this loss."),
    "bench-drop-ins": ("grpo_fast.benchmark.drop_ins", "Time what the guides' drop-ins replace."),
}

# What a mounted command gets is handed through untouched, --help too: importing it for the list of commands would import transformers.
_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.command()
def doctor() -> None:
    """What works on this machine, what does not, why, and the cure."""
    from grpo_fast import doctor as report

    raise typer.Exit(report.run())


def _run_mounted(command: str, args: list[str]) -> None:
    module_name, _ = MOUNTED[command]
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or str(error)
        if module_name == missing or module_name.startswith(f"{missing}."):
            cure = f"this install has no {module_name}. Cure: install the whole package again"
        elif missing.startswith("grpo_fast."):
            raise  # a mistake of ours, not a missing dependency
        else:
            cure = f"it needs the package {missing!r}, which is not installed. Cure: pip install 'grpo_fast[{command.partition('-')[0]}]'"
        typer.echo(f"grpo-fast {command}: {cure}", err=True)
        raise typer.Exit(2) from error
    module.app(args=args, prog_name=f"grpo-fast {command}")


def _mount(command: str, description: str) -> None:
    @app.command(command, help=description, context_settings=_PASS_ON)
    def run(context: typer.Context) -> None:
        _run_mounted(command, context.args)


for _command, (_, _description) in MOUNTED.items():
    _mount(_command, _description)

if __name__ == "__main__":
    app()
