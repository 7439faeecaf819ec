"""The command of a benchmark suite: its options are those of the suite's settings."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from grpo_fast.benchmark.harness.measure import Record
from grpo_fast.benchmark.harness.suite import Suite, load, print_result, run_suite
from grpo_fast.utils.files import check_output, write_json
from grpo_fast.utils.install_hints import install

__all__ = ["bench_app"]


def bench_app(suite: Suite[Any]) -> typer.Typer:
    """A typer application with one command that runs a suite, writes its result and shows it."""

    def command(context: typer.Context, **options: Any) -> None:
        files, target = options.get("files") or [], options["output"]
        try:
            if options.get("plot"):
                _plot(suite, files)
                return
            if files:
                raise ValueError(f"FILES is {' '.join(map(str, files))}; expected none without --plot. Name the result with --output.")
            settings = suite.settings(**{**(suite.quick if options.get("quick") else {}), **_given_settings(suite, context, options)})
            check_output(target)
            suite.check(settings)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
        except ImportError as error:
            typer.echo(f"{error} Fix: {install('bench')}.", err=True)
            raise typer.Exit(2) from error
        _measure(suite, settings, target)

    command.__doc__ = suite.help
    command.__signature__ = inspect.Signature([*_parameters(suite)])  # type: ignore[attr-defined]
    command.__annotations__ = {}
    app = typer.Typer(add_completion=False)
    app.command()(command)
    return app


def _parameters(suite: Suite[Any]) -> Iterator[inspect.Parameter]:
    def parameter(name: str, kind: Any, default: Any, info: Any = None) -> inspect.Parameter:
        annotation = kind if info is None else Annotated[kind, info]
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)

    yield inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    if suite.write_figure:
        yield parameter("files", list[Path] | None, None, typer.Argument(help="With --plot: results to draw."))
    for field, text in _options(suite):
        value, name = field.default, f"--{(field.metadata['option'] or field.name).replace('_', '-')}"
        if isinstance(value, tuple):
            kind: Any = str if field.metadata["parse"] else type(value[0])
            shown = "" if "Default" in text else f" Default: {', '.join(map(str, value))}."
            yield parameter(field.name, list[kind] | None, None, typer.Option(name, help=text + shown))
        else:
            yield parameter(field.name, type(value), value, typer.Option(name, help=text))
    yield parameter("output", Path, Path(suite.output), typer.Option(help="The result as JSON; a figure goes beside it as PNG."))
    if suite.quick:
        yield parameter("quick", bool, False, typer.Option("--quick", help="Tiny sizes, few repetitions: does it run?"))
    if suite.write_figure:
        yield parameter("plot", bool, False, typer.Option("--plot", help="Measure nothing: draw FILES, each as a PNG beside it."))


def _options(suite: Suite[Any]) -> list[tuple[Any, str]]:
    """The fields of the settings that are options, with their help texts."""
    options = [(field, field.metadata.get("help", "")) for field in fields(suite.settings)]
    return [(field, text) for field, text in options if text and (suite.options is None or field.name in suite.options)]


def _given_settings(suite: Suite[Any], context: typer.Context, options: Record) -> Record:
    """The settings that the command line names."""
    values = {}
    for field, _ in _options(suite):
        source = context.get_parameter_source(field.name)
        if source is not None and source.name == "COMMANDLINE":
            value, parse = options[field.name], field.metadata["parse"] or (lambda text: text)
            values[field.name] = tuple(map(parse, value)) if isinstance(value, list) else value
    return values


def _measure(suite: Suite[Any], settings: Any, output: Path) -> None:
    from rich.console import Console

    console = Console()
    # Drawn twice a second only: on one core the line would take its time from what is being measured.
    with console.status("starting", refresh_per_second=2) as status:
        result = run_suite(suite, settings, status.update)
    write_json(output, result)
    print_result(suite, result, console)
    typer.echo(f"Every number: {output}")
    if suite.write_figure and importlib.util.find_spec("matplotlib") is None:
        typer.echo(f"No figure: matplotlib is not installed. Fix: {install('plot')}", err=True)
    elif suite.write_figure and result["results"]:
        suite.write_figure(result, output.with_suffix(".png"))
        typer.echo(f"Drawn: {output.with_suffix('.png')}")
    if any(entry["implementation"].startswith("ours") for entry in result.get("skipped", [])):
        typer.echo("grpo_fast itself failed or gave a wrong result: see above.", err=True)
        raise typer.Exit(1)


def _plot(suite: Suite[Any], files: list[Path]) -> None:
    if not files:
        raise ValueError(f"FILES is empty; expected the JSON files to draw, as in: grpo-fast {suite.name} --plot result.json.")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(f"--plot needs matplotlib, which is not installed; expected it. Fix: {install('plot')}.")
    from grpo_fast.benchmark.harness.figure import write_gpu_figure

    results = [(path, load(path, suite.name)) for path in files]  # all are read before anything is written
    for path, result in results:
        assert suite.write_figure is not None
        (write_gpu_figure if result.get("kind") == "gpu" else suite.write_figure)(result, path.with_suffix(".png"))
        typer.echo(f"Drawn: {path.with_suffix('.png')}")
