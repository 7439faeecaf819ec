"""The command ``grpo-fast plot``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def plot(
    runs: Annotated[
        list[Path], typer.Argument(help="Folders of runs (their output_dir), or metrics files; several are laid over each other.")
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="PNG, PDF or SVG; default: curves.png in the first run's folder.")
    ] = None,
    smooth: Annotated[int, typer.Option(help="Width of a running mean, in points.")] = 1,
) -> None:
    """Draw the curves of one run or several. Exit status 2 if there is nothing to draw."""
    from grpo_fast.trainer.plot import plot_runs

    target = output if output is not None else (runs[0] if runs[0].is_dir() else runs[0].parent) / "curves.png"
    try:
        panels = plot_runs(runs, target, smooth=smooth)
    except ModuleNotFoundError as error:
        typer.echo(f"grpo-fast plot: it needs the package {error.name!r}, which is not installed. Fix: pip install {error.name}", err=True)
        raise typer.Exit(2) from error
    except (ValueError, OSError) as error:
        typer.echo(f"grpo-fast plot: {error}", err=True)
        raise typer.Exit(2) from error
    typer.echo(f"{target}: {len(panels)} panels: {', '.join(panels)}")


app = typer.Typer(add_completion=False)
app.command()(plot)
