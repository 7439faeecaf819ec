"""The whole comparison of heads: cases one after the other, each contestant in a process of its own, the floor before and after them."""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from grpo_fast.benchmark.head.case import SEQUENCES, TEMPERATURE, make_cases
from grpo_fast.benchmark.head.contestants import CONTESTANTS
from grpo_fast.ops.backends import installed_version
from grpo_fast.ops.environment import available_memory, describe, load_average

__all__ = ["Settings", "run"]


@dataclass(frozen=True)
class Settings:
    """What is measured. Contestants that skip no inactive tokens are timed at full activity alone: their work is the same."""

    tokens: tuple[int, ...] = (1024, 4096)
    width: int = 896
    vocabulary: int = 151_936  # with this width: Qwen2.5-0.5B's head
    dtypes: tuple[str, ...] = ("float32",)
    active: tuple[float, ...] = (1.0, 0.6, 0.3)
    contestants: tuple[str, ...] = CONTESTANTS
    rounds: int = 2  # of the smallest number of tokens; in proportion fewer of the others, at least one
    threads: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rounds", "threads", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1.")
        for tokens in self.tokens:
            if tokens < SEQUENCES or tokens % SEQUENCES:
                raise ValueError(f"tokens is {tokens}; expected a multiple of {SEQUENCES}, the number of sequences.")
        for active in self.active:
            if not 0 < active <= 1:
                raise ValueError(f"active is {active}; expected a share above 0 and at most 1.")
        for name in self.contestants:
            if name not in CONTESTANTS:
                raise ValueError(f"contestant is {name!r}; expected one of {', '.join(CONTESTANTS)}.")
        for dtype in self.dtypes:
            if dtype not in ("float32", "bfloat16"):
                raise ValueError(f"dtype is {dtype!r}; expected float32 or bfloat16.")


SKIP_INACTIVE = ("ours",)
FOOTPRINT = {"eager": 6, "full": 2}  # of these contestants, in float32 logits of the whole batch; 1 of the others


def run(settings: Settings, report: Callable[[str], None]) -> dict[str, Any]:
    """Measure everything; the answer is what is written to the JSON file."""
    results: list[dict[str, Any]] = []
    skipped: list[dict[str, Any]] = []
    load, start = load_average(), time.monotonic()
    for tokens, dtype in itertools.product(settings.tokens, settings.dtypes):
        report(f"{tokens} tokens, {dtype}: truth in float64")
        cases = make_cases(tokens, settings.width, settings.vocabulary, getattr(torch, dtype), settings.active, settings.seed)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "case.pt"
            for active, case in zip(settings.active, cases, strict=True):
                torch.save(case, path)
                names = [name for name in settings.contestants if active == max(settings.active) or name in SKIP_INACTIVE]
                again = ["floor"] if "floor" in names and len(names) > 1 else []
                for trainable, name in itertools.product((True, False), [*names, *again]):
                    report(f"{tokens} tokens, {dtype}, {active:.0%} active, {'trainable' if trainable else 'frozen'} head: {name}")
                    entry = {"contestant": name, "tokens": tokens, "dtype": dtype, "active": active, "trainable": trainable}
                    answer = _measured(entry, path, settings)
                    (skipped if "reason" in answer else results).append({**entry, **answer})
    return {
        "kind": "head",
        "machine": {**describe(), **_versions(), "load_average": [load, load_average()]},
        "settings": {
            **asdict(settings),
            "temperature": TEMPERATURE,
            "sequences": SEQUENCES,
            "clock": "CPU time of the thread" if settings.threads == 1 else "wall time",
            "minutes": round((time.monotonic() - start) / 60, 1),
        },
        "results": _merged(results),
        "skipped": skipped,
    }


def _versions() -> dict[str, str | None]:
    return {name: installed_version(name) for name in ("liger_kernel", "cut_cross_entropy")}


def _measured(entry: dict[str, Any], path: Path, settings: Settings) -> dict[str, Any]:
    """What the contestant's process answers, or the reason why there is no time."""
    name, tokens = entry["contestant"], entry["tokens"]
    needed, available = FOOTPRINT.get(name, 1) * tokens * settings.vocabulary * 4, available_memory()
    if available is not None and needed >= available:
        return {"reason": f"needs {needed / 2**30:.0f} GiB, and {available / 2**30:.0f} are free"}
    rounds = max(1, settings.rounds * min(settings.tokens) // tokens)
    answer = _ask(name, path, entry["trainable"], rounds, settings.threads)
    if "error" in answer:
        return {"reason": answer["error"]}
    return answer if answer["right"] else {"reason": f"its result is not right: {answer['errors']}"}


def _ask(name: str, path: Path, trainable: bool, rounds: int, threads: int) -> dict[str, Any]:
    arguments = [name, str(path), str(trainable), str(rounds), str(threads)]
    done = subprocess.run(
        [sys.executable, "-m", "grpo_fast.benchmark.head.worker", *arguments], stdout=subprocess.PIPE, text=True, check=False
    )
    if not done.stdout.strip():
        return {"error": f"its process ended with {done.returncode} and no answer (out of memory?)"}
    return dict(json.loads(done.stdout))


def _merged(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry per contestant and case, the floor's two visits together, with its median and multiple of the floor."""
    cases: dict[tuple[Any, ...], dict[str, Any]] = {}
    for entry in results:
        key = tuple(entry[name] for name in ("contestant", "tokens", "dtype", "active", "trainable"))
        if key in cases:
            cases[key]["seconds"] += entry["seconds"]
        else:
            cases[key] = entry
    floors = {key[1:]: statistics.median(entry["seconds"]) for key, entry in cases.items() if key[0] == "floor"}
    for key, entry in cases.items():
        entry["median"] = statistics.median(entry["seconds"])
        full = next((floor for other, floor in floors.items() if (other[0], other[1], other[3]) == (key[1], key[2], key[4])), None)
        entry["times_floor"] = None if full is None else entry["median"] / full
    return list(cases.values())
