"""The parent: starts a process for each contestant, makes the data, and interleaves the repetitions so that drift hits all alike."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from grpo_fast.benchmark.arena import Arena, arena_bytes
from grpo_fast.benchmark.data import Batch, batch_bytes, fill, shared_batch, write_truth
from grpo_fast.benchmark.overhead import SHAPE
from grpo_fast.benchmark.settings import FOOTPRINT, MALLOC_MODES, PASSES, Case, Settings
from grpo_fast.ops.environment import available_memory, cache_bytes

__all__ = ["Outcome", "Progress", "flush_bytes", "needed_memory", "run", "total_steps"]

Progress = Callable[[str, int], None]  # what is being done, and how many steps were finished since the last call

_BASE_OF_A_PROCESS = 400 << 20  # torch and what it imports


@dataclass
class Outcome:
    """Raw results."""

    measurements: list[dict[str, Any]] = field(default_factory=list)  # by malloc, case, step and contestant; a value for each repetition
    gates: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)  # who did not take part, where, and why
    overhead: dict[str, Any] | None = None


class ChildDiedError(RuntimeError):
    """A child process is gone; the text holds its last words."""


class Child:
    """A worker process."""

    def __init__(self, contestants: tuple[str, ...], settings: Settings, arena: Arena, flush: int):
        given = {
            "contestants": contestants,
            "temperature": settings.temperature,
            "entropy": settings.entropy,
            "threads": settings.threads,
            "descriptor": arena.descriptor,
            "size": arena.size,
            "flush_bytes": flush,
        }
        threads = str(settings.threads)
        # One compilation process: torch.compile would keep a pool of them beside what is being timed.
        environment = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        self.names = list(contestants)
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by end())
        self._process = subprocess.Popen(
            [sys.executable, "-m", "grpo_fast.benchmark.worker", json.dumps(given)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            pass_fds=[arena.descriptor],
            env={**os.environ, **environment},
        )

    def tell(self, do: str, **arguments: Any) -> None:
        """Send a command without waiting for its answer."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # answer() will find that it died
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """The answer to the oldest command.

        Raises:
            ChildDiedError: there will be none.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._log.seek(0)
            last = (self._log.read().strip().splitlines() or ["it said nothing"])[-1]
            cure = "; killed by the system, probably for lack of memory: take smaller shapes" if code == -9 else ""
            raise ChildDiedError(f"the process ended with status {code}{cure}: {last}")
        return json.loads(line)

    def end(self) -> None:
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


def flush_bytes(settings: Settings) -> int:
    """Twice the largest cache: reading and writing so much leaves nothing of the logits in it. Next to nothing for warm caches."""
    return 2 * cache_bytes() // 8 * 8 if settings.cold else 8


def total_steps(settings: Settings) -> int:
    """How many steps the progress of a run has: a gate and the rounds of every contestant, case and malloc mode."""
    return len(settings.malloc) * len(settings.cases) * len(settings.contestants) * (1 + settings.rounds)


def needed_memory(settings: Settings) -> int:
    """Bytes a run holds at its worst moment, by estimate."""
    largest = max(case.rows * case.vocabulary * 4 for case in settings.cases)  # temporaries are float32 whatever the logits are
    shared = flush_bytes(settings) + max(batch_bytes(case) for case in settings.cases)
    footprints = [max(FOOTPRINT[name] for name in process) for process in settings.processes]
    kept = sum(footprints) if "touched" in settings.malloc else max(footprints)
    return int(shared + (len(footprints) + kept) * largest + (1 + len(footprints)) * _BASE_OF_A_PROCESS)


def run(settings: Settings, progress: Progress) -> Outcome:
    """Measure everything the settings ask for.

    Raises:
        ValueError: there is not enough memory; says how much is missing, and the cure.
    """
    needed, available = needed_memory(settings), available_memory()
    if available is not None and needed > available:
        raise ValueError(
            f"shapes need about {needed / 2**30:.1f} GiB, {available / 2**30:.1f} GiB are free; a run that swaps measures the disk. "
            "Take smaller shapes (--shape 512x32000), fewer contestants, or --malloc default, which holds less."
        )
    torch.zeros(needed, dtype=torch.uint8)  # a virtual machine gets pages from its host: not at the cost of who touches them first
    flush = flush_bytes(settings)
    arena = Arena.create(arena_bytes([flush // 8], torch.int64) + max(batch_bytes(case) for case in settings.cases))
    threads_before = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        with _children(settings, arena, flush) as children:
            return _Race(settings, arena, flush, children, progress).run()
    finally:
        torch.set_num_threads(threads_before)


@contextlib.contextmanager
def _children(settings: Settings, arena: Arena, flush: int) -> Iterator[list[Child]]:
    children: list[Child] = []
    try:
        for contestants in settings.processes:
            children.append(Child(contestants, settings, arena, flush))
        yield children
    finally:
        for child in children:
            child.end()


class _Race:
    """The order of events. A contestant that fails is taken out, of a pass, a case or altogether, and the reason is kept."""

    def __init__(self, settings: Settings, arena: Arena, flush: int, children: list[Child], progress: Progress):
        self.settings, self.arena, self.flush, self.children, self.progress = settings, arena, flush, children, progress
        self.outcome = Outcome()
        self.passed: dict[tuple[Case, str], list[str]] = {}  # the passes that the gate let through, by case and contestant

    def run(self) -> Outcome:
        self.progress(f"starting {len(self.children)} processes", 0)
        for child in self.children:
            child.tell("start")
        for child in self.children:
            answer = self._answer(child)
            for name, reason in answer.get("unavailable", dict.fromkeys(child.names, answer.get("error", ""))).items():
                self._skip(name, reason)
                child.names.remove(name)
        if self.settings.overhead:
            self._overhead()
        for malloc in MALLOC_MODES:  # in this order: once memory is kept, it stays so
            if malloc in self.settings.malloc and (malloc == "default" or self._keep_memory()):
                for number, case in enumerate(self.settings.cases):
                    self._case(case, number, malloc)
        return self.outcome

    def _overhead(self) -> None:
        for child in self.children:
            if "ours" in child.names:
                self.progress("what a small call costs", 0)
                answer = self._ask(child, "overhead", shape=list(SHAPE))
                self.outcome.overhead = None if "error" in answer else answer

    def _keep_memory(self) -> bool:
        for child in self.children:
            error = self._ask(child, "keep_memory").get("error") if child.names else None
            if error is not None and child.names:
                for name in child.names:
                    self._skip(name, error, malloc="touched")
                return False
        return True

    def _case(self, case: Case, number: int, malloc: str) -> None:
        title = f"{malloc} malloc, {case.name}"
        first_time = not any(known == case for known, _ in self.passed)
        self.progress(f"{title}: data", 0)
        self.arena.rewind()
        self.arena.take([self.flush // 8], torch.int64)
        batch = shared_batch(self.arena, case)
        _draw(batch, self.settings, number, 0)
        if first_time:
            write_truth(batch, self.settings.temperature)

        entries: dict[tuple[str, str], dict[str, Any]] = {}
        for child in self.children:
            if child.names:
                self._ask(child, "begin", case=asdict(case))
            for name in list(child.names):
                self.progress(f"{title}: {'checking' if first_time else 'warming up'} {name}", 0)
                if first_time:
                    self.passed[case, name] = self._gate(case, child, name)
                for step in self.passed.get((case, name), []):
                    answer = self._ask(child, "warm_up", contestant=name, step=step)
                    if "error" in answer:
                        self._skip(name, answer["error"], case=case, step=step, malloc=malloc)
                    else:
                        entries[name, step] = _entry(case, malloc, step, name, answer["peak_bytes"])
        self.progress(title, len(self.settings.contestants))

        for round_number in range(self.settings.rounds):
            if round_number:
                _draw(batch, self.settings, number, round_number)
            for step in PASSES:
                for child in self.children:
                    for name in child.names.copy():
                        if (name, step) in entries:
                            self.progress(f"{title}: round {round_number + 1}, {step.replace('_', ' + ')}, {name}", 0)
                            self._repetition(case, malloc, step, child, name, entries)
            self.progress(title, len(self.settings.contestants))
        self.outcome.measurements.extend(entries.values())

    def _gate(self, case: Case, child: Child, name: str) -> list[str]:
        """Which passes of a contestant may be timed."""
        answer = self._ask(child, "gate", contestant=name)
        if "error" in answer:
            self._skip(name, answer["error"], case=case)
            return []
        passed = []
        for step, verdict in answer["verdicts"].items():
            self.outcome.gates.append({"case": case.name, "contestant": name, "step": step, **verdict})
            if verdict["passed"]:
                passed.append(step)
            else:
                errors = {key: verdict[key] for key in ("logprobs", "entropy", "loss", "gradient") if verdict[key] is not None}
                self._skip(name, f"differs from float64: {errors}, allowed {verdict['tolerance']}", case=case, step=step)
        return passed

    def _repetition(
        self, case: Case, malloc: str, step: str, child: Child, name: str, entries: dict[tuple[str, str], dict[str, Any]]
    ) -> None:
        answer = self._ask(child, "run", contestant=name, step=step)
        if "error" in answer or not answer["right"]:
            del entries[name, step]  # no number for a wrong result, in whichever round it was
            self._skip(name, answer.get("error", "a timed repetition gave a wrong loss"), case=case, step=step, malloc=malloc)
            return
        for key in ("wall_ms", "cpu_ms"):
            entries[name, step][key].append(answer[key])

    def _ask(self, child: Child, do: str, **arguments: Any) -> dict[str, Any]:
        child.tell(do, **arguments)
        return self._answer(child)

    def _answer(self, child: Child) -> dict[str, Any]:
        """The child's answer; where it died, its contestants are out and the answer is {"error": ...}."""
        try:
            return child.answer()
        except ChildDiedError as error:
            for name in child.names:
                self._skip(name, str(error))
            child.names.clear()
            return {"error": str(error)}

    def _skip(self, name: str, reason: str, *, case: Case | None = None, step: str | None = None, malloc: str | None = None) -> None:
        """Write down who is left out, and of what: None stands for all of them."""
        where = {"case": case.name if case else None, "step": step, "malloc": malloc}
        self.outcome.skipped.append({"contestant": name, **where, "reason": reason})


def _draw(batch: Batch, settings: Settings, number: int, round_number: int) -> None:
    seed = (settings.seed * 1000 + number) * 1000 + round_number  # other numbers in every case and round; the same in both malloc modes
    fill(batch, temperature=settings.temperature, active_fraction=settings.active_fraction, seed=seed)


def _entry(case: Case, malloc: str, step: str, name: str, peak_bytes: int | None) -> dict[str, Any]:
    return {
        "malloc": malloc,
        "case": case.name,
        **asdict(case),
        "step": step,
        "contestant": name,
        "logits_bytes": case.logits_bytes,
        "useful_bytes": case.useful_bytes(step),
        "peak_bytes": peak_bytes,
        "wall_ms": [],
        "cpu_ms": [],
    }
