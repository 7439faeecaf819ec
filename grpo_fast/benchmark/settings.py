"""What a run measures. A wrong setting is refused here, before a process is started or a file is written."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from typing import Any

import torch

__all__ = ["CONTESTANTS", "DTYPES", "MALLOC_MODES", "PASSES", "Case", "Settings", "parse_shape"]

PASSES = ("forward", "forward_backward")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CONTESTANTS = ("floor", "ours", "ours_inplace", "eager", "compile", "trl")

# glibc gives every large tensor fresh pages, and takes them back when it is freed: the faults cost eager code more than its arithmetic. In
# the second mode freed memory stays in the process, as with a caching allocator, and was touched before anything is timed.
MALLOC_MODES = ("default", "touched")

# Memory that a contestant takes beside the logits, in their multiples as float32, rounded up: for the second mode, where it is touched
# beforehand, and for the estimate that refuses a run that would swap.
FOOTPRINT = {"floor": 1.5, "ours": 2.5, "ours_inplace": 0.5, "eager": 6.0, "compile": 5.0, "trl": 6.0}

_SHAPE = re.compile(r"(\d+)x(\d+)")


@dataclass(frozen=True)
class Case:
    """Logits of one size and type."""

    rows: int
    vocabulary: int
    dtype: str  # a name of DTYPES

    @property
    def name(self) -> str:
        return f"{self.rows}x{self.vocabulary} {self.dtype}"

    @property
    def batch(self) -> tuple[int, int]:
        """[B, T] of the rows: eight sequences where that divides."""
        return (8, self.rows // 8) if self.rows % 8 == 0 else (1, self.rows)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def logits_bytes(self) -> int:
        return self.rows * self.vocabulary * self.torch_dtype.itemsize

    def useful_bytes(self, step: str) -> int:
        """What has to be moved: forward reads the logits, forward + backward reads them and writes a gradient. The numbers per row (ids,
        advantages, log-probabilities: about 30 bytes) are not counted."""
        return self.logits_bytes * {"forward": 1, "forward_backward": 2}[step]


@dataclass(frozen=True)
class Settings:
    """Everything that decides what a run measures.

    Raises:
        ValueError: names the setting, its value, what was expected and the cure.
    """

    shapes: tuple[tuple[int, int], ...] = ((2048, 32000), (512, 152064))
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    temperature: float = 0.9
    threads: int = 1
    rounds: int = 5
    active_fraction: float = 1.0  # the rest of the rows is masked
    entropy: bool = False  # the others compute the entropy too, as grpo_fast always does
    contestants: tuple[str, ...] = CONTESTANTS
    malloc: tuple[str, ...] = MALLOC_MODES
    device: str = "cpu"
    seed: int = 0
    isolated: bool = True  # a process for each contestant
    cold: bool = True  # caches are flushed before each repetition
    overhead: bool = True

    def __post_init__(self) -> None:
        _require(self.device == "cpu", "device", self.device, "'cpu', the only one measured so far")
        _require(len(self.shapes) > 0, "shapes", self.shapes, "at least one ROWSxVOCABULARY, as 2048x32000")
        for rows, vocabulary in self.shapes:
            _require(rows >= 1 and vocabulary >= 2, "shape", f"{rows}x{vocabulary}", "at least one row and a vocabulary of 2")
        _names("dtype", self.dtypes, tuple(DTYPES))
        _names("contestant", self.contestants, CONTESTANTS)
        _require("floor" in self.contestants, "contestant", ", ".join(self.contestants), "'floor' among them, the unit of the others")
        _names("malloc", self.malloc, MALLOC_MODES)
        _require(0 < self.temperature < math.inf, "temperature", self.temperature, "a finite number > 0")
        _require(self.threads >= 1, "threads", self.threads, "at least 1")
        _require(self.rounds >= 1, "rounds", self.rounds, "at least 1; 5 give a usable spread")
        _require(0 < self.active_fraction <= 1, "active_fraction", self.active_fraction, "a share > 0 and <= 1; 1 = no row is masked")

    @property
    def cases(self) -> list[Case]:
        return [Case(rows, vocabulary, dtype) for rows, vocabulary in self.shapes for dtype in self.dtypes]

    @property
    def processes(self) -> list[tuple[str, ...]]:
        """Which contestants share a process: none, unless isolation was given up for a quick start."""
        return [(name,) for name in self.contestants] if self.isolated else [self.contestants]

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "shapes": [list(shape) for shape in self.shapes]}


def parse_shape(text: str) -> tuple[int, int]:
    """``"2048x32000"`` as (rows, vocabulary).

    Raises:
        ValueError: not of that form.
    """
    match = _SHAPE.fullmatch(text.strip())
    _require(match is not None, "shape", text, "ROWSxVOCABULARY, as 2048x32000")
    assert match is not None
    return int(match[1]), int(match[2])


def _names(name: str, given: tuple[str, ...], allowed: tuple[str, ...]) -> None:
    _require(len(given) > 0, name, "empty", f"at least one of {', '.join(allowed)}")
    for value in given:
        _require(value in allowed, name, value, f"one of {', '.join(allowed)}")
    _require(len(set(given)) == len(given), name, ", ".join(given), "each name once")


def _require(ok: bool, name: str, value: object, expected: str) -> None:
    if not ok:
        raise ValueError(f"{name} is {value!r}; expected {expected}.")
