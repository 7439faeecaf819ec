"""The command line: ``grpo-fast doctor | train | plot | demo | bench | bench-head | bench-trl``."""

from __future__ import annotations

import importlib

import typer

# Errors that nobody foresaw are shown as Python shows them: in the log of a run a traceback in a frame is hard to read and to search.
app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help="grpo_fast: the GRPO core, fused.")

# Commands with optional dependencies: a module with ``app(args=..., prog_name=...)``, imported when the command runs.
MOUNTED = {
    "train": "grpo_fast.commands.train",
    "plot": "grpo_fast.monitor.cli",
    "demo": "grpo_fast.demo.cli",
    "bench": "grpo_fast.benchmark.cli",
    "bench-head": "grpo_fast.benchmark.head.cli",
    "bench-trl": "grpo_fast.benchmark.trl_stage",
}

# What a mounted command gets is handed through untouched, --help too: importing it for the list of commands would import transformers.
_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.command()
def doctor() -> None:
    """What works on this machine, what does not, why, and the cure."""
    from grpo_fast import doctor as report

    raise typer.Exit(report.run())


@app.command(context_settings=_PASS_ON)
def train(context: typer.Context) -> None:
    """Train a language model by GRPO, from a settings file and the command line."""
    _run_mounted("train", context.args)


@app.command(context_settings=_PASS_ON)
def plot(context: typer.Context) -> None:
    """Draw the curves of one run or several."""
    _run_mounted("plot", context.args)


@app.command(context_settings=_PASS_ON)
def demo(context: typer.Context) -> None:
    """Watch a small language model learn by GRPO."""
    _run_mounted("demo", context.args)


@app.command(context_settings=_PASS_ON)
def bench(context: typer.Context) -> None:
    """Time the loss against what you would use instead."""
    _run_mounted("bench", context.args)


@app.command("bench-head", context_settings=_PASS_ON)
def bench_head(context: typer.Context) -> None:
    """Time the fused head against what you would use instead."""
    _run_mounted("bench-head", context.args)


@app.command("bench-trl", context_settings=_PASS_ON)
def bench_trl(context: typer.Context) -> None:
    """Time the loss stage of TRL's trainer, stock and with this loss."""
    _run_mounted("bench-trl", context.args)


def _run_mounted(command: str, args: list[str]) -> None:
    module_name = MOUNTED[command]
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


if __name__ == "__main__":
    app()
