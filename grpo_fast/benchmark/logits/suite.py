"""The run: a worker process for each implementation, all alive at once, their repetitions interleaved so that drift affects all alike."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from grpo_fast.benchmark.harness.gate import UnavailableError
from grpo_fast.benchmark.harness.measure import Measurement, keep_freed_memory, measure, trim
from grpo_fast.benchmark.harness.settings import DTYPES
from grpo_fast.benchmark.harness.shared_memory import SharedMemory, aligned_bytes
from grpo_fast.benchmark.harness.suite import Progress, Result, Suite
from grpo_fast.benchmark.harness.worker import WorkerDiedError, WorkerError, WorkerProcess
from grpo_fast.benchmark.logits import overhead
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


def repetition(implementation: Implementation, step: str, shared: Batch, storage: Tensor, threads: int, **options: Any) -> Any:
    """Run a pass once on the shared batch, whose logits are copied into ``storage`` and given as the output of a model that requires a
    gradient. ``options``: those of `measure`, which returns a Measurement[Outputs].
    """
    with torch.no_grad():
        storage.copy_(shared.logits)
    logits = _ModelOutput.apply(torch.zeros((), requires_grad=True), [storage])
    batch = Batch(**{**vars(shared), "logits": logits})
    function = implementation.step(step)
    assert function is not None
    return measure(lambda: function(batch), threads, **options)


class LogitsWorker:
    """The implementations of a process, and the case that is being measured."""

    def __init__(self, implementations: list[str], options: dict[str, Any], descriptor: int, size: int, flush_bytes: int):
        self.names, self.options = implementations, options
        self.memory = SharedMemory(descriptor, size)
        self.flush = self.memory.allocate([flush_bytes // 8], torch.int64).zero_()
        self.keeps_memory = False
        self.implementations: dict[str, Implementation] = {}

    def start(self) -> dict[str, Any]:
        """Make the implementations; the answer names those that cannot take part, and why."""
        unavailable = {}
        for name in self.names:
            try:
                self.implementations[name] = make(name, **self.options)
            except UnavailableError as error:
                unavailable[name] = str(error)
        gc.collect()
        gc.freeze()  # what was imported stays: the collection before each repetition need not look at it
        return {"unavailable": unavailable}

    def keep_memory(self) -> dict[str, Any]:
        """Switch to the malloc mode "touched"; there is no way back."""
        keep_freed_memory()
        self.keeps_memory = True
        return {}

    def begin(self, case: dict[str, Any]) -> dict[str, Any]:
        """Take up a case, whose data lie in shared memory behind the flush buffer; free the memory of the last one."""
        self.storage = torch.empty(0)
        gc.collect()
        trim()
        self.case = LogitsCase(**case)
        self.memory.rewind()
        self.memory.allocate(self.flush.shape, torch.int64)
        self.shared = shared_batch(self.memory, self.case)
        self.storage = torch.zeros_like(self.shared.logits)
        if self.keeps_memory:  # one free block larger than all that will be asked for: what a warm-up leaves behind is in pieces
            words = self.case.rows * self.case.vocabulary * max(FOOTPRINT[name] for name in self.implementations)
            torch.zeros(int(words), dtype=torch.float32)
        return {}

    def gate(self, name: str) -> dict[str, Any]:
        """Compare every pass of an implementation with float64."""
        verdicts = {}
        for step in PASSES:
            if self.implementations[name].step(step) is not None:
                outputs = self._measure(name, step).result
                verdict = compare_with_truth(outputs, self.shared, expected_loss(self.shared), self._limits(name))
                errors = {"passed": verdict.passed, **verdict.errors_for_json()}
                verdicts[step] = {**errors, "gradient_rows": self.shared.gate_rows.numel(), "tolerance": verdict.limits}
        return {"verdicts": verdicts}

    def warm_up(self, name: str, step: str) -> dict[str, Any]:
        """One repetition without a time. Its peak of memory is that of a process which holds nothing back from earlier calls."""
        measured = self._measure(name, step, return_freed_memory=not self.keeps_memory)
        return {"peak_bytes": None if self.keeps_memory else measured.peak_bytes}

    def time(self, name: str, step: str) -> dict[str, Any]:
        """One timed repetition, whose loss is held to one made from float32 log-probabilities."""
        measured = self._measure(name, step)
        loss, limit = measured.result.loss, self._limits(name)["loss"] + 2e-5
        right = loss is None or abs(float(loss) - expected_loss(self.shared)) <= limit
        return {"wall_ms": measured.wall_ms, "cpu_ms": measured.cpu_ms, "right": right}

    def overhead(self) -> dict[str, Any]:
        return overhead.measure()

    def _limits(self, name: str) -> dict[str, float]:
        return tolerance(DTYPES[self.case.dtype], self.implementations[name].arithmetic)

    def _measure(self, name: str, step: str, *, return_freed_memory: bool = False) -> Measurement[Outputs]:
        options = {"flush": self.flush, "return_freed_memory": return_freed_memory}
        measured: Measurement[Outputs] = repetition(
            self.implementations[name], step, self.shared, self.storage, self.options["threads"], **options
        )
        return measured


# In the parent ----------------------------------------------------------------------------------------------------------------------------


def flush_bytes(settings: LogitsSettings) -> int:
    """Twice the largest cache: reading and writing so much leaves nothing of the logits in it. Next to nothing for warm caches."""
    return 2 * cache_bytes() // 8 * 8 if settings.cold else 8


def needed_memory(settings: LogitsSettings) -> int:
    """Bytes a run holds at its worst moment, by estimate."""
    largest = max(case.rows * case.vocabulary * 4 for case in settings.cases)  # temporaries are float32 whatever the logits are
    shared = flush_bytes(settings) + max(batch_bytes(case) for case in settings.cases)
    footprints = [max(FOOTPRINT[name] for name in process) for process in settings.processes]
    kept = sum(footprints) if "touched" in settings.malloc else max(footprints)
    return int(shared + (len(footprints) + kept) * largest + (1 + len(footprints)) * _BYTES_OF_A_PROCESS)


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
    """The order of events. An implementation that fails is taken out, of a pass, a case or altogether, and the reason is kept."""

    def __init__(self, settings: LogitsSettings, progress: Progress, stack: ExitStack):
        self.settings, self.progress = settings, progress
        self.flush = flush_bytes(settings)
        size = aligned_bytes([self.flush // 8], torch.int64) + max(batch_bytes(case) for case in settings.cases)
        self.memory = SharedMemory.create(size)
        options = {"temperature": settings.temperature, "entropy": settings.entropy, "threads": settings.threads}
        given = {"options": options, "descriptor": self.memory.descriptor, "size": size, "flush_bytes": self.flush}
        self.workers: dict[str, WorkerProcess] = {}  # of each implementation that takes part
        for names in settings.processes:
            target, arguments = f"{__name__}:{LogitsWorker.__name__}", {"implementations": names, **given}
            worker = WorkerProcess(target, settings.threads, arguments, pass_fds=(self.memory.descriptor,))
            self.workers |= dict.fromkeys(names, stack.enter_context(worker))
        self.passed: dict[tuple[LogitsCase, str], list[str]] = {}  # the passes that the gate let through, by case and implementation
        self.measurements: list[dict[str, Any]] = []  # by malloc, case, step and implementation; a value for each repetition
        self.gates: list[dict[str, Any]] = []
        self.skipped: list[dict[str, Any]] = []

    def run(self) -> Result:
        self.progress("starting the worker processes")
        started = list(dict.fromkeys(self.workers.values()))
        for worker in started:
            worker.send("start")
        for worker in started:
            names = self._names(worker)
            answer = self._answer(worker, affects=names) or {"unavailable": dict.fromkeys(names)}
            for name, reason in answer["unavailable"].items():
                if reason is not None:
                    self._skip(name, reason)
                self.workers.pop(name, None)
        price = self._answer(self.workers["ours"], "overhead") if "ours" in self.workers else None
        for malloc in MALLOC_MODES:  # in this order: once memory is kept, it stays so
            if malloc in self.settings.malloc and (malloc == "default" or self._keep_memory()):
                for number, case in enumerate(self.settings.cases):
                    self._case(case, number, malloc)
        return {
            "settings": {"flush_bytes": self.flush, "equal_work": self.settings.active_fraction == 1},
            "results": summarise(self.measurements, self.settings.threads),
            "gates": self.gates,
            "skipped": self.skipped,
            "overhead": price,
        }

    def _keep_memory(self) -> bool:
        where = {"malloc": "touched"}
        workers = list(dict.fromkeys(self.workers.values()))
        return all(self._answer(each, "keep_memory", affects=self._names(each), where=where) is not None for each in workers)

    def _case(self, case: LogitsCase, number: int, malloc: str) -> None:
        title = f"{malloc} malloc, {case.name}"
        first_time = not any(known == case for known, _ in self.passed)
        self.progress(f"{title}: data")
        self.memory.rewind()
        self.memory.allocate([self.flush // 8], torch.int64)
        batch = shared_batch(self.memory, case)
        self._draw(batch, number, 0)
        if first_time:
            write_truth(batch, self.settings.temperature)

        entries: dict[tuple[str, str], dict[str, Any]] = {}
        for worker in dict.fromkeys(self.workers.values()):
            self._answer(worker, "begin", case=asdict(case))
            for name in self._names(worker):
                self.progress(f"{title}: {'checking' if first_time else 'warming up'} {name}")
                if first_time:
                    self.passed[case, name] = self._gate(case, worker, name)
                for step in self.passed.get((case, name), []):
                    where = {"case": case.name, "step": step, "malloc": malloc}
                    answer = self._answer(worker, "warm_up", affects=[name], where=where, name=name, step=step)
                    if answer is not None:
                        entries[step, name] = _entry(case, where, name, answer["peak_bytes"])

        for round_number in range(self.settings.rounds):
            if round_number:
                self._draw(batch, number, round_number)
            for step, name in sorted(entries, key=lambda key: PASSES.index(key[0])):
                if name in self.workers:
                    self.progress(f"{title}: round {round_number + 1} of {self.settings.rounds}, {step.replace('_', ' + ')}, {name}")
                    self._time(entries, step, name)
        self.measurements.extend(entry for entry in entries.values() if entry["wall_ms"])

    def _draw(self, batch: Batch, number: int, round_number: int) -> None:
        seed = (self.settings.seed * 1000 + number) * 1000 + round_number  # others in every case and round; the same in both malloc modes
        fill(batch, temperature=self.settings.temperature, active_fraction=self.settings.active_fraction, seed=seed)

    def _gate(self, case: LogitsCase, worker: WorkerProcess, name: str) -> list[str]:
        """Which passes of an implementation may be timed."""
        passed = []
        answer = self._answer(worker, "gate", affects=[name], where={"case": case.name}, name=name) or {"verdicts": {}}
        for step, verdict in answer["verdicts"].items():
            self.gates.append({"case": case.name, "implementation": name, "step": step, **verdict})
            if verdict["passed"]:
                passed.append(step)
            else:
                errors = {key: verdict[key] for key in verdict["tolerance"] if verdict[key] is not None}
                self._skip(name, f"differs from float64: {errors}, allowed {verdict['tolerance']}", case=case.name, step=step)
        return passed

    def _time(self, entries: dict[tuple[str, str], dict[str, Any]], step: str, name: str) -> None:
        entry = entries[step, name]
        where = {key: entry[key] for key in ("case", "step", "malloc")}
        answer = self._answer(self.workers[name], "time", affects=[name], where=where, name=name, step=step)
        if answer is not None and not answer["right"]:
            self._skip(name, "a timed repetition gave a wrong loss", **where)
        if answer is None or not answer["right"]:
            del entries[step, name]  # no time for a wrong result, in whichever round it was
            return
        for key in ("wall_ms", "cpu_ms"):
            entry[key].append(answer[key])

    def _names(self, worker: WorkerProcess) -> list[str]:
        return [name for name, other in self.workers.items() if other is worker]

    def _answer(
        self, worker: WorkerProcess, method: str = "", *, affects: Sequence[str] = (), where: dict[str, str] | None = None, **arguments: Any
    ) -> dict[str, Any] | None:
        """Send a command, if one is given, and return the answer. Where the command failed, the answer is None and the implementations that
        it ``affects`` are skipped; where the process ended, all of its implementations are taken out."""
        try:
            return worker.ask(method, **arguments) if method else worker.receive()
        except WorkerDiedError as error:
            for name in self._names(worker):
                self._skip(name, str(error))
                del self.workers[name]
        except WorkerError as error:
            for name in affects:
                self._skip(name, str(error), **(where or {}))
        return None

    def _skip(self, name: str, reason: str, *, case: str | None = None, step: str | None = None, malloc: str | None = None) -> None:
        """Note what an implementation is left out of: None stands for all cases, passes or malloc modes."""
        self.skipped.append({"implementation": name, "case": case, "step": step, "malloc": malloc, "reason": reason})


def _entry(case: LogitsCase, where: dict[str, str], name: str, peak_bytes: int | None) -> dict[str, Any]:
    sizes = {"logits_bytes": case.logits_bytes, "useful_bytes": case.useful_bytes(where["step"]), "peak_bytes": peak_bytes}
    return {**where, **asdict(case), "implementation": name, **sizes, "wall_ms": [], "cpu_ms": []}


SUITE = Suite(
    name="bench",
    settings=LogitsSettings,
    run=run,
    check=check,
    print_report=print_report,
    write_figure=write_figure,
    # The second shape: no sequence of equal length, no vector of equal width. Without what needs ten seconds to start.
    quick={
        "shapes": ((64, 2000), (16, 5003)),
        "implementations": ("roofline", "ours", "ours_inplace", "eager"),
        "rounds": 2,
        "isolated": False,
        "cold": False,
    },
)
