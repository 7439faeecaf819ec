"""The command line: ``grpo-fast doctor | demo | bench``."""

from __future__ import annotations

import importlib
import sys

import typer

app = typer.Typer(add_completion=False, no_args_is_help=True, help="grpo_fast: the GRPO core, fused.")

# What a mounted command gets is handed through untouched, --help too: importing it for the list of commands would import transformers.
_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.command()
def doctor() -> None:
    """What works on this machine, what does not, why, and the cure."""
    from grpo_fast import doctor as report

    raise typer.Exit(report.run())


@app.command(context_settings=_PASS_ON)
def demo(context: typer.Context) -> None:
    """Watch a small language model learn by GRPO."""
    _mounted("grpo_fast.demo.cli", context, extra="demo")


@app.command(context_settings=_PASS_ON)
def bench(context: typer.Context) -> None:
    """Time the loss against what you would use instead."""
    _mounted("grpo_fast.benchmark.cli", context, extra="bench")


def _mounted(module_name: str, context: typer.Context, *, extra: str) -> None:
    """Run the typer app named ``app`` of a module that is imported only now."""
    command = context.info_name or extra
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (error.name == "grpo_fast" or error.name.startswith("grpo_fast.")):
            if not module_name.startswith(error.name):
                raise  # a mistake of ours, not a missing dependency
            sys.stderr.write(f"grpo-fast {command}: this install has no {module_name}. Cure: install the whole package again.\n")
        else:
            sys.stderr.write(
                f"grpo-fast {command} needs the package {error.name!r}, which is not installed. Cure: pip install 'grpo_fast[{extra}]'\n"
            )
        raise typer.Exit(2) from error
    module.app(args=context.args, prog_name=f"grpo-fast {command}")


if __name__ == "__main__":
    app()
