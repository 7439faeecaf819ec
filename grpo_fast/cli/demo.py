"""The command ``grpo-fast demo``. Slow imports happen when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grpo_fast.loss.config import LOSS_TYPES

_LOSS_TYPES = ", ".join(LOSS_TYPES)


def demo(
    seed: Annotated[int, typer.Option(help="Random seed of model, data and sampling; the same seed gives the same numbers.")] = 0,
    steps: Annotated[int, typer.Option(help="GRPO steps.")] = 60,
    temperature: Annotated[float, typer.Option(help="Training temperature of sampling and loss, above 0.")] = 1.0,
    group_size: Annotated[int, typer.Option(help="Completions per prompt.")] = 8,
    prompts: Annotated[int, typer.Option(help="Prompts per step.")] = 32,
    learning_rate: Annotated[float, typer.Option(help="Learning rate of GRPO, after a warm-up of three steps.")] = 3e-4,
    loss_type: Annotated[str, typer.Option(help=f"Loss: {_LOSS_TYPES}.")] = "dapo",
    warm_start_steps: Annotated[int, typer.Option(help="Steps of imitation before GRPO.")] = 160,
    evaluation_prompts: Annotated[int, typer.Option(help="Held-out questions of each evaluation.")] = 96,
    output: Annotated[Path, typer.Option(help="Folder for curves.png and result.json.", file_okay=False)] = Path("runs/demo"),
) -> None:
    """Train a small language model with bad habits by GRPO. Exit status 1 if it does not meet the success criteria."""
    from rich.console import Console

    from grpo_fast.demo.options import DemoOptions
    from grpo_fast.demo.run import MODULES, run
    from grpo_fast.utils.install_hints import require_packages

    try:
        require_packages(*MODULES, extras=("demo",), needed_by="The demo")
    except ImportError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from error
    try:
        options = DemoOptions(
            seed=seed,
            steps=steps,
            temperature=temperature,
            group_size=group_size,
            prompts=prompts,
            learning_rate=learning_rate,
            loss_type=loss_type,
            warm_start_steps=warm_start_steps,
            evaluation_prompts=evaluation_prompts,
        )
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
    console.print("The model learned: every criterion is met.", style="bold green")


app = typer.Typer(add_completion=False)
app.command()(demo)
