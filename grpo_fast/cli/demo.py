"""``grpo-fast demo``: the command. What is slow to import is imported when it runs, so that ``grpo-fast --help`` stays quick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grpo_fast.loss.config import LOSS_TYPES

_LOSS_TYPES = ", ".join(LOSS_TYPES)


def demo(
    seed: Annotated[int, typer.Option(help="Of model, data and sampling; the same seed gives the same numbers.")] = 0,
    steps: Annotated[int, typer.Option(help="GRPO steps.")] = 60,
    temperature: Annotated[float, typer.Option(help="Training temperature, read by sampling and loss alike; above 0.")] = 1.0,
    group_size: Annotated[int, typer.Option(help="Completions per prompt.")] = 8,
    prompts: Annotated[int, typer.Option(help="Prompts per step.")] = 32,
    learning_rate: Annotated[float, typer.Option(help="Of GRPO, after a warm-up of three steps.")] = 3e-4,
    loss_type: Annotated[str, typer.Option(help=f"Which member of the family: {_LOSS_TYPES}.")] = "dapo",
    warm_start_steps: Annotated[int, typer.Option(help="Steps of imitation before GRPO.")] = 160,
    evaluation_prompts: Annotated[int, typer.Option(help="Held-out questions of each evaluation.")] = 96,
    output: Annotated[Path, typer.Option(help="Folder for curves.png and result.json.", file_okay=False)] = Path("runs/demo"),
) -> None:
    """Watch a small language model lose its bad habits by GRPO. Exit status 1 if it did not learn."""
    from rich.console import Console

    from grpo_fast.demo.run import MODULES, Options, run
    from grpo_fast.utils.install_hints import require_packages

    try:
        require_packages(*MODULES, extras=("demo",), needed_by="The demo")
    except ImportError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from error
    try:
        options = Options(seed, steps, temperature, group_size, prompts, learning_rate, loss_type, warm_start_steps, evaluation_prompts)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error

    console = Console()
    result = run(options, output, console)
    wall, cpu = result["seconds"]["total"], result["seconds"]["process_cpu"]
    typer.echo(f"{wall:.0f} s, and {cpu:.0f} s of CPU in the whole process. Curves and numbers: {output}")
    failed = [criterion["sentence"] for criterion in result["criteria"] if not criterion["met"]]
    if failed:
        typer.echo(f"The model did not learn: {' '.join(failed)}", err=True)
        raise typer.Exit(1)
    console.print("The model learnt: every criterion is met.", style="bold green")


app = typer.Typer(add_completion=False)
app.command()(demo)
