"""The run: a worker process for each implementation, all alive at once, their repetitions interleaved so that drift affects all alike."""

from __future__ import annotations

import gc
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from grpo_fast.benchmark.harness.measure import Measurement, Record, keep_freed_memory, measure, trim
from grpo_fast.benchmark.harness.suite import DTYPES, Progress, Result, Suite
from grpo_fast.benchmark.harness.worker import SharedMemory, WorkerDiedError, WorkerError, WorkerProcess
from grpo_fast.benchmark.logits.cases import (
    MALLOC_MODES,
    PASSES,
    Batch,
    LogitsCase,
    LogitsSettings,
    batch_bytes,
    expected_loss,
    fill,
    shared_batch,
    write_truth,
)
from grpo_fast.benchmark.logits.implementations import FOOTPRINT, Implementation, Outputs, compare_with_truth, make, tolerance
from grpo_fast.benchmark.logits.overhead import measure_overhead
from grpo_fast.benchmark.logits.report import print_report, summarise, write_figure
from grpo_fast.ops.environment import available_memory, cache_bytes

__all__ = ["SUITE", "needed_memory", "repetition"]

_BYTES_OF_A_PROCESS = 400 << 20  # torch and what it imports


# In a worker process ----------------------------------------------------------------------------------------------------------------------


