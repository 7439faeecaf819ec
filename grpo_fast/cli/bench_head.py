"""``grpo-fast bench-head``: the command."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from grpo_fast.benchmark.head.run import Settings
from grpo_fast.utils.files import check_output
from grpo_fast.utils.install_hints import install

__all__ = ["app", "bench_head"]

_DEFAULTS = Settings()


def bench_head(
    files: Annotated[list[Path] | None, typer.Argument(help="With --plot: results to draw.")] = None,
    tokens: Annotated[list[int] | None, typer.Option(help=f"May be repeated. Default: {_DEFAULTS.tokens}.")] = None,
    width: Annotated[int, typer.Option(help="Of the hidden states.")] = _DEFAULTS.width,
    vocabulary: Annotated[int, typer.Option(help="Rows of the head's weight.")] = _DEFAULTS.vocabulary,
    dtype: Annotated[list[str] | None, typer.Option(help="float32, bfloat16; may be repeated. Default: float32.")] = None,
    active: Annotated[
        list[float] | None, typer.Option(help=f"Share of tokens that can change the gradient. Default: {_DEFAULTS.active}.")
    ] = None,
    contestant: Annotated[list[str] | None, typer.Option(help=f"{', '.join(_DEFAULTS.contestants)}; may be repeated.")] = None,
    rounds: Annotated[
        int, typer.Option(help="Repetitions of the smallest number of tokens; of more tokens in proportion fewer, at least one.")
    ] = _DEFAULTS.rounds,
    threads: Annotated[int, typer.Option(help="One thread is timed by its CPU time, several by the wall clock.")] = _DEFAULTS.threads,
    output: Annotated[Path, typer.Option(help="The result as JSON; the figure goes beside it as PNG.")] = Path("runs/bench/head_cpu.json"),
    plot: Annotated[bool, typer.Option("--plot", help="Measure nothing: draw FILES, each as a PNG beside it.")] = False,
) -> None:
    """Time the loss from hidden states against what you would use instead, and against its bare matrix products. 22 minutes."""
    from rich.console import Console

    from grpo_fast.benchmark.head.report import print_report, write_plot
    from grpo_fast.benchmark.head.run import run
    from grpo_fast.utils.files import write_json

    can_draw = importlib.util.find_spec("matplotlib") is not None
    try:
        if plot:
            if not files:
                raise ValueError("FILES is empty; expected the JSON files to draw.")
            if not can_draw:
                raise ValueError(f"--plot needs matplotlib, which is not installed; expected it. Cure: {install('plot')}.")
            for path, found in [(path, _read(path)) for path in files]:
                write_plot(found, path.with_suffix(".png"))
                typer.echo(f"Drawn: {path.with_suffix('.png')}")
            return
        check_output(output)
        settings = Settings(
            tokens=tuple(tokens or _DEFAULTS.tokens),
            width=width,
            vocabulary=vocabulary,
            dtypes=tuple(dtype or _DEFAULTS.dtypes),
            active=tuple(active or _DEFAULTS.active),
            contestants=tuple(contestant or _DEFAULTS.contestants),
            rounds=rounds,
            threads=threads,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    console = Console()
    with console.status("starting") as status:
        result = run(settings, status.update)
    write_json(output, result)
    print_report(result, console)
    if not can_draw:
        typer.echo(f"No figure: matplotlib is not installed. Cure: {install('plot')}", err=True)
    elif result["results"]:
        write_plot(result, output.with_suffix(".png"))
    typer.echo(f"Every number: {output}")
    if any(entry["contestant"] == "ours" for entry in result["skipped"]):
        raise typer.Exit(1)


def _read(path: Path) -> dict[str, Any]:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"file {str(path)!r} cannot be read ({error}); expected the JSON of `grpo-fast bench-head --output`.") from error
    if not isinstance(result, dict) or not result.get("results"):
        raise ValueError(f"file {str(path)!r} holds no results; expected the JSON of `grpo-fast bench-head --output`.")
    return result


app = typer.Typer(add_completion=False)
app.command()(bench_head)

if __name__ == "__main__":
    app()
