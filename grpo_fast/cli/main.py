"""The command line: ``grpo-fast doctor | train | plot | demo | study | bench ...``."""

from __future__ import annotations

import importlib
import sys
from typing import Annotated, NamedTuple

import typer

from grpo_fast.cli.completion import CompletedCommand
from grpo_fast.utils.install_hints import install
from grpo_fast.utils.redacted_output import redacted_output
from grpo_fast.version import __version__

# Unexpected errors get Python's plain traceback: a traceback in a frame is hard to read and to search in the log of a run.
app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


class Mounted(NamedTuple):
    """A subcommand that is imported only when it runs."""

    module: str  # has ``app(args=..., prog_name=...)``
    extra: str  # of pyproject.toml, that installs the packages it needs
    help: str


# What the extras install, as it is imported; the absence of any other module is an error to see in full.
_OF_EXTRAS = {
    "accelerate",
    "datasets",
    "griffe",
    "httpx",
    "liger_kernel",
    "matplotlib",
    "scipy",
    "tokenizers",
    "transformers",
    "trl",
    "yaml",
}

MOUNTED = {
    "train": Mounted("grpo_fast.cli.train", "train", "Train a language model by GRPO, from a settings file and the command line."),
    "plot": Mounted("grpo_fast.cli.plot", "plot", "Draw the curves of one run or several."),
    "demo": Mounted("grpo_fast.cli.demo", "demo", "Watch a small language model learn by GRPO."),
    "study": Mounted("grpo_fast.cli.study", "train", "Measure what the temperature does, in sampling and in training."),
    "bench": Mounted("grpo_fast.cli.bench", "bench", "Time the loss against what you would use instead."),
    "bench-head": Mounted("grpo_fast.cli.bench_head", "bench", "Time the fused head against what you would use instead."),
    "bench-kept": Mounted("grpo_fast.cli.bench_kept", "bench", "Time the head over kept sets against whole vocabularies."),
    "bench-trainer": Mounted("grpo_fast.cli.bench_trainer", "bench", "Time the trainer's loss stage against an eager loss."),
    "bench-trl": Mounted("grpo_fast.cli.bench_trl", "bench", "Time the loss stage of TRL's trainer, stock and with this loss."),
    "bench-step": Mounted("grpo_fast.cli.bench_step", "bench", "Time whole training steps of TRL's trainer and of this one."),
    "bench-drop-ins": Mounted("grpo_fast.cli.bench_drop_ins", "bench", "Time what the guides' drop-ins replace."),
}

# All arguments are passed on unchanged, --help included: importing the subcommands for their help would import transformers.
_PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"grpo_fast {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")] = False,
) -> None:
    """grpo_fast: the GRPO core, fused."""


@app.command()
def doctor() -> None:
    """Show what works on this machine, what does not, why, and the fix."""
    from grpo_fast.cli import doctor as report

    raise typer.Exit(report.run())


def _run_mounted(command: str, args: list[str]) -> None:
    module_name, extra, _ = MOUNTED[command]
    module = None
    try:
        module = importlib.import_module(module_name)
        module.app(args=args, prog_name=f"grpo-fast {command}")
    except ModuleNotFoundError as error:
        missing = error.name or str(error)
        if module is not None and missing.partition(".")[0] not in _OF_EXTRAS:
            raise
        if module_name == missing or module_name.startswith(f"{missing}."):
            problem = f"this install has no {module_name}. Fix: install the whole package again"
        elif missing.startswith("grpo_fast."):
            raise  # an error in this package, not a missing dependency
        else:
            problem = f"it needs the package {missing!r}, which is not installed. Fix: {install(extra)}"
        typer.echo(f"grpo-fast {command}: {problem}", err=True)
        raise typer.Exit(2) from error


def _mount(command: str, description: str) -> None:
    @app.command(command, cls=CompletedCommand, help=description, context_settings=_PASS_THROUGH)
    def run(context: typer.Context) -> None:
        _run_mounted(command, context.args)


for _command, _mounted in MOUNTED.items():
    _mount(_command, _mounted.help)


def start() -> None:
    """Run the command line: the entry point of ``grpo-fast``, ``python -m grpo_fast`` and ``python -m grpo_fast.cli``."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that lacks a character shows another in its place, and the command goes on
            stream.reconfigure(errors="replace")
    with redacted_output():
        app()


if __name__ == "__main__":
    start()
