"""``grpo-fast bench``: the command."""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from grpo_fast.benchmark.settings import CONTESTANTS, DTYPES, MALLOC_MODES, Settings, parse_shape
from grpo_fast.utils.files import check_output
from grpo_fast.utils.install_hints import install

__all__ = ["app", "bench"]

_DEFAULTS = Settings()
_QUICK_SHAPES = ((64, 2000), (16, 5003))  # the second: no sequence of equal length, no vector of equal width
_QUICK_CONTESTANTS = tuple(name for name in CONTESTANTS if name not in ("compile", "trl"))  # these need ten seconds to start


def bench(
    files: Annotated[list[Path] | None, typer.Argument(help="With --plot: results to draw.")] = None,
    shape: Annotated[list[str] | None, typer.Option(help="ROWSxVOCABULARY; may be repeated. Default: 2048x32000 and 512x152064.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help=f"{', '.join(DTYPES)}; may be repeated. Default: float32 and bfloat16.")] = None,
    contestant: Annotated[list[str] | None, typer.Option(help=f"{', '.join(CONTESTANTS)}; may be repeated. Default: all.")] = None,
    malloc: Annotated[list[str] | None, typer.Option(help=f"{', '.join(MALLOC_MODES)}; may be repeated. Default: both.")] = None,
    temperature: Annotated[float, typer.Option(help="Above 0.")] = _DEFAULTS.temperature,
    threads: Annotated[int, typer.Option(help="One thread is timed by its CPU time, several by the wall clock.")] = _DEFAULTS.threads,
    rounds: Annotated[int | None, typer.Option(help=f"Repetitions of everything, interleaved. Default: {_DEFAULTS.rounds}.")] = None,
    active_fraction: Annotated[float, typer.Option(help="Share of unmasked rows; below 1 grpo_fast skips work that the others do.")] = 1.0,
    entropy: Annotated[bool, typer.Option("--entropy", help="The others compute the entropy too, as grpo_fast always does.")] = False,
    device: Annotated[str, typer.Option(help="Only cpu so far.")] = _DEFAULTS.device,
    seed: Annotated[int, typer.Option(help="Of the data.")] = _DEFAULTS.seed,
    output: Annotated[Path, typer.Option(help="The result as JSON; the figure goes beside it as PNG.")] = Path("runs/bench/cpu.json"),
    quick: Annotated[
        bool, typer.Option("--quick", help="Tiny shapes, one process, warm caches, no torch.compile, no TRL: does it run?")
    ] = False,
    plot: Annotated[bool, typer.Option("--plot", help="Measure nothing: draw FILES, each as a PNG beside it.")] = False,
) -> None:
    """Time the loss against what you would use instead, and against a copy of the same bytes. About five minutes."""
    try:
        if plot:
            _plot(files or [])
            return
        if files:
            raise ValueError(f"FILES is {' '.join(map(str, files))}; expected none without --plot. Name the result with --output.")
        settings = Settings(
            shapes=tuple(parse_shape(text) for text in shape) if shape else _QUICK_SHAPES if quick else _DEFAULTS.shapes,
            dtypes=tuple(dtype) if dtype else _DEFAULTS.dtypes,
            contestants=tuple(contestant) if contestant else _QUICK_CONTESTANTS if quick else _DEFAULTS.contestants,
            malloc=tuple(malloc) if malloc else _DEFAULTS.malloc,
            temperature=temperature,
            threads=threads,
            rounds=rounds if rounds is not None else 2 if quick else _DEFAULTS.rounds,
            active_fraction=active_fraction,
            entropy=entropy,
            device=device,
            seed=seed,
            isolated=not quick,
            cold=not quick,
        )
        check_output(output)
        result = _measure(settings)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error

    from rich.console import Console

    from grpo_fast.benchmark.report import print_report
    from grpo_fast.utils.files import write_json

    write_json(output, result)
    print_report(result, Console())
    typer.echo(f"Every number: {output}")
    if importlib.util.find_spec("matplotlib") is None:
        typer.echo(f"No figure: matplotlib is not installed. Cure: {install('plot')}", err=True)
    elif result["results"]:
        _plot([output])
    if any(entry["contestant"].startswith("ours") for entry in result["skipped"]):
        typer.echo("grpo_fast itself did not finish, or not rightly: see above.", err=True)
        raise typer.Exit(1)


def _measure(settings: Settings) -> dict[str, Any]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from grpo_fast.benchmark.report import as_json
    from grpo_fast.benchmark.schedule import run, total_steps
    from grpo_fast.ops.environment import describe, load_average

    machine, load, start = describe(), load_average(), time.perf_counter()
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    # Drawn twice a second only: on one core the bar would take its time from what is being measured.
    with Progress(*columns, refresh_per_second=2) as bar:
        task = bar.add_task("starting", total=total_steps(settings))
        outcome = run(settings, lambda text, steps: bar.update(task, description=text, advance=steps))
    return as_json(settings, machine, outcome, loads=[load, load_average()], seconds=time.perf_counter() - start)


def _plot(files: list[Path]) -> None:
    if not files:
        raise ValueError("FILES is empty; expected the JSON files to draw, as in: grpo-fast bench --plot bench/results/cpu.json.")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(f"--plot needs matplotlib, which is not installed; expected it. Cure: {install('plot')}.")
    from grpo_fast.benchmark.plot import write_gpu_plot, write_plot
    from grpo_fast.benchmark.report import load

    gpu = [_gpu_result(path) for path in files]
    results = [(path, found or load(path)) for path, found in zip(files, gpu, strict=True)]  # all are read before anything is written
    for path, result in results:
        (write_gpu_plot if result.get("kind") == "gpu" else write_plot)(result, path.with_suffix(".png"))
        typer.echo(f"Drawn: {path.with_suffix('.png')}")


def _gpu_result(path: Path) -> dict[str, Any] | None:
    """What bench/gpu_bench.py wrote; None where it is anything else, or cannot be read."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return result if isinstance(result, dict) and result.get("kind") == "gpu" else None


app = typer.Typer(add_completion=False)
app.command()(bench)