class _ModelOutput(torch.autograd.Function):
    """Makes given memory the output of a model: neither a leaf nor a view of one, and nothing is copied."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, memory: list[Tensor]) -> Tensor:
        (storage,) = memory  # in a list, so that autograd does not take the output for a view of an input
        return storage.new_empty(0).set_(storage.untyped_storage(), 0, storage.shape, storage.stride())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        return None, None


def repetition(
    implementation: Implementation, step: str, shared: Batch, storage: Tensor, threads: int, **options: Any
) -> Measurement[Outputs]:
    """Run a pass once on the shared batch, whose logits are copied into ``storage`` and given as the output of a model that requires a
    gradient. ``options``: those of `measure`."""
    with torch.no_grad():
        storage.copy_(shared.logits)
    logits = _ModelOutput.apply(torch.zeros((), requires_grad=True), [storage])
    batch, function = Batch(**{**vars(shared), "logits": logits}), implementation.step(step)
    assert function is not None
    return measure(lambda: function(batch), threads, **options)


class LogitsWorker:
    """The implementations of a process, and the case that is being measured."""

    def __init__(self, options: Record, memory: SharedMemory, flush_bytes: int):
        self.options, self.memory = options, memory
        self.flush = torch.zeros(flush_bytes // 8, dtype=torch.int64)
        self.keeps_memory = False
        self.implementations: dict[str, Implementation] = {}

    def begin(self, case: LogitsCase, malloc: str, names: list[str]) -> Record:
        """Free the memory of the last case and take up this one, in a malloc mode; there is no way back from "touched"."""
        self.storage = torch.empty(0)
        gc.collect()
        trim()
        if malloc == "touched" and not self.keeps_memory:
            keep_freed_memory()
            self.keeps_memory = True
        self.case, self.shared = case, shared_batch(self.memory, case)
        self.storage = torch.zeros_like(self.shared.logits)
        if self.keeps_memory:  # one free block larger than all that will be asked for: what a warm-up leaves behind is in pieces
            torch.zeros(int(self.case.rows * self.case.vocabulary * max(FOOTPRINT[name] for name in names)))
        return {}

    def prepare(self, name: str, step: str, gate: bool) -> Record:
        """Compare a pass with float64 and measure its memory, in a repetition that holds nothing back from earlier calls."""
        if name not in self.implementations:
            self.implementations[name] = make(name, **self.options)
            gc.collect()
            gc.freeze()  # what was imported stays: the collection before each repetition need not look at it
        if self.implementations[name].step(step) is None:
            return {"has_pass": False}
        verdict = None
        if gate:
            found = compare_with_truth(self._measure(name, step).result, self.shared, expected_loss(self.shared), self._limits(name))
            rows = {"gradient_rows": self.shared.gate_rows.numel(), "tolerance": found.limits}
            verdict = {"passed": found.passed, **found.errors_for_json(), **rows}
        measured = self._measure(name, step, return_freed_memory=not self.keeps_memory)
        return {"has_pass": True, "verdict": verdict, "peak_bytes": None if self.keeps_memory else measured.peak_bytes}

    def time(self, name: str, step: str) -> Record:
        """One timed repetition, whose loss is held to one made from float32 log-probabilities."""
        measured = self._measure(name, step)
        loss, limit = measured.result.loss, self._limits(name)["loss"] + 2e-5
        right = loss is None or abs(float(loss) - expected_loss(self.shared)) <= limit
        return {"wall_ms": measured.wall_ms, "cpu_ms": measured.cpu_ms, "right": right}

    def overhead(self) -> Record:
        return measure_overhead()

    def _limits(self, name: str) -> dict[str, float]:
        return tolerance(DTYPES[self.case.dtype], self.implementations[name].arithmetic)

    def _measure(self, name: str, step: str, *, return_freed_memory: bool = False) -> Measurement[Outputs]:
        options = {"flush": self.flush, "return_freed_memory": return_freed_memory}
        return repetition(self.implementations[name], step, self.shared, self.storage, self.options["threads"], **options)


# In the parent ----------------------------------------------------------------------------------------------------------------------------


def flush_bytes(settings: LogitsSettings) -> int:
    """Twice the largest cache: reading and writing so much leaves nothing of the logits in it. Next to nothing for warm caches."""
    return 2 * cache_bytes() // 8 * 8 if settings.cold else 8


def needed_memory(settings: LogitsSettings) -> int:
    """Bytes a run holds at its worst moment, by estimate."""
    largest = max(case.rows * case.vocabulary * 4 for case in settings.cases)  # temporaries are float32 whatever the logits are
    footprints = [max(FOOTPRINT[name] for name in process) for process in settings.processes]
    kept = sum(footprints) if "touched" in settings.malloc else max(footprints)
    processes = (1 + len(footprints)) * _BYTES_OF_A_PROCESS + len(footprints) * flush_bytes(settings)
    return int(max(batch_bytes(case) for case in settings.cases) + (len(footprints) + kept) * largest + processes)


def check(settings: LogitsSettings) -> None:
    """Raise a ValueError if there is not enough memory."""
    needed, available = needed_memory(settings), available_memory()
    if available is not None and needed > available:
        raise ValueError(
            f"shapes need about {needed / 2**30:.1f} GiB, {available / 2**30:.1f} GiB are free; expected to fit: a run that swaps measures "
            "the disk. Fix: smaller shapes (--shape 512x32000), fewer implementations, or --malloc default, which holds less."
        )


def run(settings: LogitsSettings, progress: Progress) -> Result:
    """Measure everything that the settings ask for."""
    torch.zeros(needed_memory(settings), dtype=torch.uint8)  # a virtual machine gets pages from its host: not while something is timed
    threads_before = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        with ExitStack() as stack:
            return _Run(settings, progress, stack).run()
    finally:
        torch.set_num_threads(threads_before)


class _Run:
    """The order of events. An implementation that fails is taken out, of a pass or altogether, and the reason is kept."""

    def __init__(self, settings: LogitsSettings, progress: Progress, stack: ExitStack):
        self.settings, self.progress = settings, progress
        self.memory = SharedMemory.create(max(batch_bytes(case) for case in settings.cases))
        options = {"temperature": settings.temperature, "entropy": settings.entropy, "threads": settings.threads}
        make_worker = partial(LogitsWorker, options, self.memory, flush_bytes(settings))
        self.workers: dict[str, WorkerProcess] = {}  # of each implementation that takes part
        for names in settings.processes:
            self.workers |= dict.fromkeys(names, stack.enter_context(WorkerProcess(make_worker, settings.threads)))
        self.measurements: list[Record] = []  # by malloc, case, step and implementation; a value for each repetition
        self.gates: list[Record] = []
        self.skipped: list[Record] = []

    def run(self) -> Result:
        self.progress("the cost of a small call")
        overhead = self._ask("ours", "overhead", {}) if "ours" in self.workers else None
        for malloc in MALLOC_MODES:  # in this order: once memory is kept, it stays so
            if malloc in self.settings.malloc:
                for number, case in enumerate(self.settings.cases):
                    self._case(case, number, malloc)
        return {
            "settings": {"flush_bytes": flush_bytes(self.settings), "equal_work": self.settings.active_fraction == 1},
            "results": summarise(self.measurements, self.settings.threads),
            "gates": self.gates,
            "skipped": self.skipped,
            "overhead": overhead,
        }

    def _case(self, case: LogitsCase, number: int, malloc: str) -> None:
        title, gate = f"{malloc} malloc, {case.name}", not any(each["case"] == case.name for each in self.gates)
        self.progress(f"{title}: data")
        batch = shared_batch(self.memory, case)
        self._draw(batch, number, 0)
        if gate:
            write_truth(batch, self.settings.temperature)

        where, ready = {"malloc": malloc, "case": case.name}, []
        for worker in dict.fromkeys(self.workers.values()):
            names = [name for name, other in self.workers.items() if other is worker]
            if self._ask(names[0], "begin", where, case=case, names=names, malloc=malloc) is not None:
                ready += names
        entries: list[Record] = []
        for step, name in product(PASSES, ready):
            self.progress(f"{title}: {'checking' if gate else 'warming up'} {name}")
            entry = {**where, **asdict(case), "step": step, "implementation": name}
            red = any(skip["implementation"] == name and skip["case"] == case.name and skip["step"] == step for skip in self.skipped)
            answer = None if red else self._ask(name, "prepare", entry, name=name, step=step, gate=gate)
            if answer is not None and answer["has_pass"] and self._passed(entry, answer["verdict"]):
                sizes = {"logits_bytes": case.logits_bytes, "useful_bytes": case.useful_bytes(step), "peak_bytes": answer["peak_bytes"]}
                entries.append({**entry, **sizes, "wall_ms": [], "cpu_ms": []})

        for round_number in range(self.settings.rounds):
            if round_number:
                self._draw(batch, number, round_number)
            for entry in entries.copy():
                step, name = entry["step"], entry["implementation"]
                self.progress(f"{title}: round {round_number + 1} of {self.settings.rounds}, {step.replace('_', ' + ')}, {name}")
                answer = self._ask(name, "time", entry, name=name, step=step)
                if answer is not None and answer["right"]:
                    entry["wall_ms"].append(answer["wall_ms"])
                    entry["cpu_ms"].append(answer["cpu_ms"])
                    continue
                entries.remove(entry)  # no time for a wrong result, in whichever round it was
                if answer is not None:
                    self._skip(name, entry, "a timed repetition gave a wrong loss")
        self.measurements += entries

    def _draw(self, batch: Batch, number: int, round_number: int) -> None:
        seed = (self.settings.seed * 1000 + number) * 1000 + round_number  # others in every case and round; the same in both malloc modes
        fill(batch, temperature=self.settings.temperature, active_fraction=self.settings.active_fraction, seed=seed)

    def _passed(self, entry: Record, verdict: Record | None) -> bool:
        """Whether a pass may be timed; a verdict is kept."""
        if verdict is None:
            return True
        self.gates.append({**{key: entry[key] for key in ("case", "implementation", "step")}, **verdict})
        if not verdict["passed"]:
            errors = {key: verdict[key] for key in verdict["tolerance"] if verdict[key] is not None}
            self._skip(entry["implementation"], entry, f"differs from float64: {errors}, allowed {verdict['tolerance']}")
        return bool(verdict["passed"])

    def _ask(self, name: str, method: str, where: Record, /, **arguments: Any) -> Record | None:
        """The answer of an implementation's worker. None where the command failed, which is noted; where the process ended, all of its
        implementations are taken out."""
        if name not in self.workers:
            return None
        try:
            return self.workers[name].ask(method, **arguments)
        except WorkerDiedError as error:
            worker = self.workers[name]
            for other in [other for other, its in self.workers.items() if its is worker]:
                self._skip(other, {}, str(error))
                del self.workers[other]
        except WorkerError as error:
            self._skip(name, where, str(error))
        return None

    def _skip(self, name: str, where: Record, reason: str) -> None:
        """Note what an implementation is left out of: None stands for all cases, passes or malloc modes."""
        place = {key: where.get(key) for key in ("case", "step", "malloc")}
        self.skipped.append({"implementation": name, **place, "reason": reason})


SUITE = Suite(
    "bench",
    "Time the loss against what you would use instead, and against a copy of the same bytes. About five minutes.",
    LogitsSettings,
    run,
    print_report,
    write_figure=write_figure,
    check=check,
    # The second shape: no sequence of equal length, no vector of equal width. Without what needs ten seconds to start.
    quick={
        "shapes": ((64, 2000), (16, 5003)),
        "implementations": ("roofline", "ours", "ours_inplace", "eager"),
        "rounds": 2,
        "isolated": False,
        "cold": False,
    },
)
