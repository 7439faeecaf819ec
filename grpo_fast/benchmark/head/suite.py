"""The run: cases one after the other, each implementation in a process of its own, the roofline before and after them."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from grpo_fast.benchmark.harness.figure import Bar, Panel, write_bars
from grpo_fast.benchmark.harness.measure import Record
from grpo_fast.benchmark.harness.suite import BenchmarkSettings, Progress, Result, Suite, mebibytes, require, setting, summary, table
from grpo_fast.benchmark.harness.worker import WorkerError, WorkerProcess
from grpo_fast.benchmark.head.implementations import (
    COMPILED,
    IMPLEMENTATIONS,
    LABELS,
    SEQUENCES,
    TEMPERATURE,
    HeadCase,
    compare_with_truth,
    make,
    make_cases,
    measure_gradients,
)
from grpo_fast.ops.environment import available_memory, caption

__all__ = ["SUITE", "HeadSettings", "HeadWorker", "markdown", "run"]

SKIP_INACTIVE = ("ours",)  # the work of the others is the same at every share of active tokens: they are timed at the largest alone
ROOFLINES = ("roofline", "roofline_float32")  # in the type of the operands, and in float32
FOOTPRINT = {"eager": 6, "full": 2}  # in float32 logits of the whole batch; 1 of the others
HELP = "Time the loss from hidden states against what you would use instead, and against its bare matrix products. 22 minutes."
KEY = ("tokens", "dtype", "trainable")  # of a case


@dataclass(frozen=True, kw_only=True)
class HeadSettings(BenchmarkSettings):
    """What is measured. With this width, the vocabulary is that of Qwen2.5-0.5B's head."""

    tokens: tuple[int, ...] = setting((1024, 4096), "May be repeated.", least=SEQUENCES)
    width: int = setting(896, "Of the hidden states.", least=1)
    vocabulary: int = setting(151_936, "Rows of the head's weight.", least=2)
    dtypes: tuple[str, ...] = setting(("float32",), "float32, bfloat16; may be repeated.", option="dtype", choices=("float32", "bfloat16"))
    active: tuple[float, ...] = setting((1.0, 0.6, 0.3), "Share of tokens that can change the gradient; may be repeated.")
    implementations: tuple[str, ...] = setting(
        IMPLEMENTATIONS, f"{', '.join(IMPLEMENTATIONS)}; may be repeated.", option="implementation", choices=IMPLEMENTATIONS
    )
    rounds: int = setting(2, "Repetitions of the smallest number of tokens; of more tokens in proportion fewer, at least one.", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        for tokens in self.tokens:
            require(tokens % SEQUENCES == 0, "tokens", tokens, f"a multiple of {SEQUENCES}, the number of sequences")
        for active in self.active:
            require(0 < active <= 1, "active", active, "a share above 0 and at most 1")


class HeadWorker:
    """One implementation at one case, in a process of its own."""

    def __init__(self, threads: int):
        self.threads = threads

    def measure(self, name: str, path: Path, trainable: bool, rounds: int) -> Record:
        """Count the operations at a small size, which also warms up everything but compiled code; then time. The first result is held to
        the truth. What is compiled for this number of tokens is called once more beforehand."""
        case: HeadCase = torch.load(path, weights_only=False)  # our own file, made a moment ago
        if name == "roofline_float32":
            case = replace(case, hidden=case.hidden.float(), weight=case.weight.float())
        multiple, step = flop_multiple(name, trainable, case), make(name, case)
        seconds, peaks, verdict, before = [], [], None, None
        for number in range(rounds + (name in COMPILED)):
            measured = measure_gradients(step, case, trainable, self.threads)
            seconds.append(measured.seconds)
            if number == 0:  # above it memory counts, what an implementation keeps from call to call included
                before = measured.resident_before
                verdict = None if name in ROOFLINES else compare_with_truth(measured.result, case.truth, case.hidden.dtype)
            if before is not None and measured.resident_peak is not None and name not in ROOFLINES:
                peaks.append(measured.resident_peak - before)
            del measured
        return {
            "seconds": seconds[-rounds:],
            "peak_bytes": max(peaks[-rounds:], default=None),
            "flop_multiple": multiple,
            "errors": None if verdict is None else verdict.errors_for_json(),
            "right": verdict is None or verdict.passed,
        }


def flop_multiple(name: str, trainable: bool, like: HeadCase) -> float:
    """The operations of an implementation's matrix products in units of N D V, which are the same at any size: counted at a small one with
    the same share of active tokens. Compiled code runs as it is written."""
    share = float((like.mask.bool() & (like.advantages != 0)[:, None]).float().mean())
    (case,) = make_cases(SEQUENCES * 40, 16, 512, like.hidden.dtype, [share], seed=0)
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _flops, torch.ops.grpo_fast.product_: _flops})
    with torch.compiler.set_stance("force_eager"), counter:
        make(name, case)(case.hidden.requires_grad_(), case.weight.requires_grad_(trainable)).backward()
    return counter.get_total_flops() / (case.token_ids.numel() * case.weight.numel())


