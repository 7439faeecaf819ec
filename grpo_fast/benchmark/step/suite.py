"""The run: whole optimizer steps, generation included, of TRL's GRPOTrainer and of this package's, in turn.

A step is what transformers' training loop does between two optimizer steps: prompts, completions, rewards, advantages, loss, backward,
optimizer, logged metrics. Both trainers train the same model on the same prompts, with their defaults otherwise. Their completions differ,
because they use random numbers differently; all have the same number of tokens, and the rewards are given.

Unsloth and verl have no such step on a CPU, so they are not measured.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from grpo_fast.benchmark.harness.figure import Bar, Panel, write_bars
from grpo_fast.benchmark.harness.measure import Record
from grpo_fast.benchmark.harness.suite import (
    BenchmarkSettings,
    Progress,
    Result,
    Suite,
    require,
    require_whole_groups,
    setting,
    summary,
    table,
)
from grpo_fast.benchmark.harness.worker import WorkerDiedError, WorkerProcess
from grpo_fast.benchmark.step.inputs import make_prompts, save_random_model
from grpo_fast.benchmark.step.worker import PHASES, StepCase, StepWorker
from grpo_fast.integrations.versions import refuse_other_versions
from grpo_fast.ops.environment import caption

__all__ = ["LABELS", "SUITE", "StepSettings", "markdown", "run"]

HELP = "Time whole steps of TRL's GRPOTrainer and of this package's, generation included. An hour, 20 GiB."
LABELS = {"stock": "TRL", "ours": "grpo_fast"}
COLOURS = {"stock": "trl", "ours": "ours"}
METHODS = {"full": "full fine-tuning", "lora": "LoRA, rank 16, all linear layers"}
CELL = ("method", "prompt", "generations", "active")


@dataclass(frozen=True, kw_only=True)
class StepSettings(BenchmarkSettings):
    """What is measured. The sizes of the random model are those of SmolLM2-135M."""

    model: str = setting("", "Folder of a model; empty: random weights with the sizes of SmolLM2-135M.")
    prompts: tuple[int, ...] = setting((32, 512), "Tokens of a prompt; may be repeated.", option="prompt", least=1)
    generations: tuple[int, ...] = setting((8, 16), "Completions of a group; may be repeated.", least=2)
    methods: tuple[str, ...] = setting(("full", "lora"), "full, lora; may be repeated.", option="method", choices=tuple(METHODS))
    active: tuple[float, ...] = setting((1.0, 0.5), "Share of groups with unequal rewards; may be repeated.")
    groups: int = setting(2, "Of a step.", least=1)
    completion: int = setting(32, "Tokens of a completion.", least=1)
    threads: int = setting(2, "One thread is timed by its CPU time, several by the wall clock.", least=1)
    width: int = setting(576)
    layers: int = setting(30)
    vocabulary: int = setting(49_152)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_whole_groups(self.active, self.groups)
        require(not self.model or Path(self.model).is_dir(), "model", self.model, "the folder of a model, or nothing")


def check(settings: StepSettings) -> None:
    """Raise an ImportError if TRL is not installed, or is a version that this package was not compared with."""
    refuse_other_versions("trl", "grpo-fast bench-step", "Another one may work otherwise inside.", required=True)


def run(settings: StepSettings, progress: Progress) -> Result:
    """Measure everything.

    Raises:
        RuntimeError: a trainer failed, or did other work than the other.
    """
    from transformers import AutoTokenizer

    results: list[Record] = []
    skipped: list[Record] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(settings.model or name)
        if not settings.model:
            progress("the model")
            sizes = {key: getattr(settings, key) for key in ("width", "layers", "vocabulary", "seed")}
            save_random_model(folder, **sizes, positions=max(settings.prompts) + settings.completion)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        for method, prompt, generations in itertools.product(settings.methods, settings.prompts, settings.generations):
            prompts = make_prompts(tokenizer, prompt, 4 * settings.groups, settings.seed)
            sizes = {"groups": settings.groups, "generations": generations, "completion": settings.completion}
            case = StepCase(model=folder, prompts=prompts, lora=method == "lora", threads=settings.threads, **sizes)
            what = f"{METHODS[method]}, prompts of {prompt} tokens, {generations} completions each"
            cell = {"method": method, "prompt": prompt, "generations": generations}
            try:
                results += [cell | entry for entry in _measure_case(case, settings, progress, what)]
            except WorkerDiedError as error:  # for lack of memory; the other cells may fit
                skipped.append(cell | {"implementation": "both", "reason": f"{what}: {error}"})
    return {
        "settings": {"dtype": "float32", "model": Path(settings.model).name or "random weights"},
        "timed": "a step of transformers' training loop: prompts, completions, rewards, loss, backward, optimizer, metrics",
        "results": results,
        "skipped": skipped,
    }


def _measure_case(case: StepCase, settings: StepSettings, progress: Progress, what: str) -> Iterator[Record]:
    """Run both trainers in turn, A B A B, at each share of active groups; the first round is the warm-up."""
    found: dict[tuple[float, str], list[Record]] = {}
    with ExitStack() as stack:
        progress(f"{what}: the trainers")
        workers = {name: stack.enter_context(WorkerProcess(partial(StepWorker, name, case), case.threads)) for name in LABELS}
        for number, active, name in itertools.product(range(1 + settings.rounds), settings.active, LABELS):
            progress(f"{what}: {active:.0%} of the groups active, {LABELS[name]}")
            answer = workers[name].ask("repetition", active=active)
            if number:
                found.setdefault((active, name), []).append(answer)
    for (active, name), answers in found.items():
        entry = {"implementation": name, "active": active}
        entry |= summary((x["seconds"] for x in answers), (x["peak_bytes"] for x in answers))
        entry["phases"] = {phase: statistics.median(x["phases"][phase] for x in answers) for phase in PHASES}
        entry["resident_peak"] = max((x["resident_peak"] for x in answers if x["resident_peak"] is not None), default=None)
        stock = statistics.median(x["seconds"] for x in found[active, "stock"])
        yield entry | {"faster_than_stock": stock / entry["median"]}


# The report -------------------------------------------------------------------------------------------------------------------------------


def _cells(result: Result) -> Iterator[tuple[tuple[Any, ...], dict[str, Record]]]:
    """The entries of each cell by implementation."""
    cells: dict[tuple[Any, ...], dict[str, Record]] = {}
    for entry in result["results"]:
        cells.setdefault(tuple(entry[key] for key in CELL), {})[entry["implementation"]] = entry
    yield from cells.items()


def _gibibytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**30:.1f}"


def print_report(result: Result, console: Console) -> None:
    """A table of steps, and one of where their time goes."""
    rows, phases = [], []
    for (method, prompt, generations, active), cell in _cells(result):
        stock, ours = cell["stock"], cell["ours"]
        name = f"{method}, {prompt}, {generations}, {active:.0%}"
        times = (f"{stock['median']:.3g}", f"{ours['median']:.3g}", f"{ours['faster_than_stock']:.2f}x")
        rows.append((name, *times, _gibibytes(stock["resident_peak"]), _gibibytes(ours["resident_peak"])))
        phases += [(f"{name}, {LABELS[key]}", *(f"{entry['phases'][phase]:.3g}" for phase in PHASES)) for key, entry in cell.items()]
    console.print("Cells: method, tokens of a prompt, completions of a group, share of groups active", highlight=False)
    console.print(table("A step", ("TRL, s", "grpo_fast, s", "faster", "TRL, peak GiB", "grpo_fast, peak GiB"), rows))
    console.print(table("Where the wall time goes, seconds", PHASES, phases))


def markdown(result: Result) -> list[str]:
    """The rows of the table in docs/results.md: seconds of a step, how many times faster, and peak memory."""
    rows = []
    for (method, prompt, generations, active), cell in _cells(result):
        stock, ours = cell["stock"], cell["ours"]
        times = f"{stock['median']:.3g} s | {ours['median']:.3g} s | {ours['faster_than_stock']:.2f}x"
        memory = f"{_gibibytes(stock['resident_peak'])} GiB | {_gibibytes(ours['resident_peak'])} GiB"
        rows.append(f"| {method} | {prompt} | {generations} | {active:.0%} | {times} | {memory} |")
    return rows


def write_figure(result: Result, path: Path) -> None:
    """The seconds of a step, a panel for each method."""
    panels = []
    for method, title in METHODS.items():
        bars = [
            Bar(f"prompt {prompt},\n{generations} completions,\n{active:.0%} active", COLOURS[name], LABELS[name], entry["median"])
            for (of, prompt, generations, active), cell in _cells(result)
            if of == method
            for name, entry in cell.items()
        ]
        if bars:
            panels.append(Panel(f"{title}: seconds of a step (lower is better)", bars, line=None))
    settings = result["settings"]
    text = f"{caption(result['machine'], settings['threads'])}\n{settings['clock']}; {settings['model']}, float32"
    write_bars(path, "A whole GRPO step, generation included", panels, text)


SUITE: Suite[Any] = Suite(
    "bench-step",
    HELP,
    StepSettings,
    run,
    print_report,
    write_figure=write_figure,
    check=check,
    packages=("trl", "peft"),
    quick={"prompts": (8,), "generations": (2,), "completion": 4, "rounds": 1, "threads": 1, "width": 16, "layers": 1, "vocabulary": 101},
)
