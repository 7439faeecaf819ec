"""The run: at each size of the sets all implementations in turn, in one process."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from grpo_fast.benchmark.harness.figure import Bar, Panel, write_bars
from grpo_fast.benchmark.harness.gate import UnavailableError
from grpo_fast.benchmark.harness.measure import Record
from grpo_fast.benchmark.harness.suite import BenchmarkSettings, Progress, Result, Suite, mebibytes, require, setting, summary, table
from grpo_fast.benchmark.harness.worker import WorkerError, WorkerProcess
from grpo_fast.benchmark.head.implementations import SEQUENCES, TEMPERATURE, make_cases, measure_gradients
from grpo_fast.benchmark.kept.implementations import BY_SIZE, DEFAULT, LABELS, OVER_SETS, KeptCase, check, make_kept, make_kept_case
from grpo_fast.ops.environment import caption

__all__ = ["SUITE", "KeptSettings", "run", "sizes_of"]

HELP = "Time the head over kept sets of truncated sampling against heads that compute the whole vocabulary. 20 minutes."
TOP_P = "top-p"  # in place of a size: the sizes that top-p 0.95 leaves
# Quantiles (0, 1/32, ... 1) of the sizes at 386 tokens of SmolLM2-135M-Instruct, eight prompts, T = 1, top-p 0.95: 191 ids in the mean.
MEASURED_SIZES = (
    *(1, 1, 1, 2, 2, 3, 3, 4, 5, 7, 9, 12, 17, 21, 28, 32, 45, 60, 71, 83, 99, 131, 146, 169, 206, 237, 282, 350, 475, 618, 850, 1162),
    2205,
)
KEY = ("dtype", "trainable")  # what is compared with the whole vocabulary
SLOW = 0.5  # seconds


@dataclass(frozen=True, kw_only=True)
class KeptSettings(BenchmarkSettings):
    """What is measured. With this width, the vocabulary is that of Qwen2.5-0.5B's head."""

    sizes: tuple[str, ...] = setting(
        ("1", "8", "32", "128", "512", "2048", TOP_P),
        f"Ids of a set, or V/64 for a share of the vocabulary, or {TOP_P}; may be repeated.",
        option="size",
    )
    tokens: int = setting(256, "Tokens of the batch.", least=SEQUENCES)
    width: int = setting(896, "Of the hidden states.", least=1)
    vocabulary: int = setting(151_936, "Rows of the head's weight.", least=2)
    dtypes: tuple[str, ...] = setting(("float32",), "float32, bfloat16; may be repeated.", option="dtype", choices=("float32", "bfloat16"))
    implementations: tuple[str, ...] = setting(
        DEFAULT, f"{', '.join(LABELS)}; may be repeated.", option="implementation", choices=tuple(LABELS)
    )
    rounds: int = setting(3, "Repetitions after a warm-up; one of what takes longer than half a second.", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.tokens % SEQUENCES == 0, "tokens", self.tokens, f"a multiple of {SEQUENCES}, the number of sequences")
        for size in self.sizes:
            number = size.removeprefix("V/")
            ok = size == TOP_P or (number.isdigit() and int(number) > 0 and 1 <= ids_of(size, self.vocabulary) <= self.vocabulary // 4)
            require(ok, "size", size, f"{TOP_P}, or a number of ids from 1 to a quarter of the vocabulary V, or V/4 and less")


class KeptWorker:
    """All implementations at one case."""

    def __init__(self, threads: int):
        self.threads = threads

    def measure(self, names: Sequence[str], path: Path, trainable: bool, rounds: int) -> Record:
        """Time each after a warm-up, in turn. The first result is held to the truth, if it is one over the sets; an implementation that is
        not there, fails or is wrong has a reason in place of times."""
        case: KeptCase = torch.load(path, weights_only=False)  # our own file, made a moment ago
        found: dict[str, Record] = {name: {"seconds": [], "peaks": [], "errors": None} for name in names}
        for number, (name, entry) in itertools.product(range(1 + rounds), found.items()):
            if "reason" in entry or (number > 1 and entry["slow"]):
                continue
            try:
                measured = measure_gradients(make_kept(name, case), case.head, trainable, self.threads)
            except (UnavailableError, RuntimeError, TypeError, ValueError, ImportError) as error:
                entry["reason"] = f"not run: {(str(error).strip().splitlines() or [''])[0]}"
                continue
            if number > 0:
                entry["seconds"].append(measured.seconds)
                entry["peaks"].append(measured.peak_bytes)
                continue
            entry["slow"] = measured.seconds > SLOW
            if name in OVER_SETS:
                verdict = check(measured.result, case)
                entry["errors"] = verdict.errors_for_json()
                if not verdict.passed:
                    entry["reason"] = f"its result is wrong: {entry['errors']}"
        return {
            name: {"reason": x["reason"]} if "reason" in x else {**summary(x["seconds"], x["peaks"]), "errors": x["errors"]}
            for name, x in found.items()
        }


def ids_of(size: str, vocabulary: int) -> int:
    """The number of ids of a size other than ``top-p``."""
    return vocabulary // int(size[2:]) if size.startswith("V/") else int(size)


def sizes_of(size: str, tokens: int, vocabulary: int, seed: int) -> Tensor:
    """The size of each token's set, int64 [N]; for ``top-p`` drawn from the sizes that were measured."""
    if size != TOP_P:
        return torch.full((tokens,), ids_of(size, vocabulary))
    places = torch.rand(tokens, generator=torch.Generator().manual_seed(seed)) * (len(MEASURED_SIZES) - 1)
    measured = torch.tensor(MEASURED_SIZES, dtype=torch.float32)
    below = places.long()
    return torch.lerp(measured[below], measured[below + 1], places - below).round().long().clamp(max=vocabulary // 4)


def run(settings: KeptSettings, progress: Progress) -> Result:
    """Measure everything. What does not depend on the sets is timed once."""
    results: list[Record] = []
    skipped: list[Record] = []
    for dtype in settings.dtypes:
        (head,) = make_cases(settings.tokens, settings.width, settings.vocabulary, getattr(torch, dtype), [1.0], settings.seed)
        for number, size in enumerate(settings.sizes):
            sizes = sizes_of(size, settings.tokens, settings.vocabulary, settings.seed)
            names = [name for name in settings.implementations if name in BY_SIZE or number == 0]
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "case.pt"
                torch.save(make_kept_case(head, sizes, settings.seed), path)
                for trainable in (False, True):
                    progress(f"{dtype}, sets of {size}, {'trainable' if trainable else 'frozen'} head")
                    try:
                        with WorkerProcess(partial(KeptWorker, settings.threads), settings.threads) as worker:
                            answer = worker.ask("measure", names=names, path=path, trainable=trainable, rounds=settings.rounds)
                    except WorkerError as error:
                        answer = {name: {"reason": str(error)} for name in names}
                    for name, found in answer.items():
                        entry: Record = {"implementation": name, "dtype": dtype, "trainable": trainable}
                        entry |= {"size": size if name in BY_SIZE else None, "mean_size": float(sizes.double().mean())}
                        entry["question"] = "kept sets" if name in OVER_SETS else "whole vocabulary"
                        (skipped if "reason" in found else results).append({**entry, **found})
    for entry in results:
        whole = (x for x in results if x["implementation"] == "ours" and all(x[key] == entry[key] for key in KEY))
        dense = next((x["median"] for x in whole), None)
        entry["times_faster"] = None if dense is None else dense / entry["median"]
    return {"settings": {"temperature": TEMPERATURE, "sequences": SEQUENCES}, "results": results, "skipped": skipped}


# The report -------------------------------------------------------------------------------------------------------------------------------


def _by_head(result: Result) -> Iterator[tuple[str, list[Record]]]:
    """Title and entries of each type and kind of head, in the order of LABELS and of the sizes."""
    for dtype, trainable in dict.fromkeys((entry["dtype"], entry["trainable"]) for entry in result["results"]):
        entries = [x for x in result["results"] if (x["dtype"], x["trainable"]) == (dtype, trainable)]
        entries.sort(key=lambda entry: tuple(LABELS).index(entry["implementation"]))
        yield f"{dtype}, {'trainable' if trainable else 'frozen'} head", entries


def _ids(entry: Record) -> str:
    if entry["size"] is None:
        return "any"
    return entry["size"] if entry["size"] != TOP_P else f"{TOP_P}, {entry['mean_size']:.0f} in the mean"


def print_report(result: Result, console: Console) -> None:
    """A table per head: milliseconds, how many times faster than the whole vocabulary, extra memory."""
    settings = result["settings"]
    for title, entries in _by_head(result):
        rows = []
        for entry in entries:
            faster = "-" if entry["times_faster"] is None else f"{entry['times_faster']:.3g}"
            rows.append(
                (LABELS[entry["implementation"]], _ids(entry), f"{1e3 * entry['median']:.3g}", faster, mebibytes(entry["peak_bytes"]))
            )
        columns = ("ids of a set", "ms", "x faster", "extra memory, MiB")
        console.print(table(f"{title}, {settings['tokens']} tokens, {settings['width']} x {settings['vocabulary']}", columns, rows))


def markdown(result: Result) -> list[str]:
    """The rows of the tables in docs/kept-sets.md: time, how many times faster, and memory with a frozen and a trainable head."""
    cells: dict[tuple[str, str, str], dict[bool, str]] = {}
    for entry in sorted(result["results"], key=lambda entry: tuple(LABELS).index(entry["implementation"])):
        cell = f"{1e3 * entry['median']:.3g} ms ({entry['times_faster']:.3g}x), {mebibytes(entry['peak_bytes'])}"
        cells.setdefault((entry["dtype"], LABELS[entry["implementation"]], entry["size"] or "any"), {})[entry["trainable"]] = cell
    return [f"| {' | '.join(key)} | {found.get(False, '-')} | {found.get(True, '-')} |" for key, found in cells.items()]


def write_figure(result: Result, path: Path) -> None:
    """How many times faster than our own head over the whole vocabulary, by the size of the sets."""
    panels = []
    for title, entries in _by_head(result):
        bars = [
            Bar(_ids(entry), entry["implementation"], LABELS[entry["implementation"]], entry["times_faster"])
            for entry in entries
            if entry["implementation"] != "ours"
        ]
        panels.append(Panel(f"{title}: times faster than grpo_fast's head over the whole vocabulary", bars, log=True))
    text = f"{caption(result['machine'], result['settings']['threads'])}\n{result['settings']['clock']}"
    write_bars(path, "Loss and gradients by ids of a set (higher is better)", panels, text)


SUITE: Suite[Any] = Suite(
    "bench-kept", HELP, KeptSettings, run, print_report, write_figure=write_figure, packages=("liger_kernel", "cut_cross_entropy")
)