def _flops(total: Any, a: Any, b: Any, *_: Any, **__: Any) -> int:  # shapes
    return int(2 * a[0] * a[1] * b[1])


def run(settings: HeadSettings, progress: Progress) -> Result:
    """Measure everything."""
    results: dict[tuple[Any, ...], Record] = {}
    skipped: list[Record] = []
    for tokens, dtype in itertools.product(settings.tokens, settings.dtypes):
        progress(f"{tokens} tokens, {dtype}: truth in float64")
        cases = make_cases(tokens, settings.width, settings.vocabulary, getattr(torch, dtype), settings.active, settings.seed)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "case.pt"
            for active, case in zip(settings.active, cases, strict=True):
                torch.save(case, path)
                names = [name for name in settings.implementations if active == max(settings.active) or name in SKIP_INACTIVE]
                again = ["roofline"] if "roofline" in names and len(names) > 1 else []
                for trainable, name in itertools.product((True, False), [*names, *again]):
                    progress(f"{tokens} tokens, {dtype}, {active:.0%} active, {'trainable' if trainable else 'frozen'} head: {name}")
                    entry = {"implementation": name, "tokens": tokens, "dtype": dtype, "active": active, "trainable": trainable}
                    try:
                        found = _measure(entry, path, settings)
                    except WorkerError as error:
                        skipped.append({**entry, "reason": str(error)})
                        continue
                    earlier = results.get(tuple(entry.values()), {"seconds": [], "peak_bytes": None})  # the roofline's first visit
                    times = summary(earlier["seconds"] + found["seconds"], (earlier["peak_bytes"], found["peak_bytes"]))
                    results[tuple(entry.values())] = {**entry, **found, **times}
    for entry in results.values():
        of_case = (other for other in results.values() if all(other[key] == entry[key] for key in KEY))
        roofline = next((other["median"] for other in of_case if other["implementation"] == "roofline"), None)
        entry["times_roofline"] = None if roofline is None else entry["median"] / roofline
    return {
        "settings": {"temperature": TEMPERATURE, "sequences": SEQUENCES},
        "results": list(results.values()),
        "skipped": skipped,
    }


