"""Whether the model learnt: four conditions, each a sentence when it fails."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from grpo_fast.demo.evaluate import Quality


@dataclass(frozen=True)
class Criterion:
    name: str
    value: float
    relation: str  # "at least" or "at most"
    bound: float

    @property
    def met(self) -> bool:
        return self.value >= self.bound if self.relation == "at least" else self.value <= self.bound

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"met": self.met, "sentence": f"{self.name} is {self.value:.3f}; expected {self.relation} {self.bound:g}."}


def judge(before: Sequence[Quality], after: Sequence[Quality]) -> list[Criterion]:
    """A model with bad habits at first, and without them in the end. Both tables must hold T = 0 and T = 0.6."""
    first, last = ({quality.temperature: quality for quality in table} for table in (before, after))
    return [
        Criterion("Accuracy at T = 0.6 before training", first[0.6].accuracy, "at most", 0.55),
        Criterion("Share of endless completions at T = 0 before training", first[0.0].truncated, "at least", 1.0),
        Criterion("Accuracy at T = 0.6 after training", last[0.6].accuracy, "at least", 0.93),
        Criterion("Share of endless completions at T = 0 after training", last[0.0].truncated, "at most", 0.05),
    ]
