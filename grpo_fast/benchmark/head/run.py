"""The whole comparison of heads: cases one after the other, each contestant in a process of its own, the floor before and after them."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from grpo_fast.backends import installed_version
from grpo_fast.benchmark.head.case import SEQUENCES, TEMPERATURE, make_case
from grpo_fast.benchmark.head.contestants import CONTESTANTS
from grpo_fast.benchmark.machine import available_memory, describe, load_average

__all__ = ["Settings", "run"]


@dataclass(frozen=True)
class Settings:
    """What is measured. Contestants that skip no tokens without an advantage are timed at full activity alone: their work is the same."""

    tokens: tuple[int, ...] = (1024, 4096)
    width: int = 896
    vocabulary: int = 151_936  # with this width: Qwen2.5-0.5B's head
    dtypes: tuple[str, ...] = ("float32",)
    active: tuple[float, ...] = (1.0, 0.625, 0.25)
    contestants: tuple[str, ...] = CONTESTANTS
    rounds: int = 3
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


SKIP_DEAD_TOKENS = ("ours",)
FOOTPRINT = {"eager": 6, "full": 2}  # of these contestants, in float32 logits of the whole batch


def run(settings: Settings, report: Callable[[str], None]) -> dict[str, Any]:
    """Measure everything; the answer is what is written to the JSON file."""
    results, skipped, load = [], [], load_average()
    for tokens in settings.tokens:
        for dtype in settings.dtypes:
            for active in settings.active:
                names = [name for name in settings.contestants if active == max(settings.active) or name in SKIP_DEAD_TOKENS]
                if not names:
                    continue
                report(f"{tokens} tokens, {dtype}, {active:.0%} active: truth in float64")
                with tempfile.TemporaryDirectory() as folder:
                    path = Path(folder) / "case.pt"
                    torch.save(make_case(tokens, settings.width, settings.vocabulary, getattr(torch, dtype), active, settings.seed), path)
                    for trainable in (True, False):
                        again = ["floor"] if "floor" in names and len(names) > 1 else []
                        for name in [*names, *again]:
                            head = "trainable" if trainable else "frozen"
                            report(f"{tokens} tokens, {dtype}, {active:.0%} active, {head} head: {name}")
                            needed = FOOTPRINT.get(name, 1) * tokens * settings.vocabulary * 4
                            fits = needed < (available_memory() or needed + 1)
                            answer = _ask(name, path, trainable, settings) if fits else {"error": f"needs {needed / 2**30:.0f} GiB"}
                            entry = {"contestant": name, "tokens": tokens, "dtype": dtype, "active": active, "trainable": trainable}
                            if "error" in answer or not answer["right"]:
                                reason = answer.get("error") or f"its result is not right: {answer['errors']}"
                                skipped.append({**entry, "reason": reason})
                            else:
                                results.append({**entry, **answer})
    return {
        "kind": "head",
        "machine": {**describe(), "liger_kernel": installed_version("liger_kernel"), "load_average": [load, load_average()]},
        "settings": {**asdict(settings), "temperature": TEMPERATURE, "sequences": SEQUENCES},
        "results": _merged(results),
        "skipped": skipped,
    }


def _ask(name: str, path: Path, trainable: bool, settings: Settings) -> dict[str, Any]:
    arguments = [name, str(path), str(trainable), str(settings.rounds), str(settings.threads)]
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