def _measure(entry: Record, path: Path, settings: HeadSettings) -> Record:
    """What the worker answers; raises a WorkerError where there is no time to report."""
    name, tokens = entry["implementation"], entry["tokens"]
    needed, available = FOOTPRINT.get(name, 1) * tokens * settings.vocabulary * 4, available_memory()
    if available is not None and needed >= available:
        raise WorkerError(f"needs {needed / 2**30:.0f} GiB, and {available / 2**30:.0f} are free")
    rounds = max(1, settings.rounds * min(settings.tokens) // tokens)
    answer = ask_worker(name, path, entry["trainable"], rounds, settings.threads)
    if not answer["right"]:
        raise WorkerError(f"its result is wrong: {answer['errors']}")
    return answer


def ask_worker(name: str, path: Path, trainable: bool, rounds: int, threads: int) -> Record:
    """Measure in a process of its own."""
    with WorkerProcess(partial(HeadWorker, threads), threads) as worker:
        return worker.ask("measure", name=name, path=path, trainable=trainable, rounds=rounds)


# The report -------------------------------------------------------------------------------------------------------------------------------


def _by_case(result: Result) -> Iterator[tuple[str, list[Record]]]:
    """Title and entries of each case, in the order of LABELS."""
    ordered = sorted(result["results"], key=lambda entry: (IMPLEMENTATIONS.index(entry["implementation"]), -entry["active"]))
    for key in dict.fromkeys(tuple(entry[name] for name in KEY) for entry in result["results"]):
        tokens, dtype, trainable = key
        title = f"{tokens} tokens, {dtype}, {'trainable' if trainable else 'frozen'} head"
        yield title, [entry for entry in ordered if tuple(entry[name] for name in KEY) == key]


def _label(entry: Record) -> str:
    return LABELS[entry["implementation"]] + ("" if entry["active"] == 1 else f", {entry['active']:.0%} active")


def print_report(result: Result, console: Console) -> None:
    """A table per case: seconds, multiples of the bare products, operations, extra memory."""
    settings = result["settings"]
    for title, entries in _by_case(result):
        rows = []
        for entry in entries:
            times = "-" if entry["times_roofline"] is None else f"{entry['times_roofline']:.2f}"
            rows.append((_label(entry), f"{entry['median']:.3g}", times, f"{entry['flop_multiple']:.3g}", mebibytes(entry["peak_bytes"])))
        columns = ("seconds", "x bare products", "operations, N D V", "extra memory, MiB")
        console.print(table(f"{title}, {settings['width']} x {settings['vocabulary']}", columns, rows))


def markdown(result: Result) -> list[str]:
    """The rows of the README's table: in each case seconds, multiples of the bare products, extra memory."""
    cells: dict[tuple[str, str], list[str]] = {}
    for _, entries in _by_case(result):
        for entry in entries:
            if entry["implementation"] not in ROOFLINES:
                cell = f"{entry['median']:.1f} s ({entry['times_roofline']:.2f}x), {entry['peak_bytes'] / 2**30:.2f} GiB"
                cells.setdefault(("**" if entry["implementation"] == "ours" else "", _label(entry)), []).append(cell)
    return [f"| {bold}{name}{bold} | {' | '.join(found)} |" for (bold, name), found in cells.items()]


def write_figure(result: Result, path: Path) -> None:
    """Time in multiples of the bare products, and memory, for each case at full activity; grpo_fast at the others too."""

    def bars(value: Callable[[Record], float | None]) -> list[Bar]:
        return [
            Bar(title.replace(", ", "\n", 1), entry["implementation"], _label(entry), value(entry), alpha=entry["active"])
            for title, entries in _by_case(result)
            for entry in entries
            if entry["implementation"] not in ROOFLINES
        ]

    times, memory = bars(lambda entry: entry["times_roofline"]), bars(lambda entry: entry["peak_bytes"] and entry["peak_bytes"] / 2**30)
    panels = [
        Panel("Time in multiples of the bare matrix products", times, number=".2f"),
        Panel("Extra memory, GiB", memory, line=None, number=".2f"),
    ]
    text = f"{caption(result['machine'], result['settings']['threads'])}\n{result['settings']['clock']}"
    write_bars(path, "Loss and gradients from hidden states (lower is better)", panels, text)


SUITE = Suite(
    "bench-head", HELP, HeadSettings, run, print_report, write_figure=write_figure, packages=("liger_kernel", "cut_cross_entropy")
)
