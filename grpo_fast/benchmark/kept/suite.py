"""The run: each implementation at each size of the sets, in a process of its own."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from grpo_fast.benchmark.harness.figure import Bar, Panel, write_bars
from grpo_fast.benchmark.harness.measure import Record
from grpo_fast.benchmark.harness.suite import BenchmarkSettings, Progress, Result, Suite, mebibytes, require, setting, summary, table
from grpo_fast.benchmark.harness.worker import WorkerError, WorkerProcess
from grpo_fast.benchmark.head.implementations import SEQUENCES, TEMPERATURE, make_cases, measure_gradients
from grpo_fast.benchmark.kept.implementations import IMPLEMENTATIONS, LABELS, OVER_SETS, KeptCase, check, make_kept, make_kept_case
from grpo_fast.ops.environment import caption

__all__ = ["SUITE", "KeptSettings", "run", "sizes_of"]

HELP = "Time the head over kept sets of truncated sampling against heads that compute the whole vocabulary. 20 minutes."
TOP_P = "top-p"  # in place of a size: the sizes that top-p 0.95 leaves
# Quantiles (0, 1/32, ... 1) of the sizes at 386 tokens of SmolLM2-135M-Instruct, eight prompts, T = 1, top-p 0.95: 191 ids in the mean.
MEASURED_SIZES = (
    *(1, 1, 1, 2, 2, 3, 3, 4, 5, 7, 9, 12, 17, 21, 28, 32, 45, 60, 71, 83, 99, 131, 146, 169, 206, 237, 282, 350, 475, 618, 850, 1162),
    2205,
)
KEY = ("dtype", "trainable", "size")  # of a case


@dataclass(frozen=True, kw_only=True)
class KeptSettings(BenchmarkSettings):
    """What is measured. With this width, the vocabulary is that of Qwen2.5-0.5B's head."""

    sizes: tuple[str, ...] = setting(
        ("1", "8", "32", "128", "512", "2048", TOP_P), f"Ids of a set, or {TOP_P}; may be repeated.", option="size"
    )
    tokens: int = setting(256, "Tokens of the batch.", least=SEQUENCES)
    width: int = setting(896, "Of the hidden states.", least=1)
    vocabulary: int = setting(151_936, "Rows of the head's weight.", least=2)
    dtypes: tuple[str, ...] = setting(("float32",), "float32, bfloat16; may be repeated.", option="dtype", choices=("float32", "bfloat16"))
    implementations: tuple[str, ...] = setting(
        IMPLEMENTATIONS, f"{', '.join(IMPLEMENTATIONS)}; may be repeated.", option="implementation", choices=IMPLEMENTATIONS
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.tokens % SEQUENCES == 0, "tokens", self.tokens, f"a multiple of {SEQUENCES}, the number of sequences")
        for size in self.sizes:
            ok = size == TOP_P or (size.isdigit() and 1 <= int(size) <= self.vocabulary // 4)
            require(ok, "size", size, f"{TOP_P}, or a number of ids from 1 to a quarter of the vocabulary")


class KeptWorker:
    """One implementation at one case, in a process of its own."""

    def __init__(self, threads: int):
        self.threads = threads

    def measure(self, name: str, path: Path, trainable: bool, rounds: int) -> Record:
        """Time after a warm-up. The first result is held to the truth, if it is one over the sets."""
        case: KeptCase = torch.load(path, weights_only=False)  # our own file, made a moment ago
        step = make_kept(name, case)
        seconds, peaks, verdict = [], [], None
        for number in range(1 + rounds):
            measured = measure_gradients(step, case.head, trainable, self.threads)
            if number == 0:
                verdict = check(measured.result, case) if name in OVER_SETS else None
                continue
            seconds.append(measured.seconds)
            peaks.append(measured.peak_bytes)
        return {
            **summary(seconds, peaks),
            "errors": None if verdict is None else verdict.errors_for_json(),
            "right": verdict is None or verdict.passed,
        }


def sizes_of(size: str, tokens: int, seed: int) -> Tensor:
    """The size of each token's set, int64 [N]; for ``top-p`` drawn from the sizes that were measured."""
    if size != TOP_P:
        return torch.full((tokens,), int(size))
    places = torch.rand(tokens, generator=torch.Generator().manual_seed(seed)) * (len(MEASURED_SIZES) - 1)
    measured = torch.tensor(MEASURED_SIZES, dtype=torch.float32)
    below = places.long()
    return torch.lerp(measured[below], measured[below + 1], places - below).round().long()


def run(settings: KeptSettings, progress: Progress) -> Result:
    """Measure everything. What computes the whole vocabulary is timed once, since the sets do not matter to it."""
    results: list[Record] = []
    skipped: list[Record] = []
    for dtype in settings.dtypes:
        (head,) = make_cases(settings.tokens, settings.width, settings.vocabulary, getattr(torch, dtype), [1.0], settings.seed)
        for number, size in enumerate(settings.sizes):
            sizes = sizes_of(size, settings.tokens, settings.seed)
            progress(f"{dtype}, sets of {size}: truth in float64")
            names = [name for name in settings.implementations if name in OVER_SETS or number == 0]
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "case.pt"
                torch.save(make_kept_case(head, sizes, settings.seed), path)
                for trainable, name in itertools.product((False, True), names):
                    entry: Record = {"implementation": name, "dtype": dtype, "trainable": trainable}
                    entry |= {"size": size if name in OVER_SETS else None, "mean_size": float(sizes.double().mean())}
                    progress(f"{dtype}, sets of {size}, {'trainable' if trainable else 'frozen'} head: {name}")
                    try:
                        with WorkerProcess(partial(KeptWorker, settings.threads), settings.threads) as worker:
                            found = worker.ask("measure", name=name, path=path, trainable=trainable, rounds=settings.rounds)
                        if not found["right"]:
                            raise WorkerError(f"its result is wrong: {found['errors']}")
                    except WorkerError as error:
                        skipped.append({**entry, "reason": str(error)})
                        continue
                    results.append({**entry, **found})
    for entry in results:
        whole = (x for x in results if x["implementation"] == "ours" and all(x[key] == entry[key] for key in KEY[:2]))
        dense = next((x["median"] for x in whole), None)
        entry["times_faster"] = None if dense is None else dense / entry["median"]
    return {"settings": {"temperature": TEMPERATURE, "sequences": SEQUENCES}, "results": results, "skipped": skipped}


# The report -------------------------------------------------------------------------------------------------------------------------------


def _by_head(result: Result) -> Iterator[tuple[str, list[Record]]]:
    """Title and entries of each type and kind of head, in the order of LABELS and of the sizes."""
    for dtype, trainable in dict.fromkeys((entry["dtype"], entry["trainable"]) for entry in result["results"]):
        entries = [x for x in result["results"] if (x["dtype"], x["trainable"]) == (dtype, trainable)]
        entries.sort(key=lambda entry: IMPLEMENTATIONS.index(entry["implementation"]))
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


def write_figure(result: Result, path: Path) -> None:
    """How many times faster than our own head over the whole vocabulary, by the size of the sets."""
    panels = []
    for title, entries in _by_head(result):
        bars = [
            Bar(_ids(entry), entry["implementation"], LABELS[entry["implementation"]], entry["times_faster"])
            for entry in entries
            if entry["implementation"] in ("kept", "gather")
        ]
        panels.append(Panel(f"{title}: times faster than the same head over the whole vocabulary", bars, log=True))
    text = f"{caption(result['machine'], result['settings']['threads'])}\n{result['settings']['clock']}"
    write_bars(path, "Loss and gradients over kept sets, by ids of a set (higher is better)", panels, text)


SUITE: Suite[Any] = Suite(
    "bench-kept", HELP, KeptSettings, run, print_report, write_figure=write_figure, packages=("liger_kernel", "cut_cross_entropy")
)
