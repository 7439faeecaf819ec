"""Timing on a GPU, and the result file, which is written after every case so that a failure loses one case only."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from model import predicted

from grpo_fast.utils.files import write_atomically

KIND = "gpu"  # of the JSON: `grpo-fast bench --plot` draws it by this
SHARE_OF_MEMORY = 0.9  # of what is free, that a case may be expected to take
AHEAD = 4_000_000  # cycles, about 2 ms: the device sleeps while a call is enqueued, so that its time is the device's and not Python's
NOT_IMPORTED: dict[str, str] = {}  # module -> why; it is in the JSON


def imported(module: str, name: str) -> Any:
    """The function, or None where it cannot be imported, for whatever reason."""
    try:
        return getattr(__import__(module, fromlist=[name]), name)
    except Exception as error:
        NOT_IMPORTED[module] = f"{type(error).__name__}: {str(error)[:300]}"
        return None


class Timer:
    """Median and spread of a call in milliseconds, caches flushed before each."""

    def __init__(self, device: str, repetitions: int, seconds: float = 1.5):
        self.device, self.repetitions, self.seconds = device, repetitions, seconds
        size = 256 << 20 if device == "cuda" else 1 << 20
        self.flush = torch.empty(size, dtype=torch.uint8, device=device)
        self.clean = torch.zeros(size // 4, dtype=torch.float32, device=device)

    def empty_caches(self) -> None:
        """Fill the caches with lines of which none must be written back.

        The write evicts what is cached, but leaves as many modified lines as the cache holds, which the timed call would evict and so
        write to memory. The read of another buffer evicts those before the call.
        """
        self.flush.zero_()
        self.clean.sum()

    def once(self, call: Callable[..., Any], prepare: Callable[[], Any]) -> float:
        given = prepare()
        if self.device != "cuda":
            self.empty_caches()
            start = time.perf_counter()
            call(given)
            return (time.perf_counter() - start) * 1e3
        torch.cuda._sleep(AHEAD)
        self.empty_caches()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call(given)
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))

    def __call__(self, call: Callable[..., Any], prepare: Callable[[], Any] = lambda: None) -> dict[str, Any]:
        """call(prepare()), of which only the call is timed."""
        return self.in_turn((call, prepare))[0]

    def in_turn(self, *cases: tuple[Callable[..., Any], Callable[[], Any]]) -> list[dict[str, Any]]:
        """Time several in turn, repetition by repetition, so that a change of the clocks affects all."""
        peaks: list[int | None] = []
        for call, prepare in cases:
            for _ in range(2):
                call(prepare())
            peaks.append(self._peak(call, prepare))
        first = sum(self.once(*case) for case in cases)
        count = max(5, min(self.repetitions, int(self.seconds * 1e3 / max(first, 1e-3)))) if self.repetitions > 5 else self.repetitions
        rounds = [[self.once(*case) for case in cases] for _ in range(count)]
        found = []
        for times, peak in zip(map(sorted, zip(*rounds, strict=True)), peaks, strict=True):
            quarter = len(times) // 4
            spread = {"quartiles": [times[quarter], times[-1 - quarter]], "least": times[0], "repetitions": count}
            found.append({"ms": statistics.median(times), **spread, "peak_bytes": peak})
        return found

    def _peak(self, call: Callable[..., Any], prepare: Callable[[], Any]) -> int | None:
        """Bytes that the call takes beside what is there; None on the CPU."""
        if self.device != "cuda":
            return None
        given = prepare()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call(given)
        return torch.cuda.max_memory_allocated() - before


def machine(device: str) -> dict[str, Any]:
    versions: dict[str, str | None] = {}
    for name in ("torch", "triton", "trl", "liger-kernel", "verl", "quack-kernels"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    found: dict[str, Any] = {"device": device, "versions": versions, "date": time.strftime("%Y-%m-%d")}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"device": properties.name, "bytes": properties.total_memory, "multiprocessors": properties.multi_processor_count}
    return found


def clocks() -> dict[str, float] | None:
    """Clock, temperature and power; None where the driver does not report them. nvidia-smi would take longer than most cases."""
    try:
        return {"mhz": torch.cuda.clock_rate(), "celsius": torch.cuda.temperature(), "watts": torch.cuda.power_draw() / 1e3}
    except Exception:  # no such library, no such sensor: each has its own error
        return None


def measured_here(output: Path, here: dict[str, Any]) -> dict[str, Any]:
    """What is in the file; a file of another machine, or of other libraries, is set aside."""
    found: dict[str, Any] = json.loads(output.read_text()) if output.exists() else {}
    there = found.get("machine", {})
    if found and any(there.get(name) != here[name] for name in ("device", "versions")):
        aside = output.with_name(f"{output.stem}_{re.sub(r'[^a-z0-9]+', '_', str(there.get('device')).lower())}{output.suffix}")
        print(f"{output} was measured on {there.get('device')} with {there.get('versions')}: it is now {aside}")
        output.replace(aside)
        return {}
    return found


class Results:
    """The entries of one part, each written to the file at once: a lost machine loses one case.

    The other parts of the file stay, where the same machine with the same libraries measured them; else the file is set aside. `built_from`
    has what each part was built from, a hash of bench/gpu.sh. A part that was built from the same keeps what was measured and goes on
    with the rest, unless the environment has AGAIN.
    """

    def __init__(self, output: Path, part: str, device: str):
        self.output, self.part = output, part
        here = machine(device)
        found = measured_here(output, here)
        sources = os.environ.get("GRPO_FAST_SOURCES")
        goes_on = bool(sources) and found.get("built_from", {}).get(part) == sources and not os.environ.get("AGAIN")
        kept = [entry for entry in found.get(part, []) if "error" not in entry and "skipped" not in entry] if goes_on else []
        self.whole = found | {"kind": KIND, "machine": here, part: kept}
        self.whole["built_from"] = found.get("built_from", {}) | {part: sources}
        self.earlier = list(kept)

    def has(self, entry: dict[str, Any]) -> bool:
        """Whether an earlier run of this part measured the case with these fields."""
        return any(all(each.get(name) == value for name, value in entry.items()) for each in self.earlier)

    def add(self, entry: dict[str, Any]) -> dict[str, Any]:
        entry = entry | predicted(entry, str(self.whole["machine"]["device"]))
        self.whole[self.part].append(entry)
        self.whole["not_imported"] = self.whole.get("not_imported", {}) | NOT_IMPORTED
        write(self.output, self.whole)
        hidden = ("trace", "quartiles", "clocks", "work")
        print(*(f"{k}={v:.3f}" if isinstance(v, float) else f"{k}={v}" for k, v in entry.items() if k not in hidden))
        return entry


def write(output: Path, whole: dict[str, Any]) -> None:
    write_atomically(output, lambda partial: partial.write_text(json.dumps(whole, indent=1)))


def record_done(output: Path, step: str, device: str, sources: str) -> None:
    """Note in the result file that a step ended without a failure, and from which sources."""
    here = machine(device)
    whole = measured_here(output, here) | {"kind": KIND, "machine": here}
    whole["done"] = whole.get("done", {}) | {step: sources}
    write(output, whole)


class DeviceLostError(Exception):
    """After this nothing can be measured in this process."""


def run_case(entry: dict[str, Any], work: Callable[[], dict[str, Any]], needed: float, device: str, deadline: float) -> dict[str, Any]:
    """entry with the work's results, or with why there are none. needed: bytes that it takes beside what is allocated."""
    if time.monotonic() > deadline:
        return {**entry, "skipped": "the time budget is spent"}
    before = None
    try:
        if device == "cuda":
            torch.cuda.empty_cache()
            free = torch.cuda.mem_get_info()[0] * SHARE_OF_MEMORY
            if needed > free:
                return {**entry, "skipped": f"takes about {needed / 2**30:.0f} GiB of the {free / 2**30:.0f} GiB that are free"}
            before = clocks()
        found = work()
    except Exception as error:  # one failure must not lose the rest
        found = {"error": f"{type(error).__name__}: {str(error)[:500]}", "trace": traceback.format_exc()[-1500:]}
    return {**entry, **found, "clocks": [before, clocks() if device == "cuda" else None]}


def check_device(device: str) -> None:
    """Raises where a kernel has broken the context: all that follows would fail by its error."""
    if device == "cuda":
        try:
            torch.cuda.synchronize()
        except Exception as error:
            raise DeviceLostError(f"the device is lost to this process, and the rest of this part with it: {error}") from error
