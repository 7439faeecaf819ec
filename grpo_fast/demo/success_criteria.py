"""Whether the demonstration was successful: four conditions on its evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from grpo_fast.demo.evaluate import SamplingQuality

__all__ = ["Criterion", "success_criteria"]


@dataclass(frozen=True)
class Criterion:
    """A bound on one number of an evaluation."""

    name: str
    value: float
    relation: Literal["at least", "at most"]
    bound: float

    @property
    def met(self) -> bool:
        return self.value >= self.bound if self.relation == "at least" else self.value <= self.bound

    def as_dict(self) -> dict[str, str | float | bool]:
        """Return the fields, ``met``, and a ``sentence`` that names value and bound."""
        return asdict(self) | {"met": self.met, "sentence": f"{self.name} is {self.value:.3f}; expected {self.relation} {self.bound:g}."}


def success_criteria(before: Sequence[SamplingQuality], after: Sequence[SamplingQuality]) -> list[Criterion]:
    """Check that the model has its bad habits before GRPO and has lost them after it.

    Args:
        before: evaluations before GRPO, at T = 0 and T = 0.6 among others.
        after: evaluations after GRPO, at the same temperatures.
    """
    first, last = ({quality.temperature: quality for quality in table} for table in (before, after))
    return [
        Criterion("Accuracy at T = 0.6 before training", first[0.6].accuracy, "at most", 0.55),
        Criterion("Share of endless completions at T = 0 before training", first[0.0].truncated, "at least", 1.0),
        Criterion("Accuracy at T = 0.6 after training", last[0.6].accuracy, "at least", 0.93),
        Criterion("Share of endless completions at T = 0 after training", last[0.0].truncated, "at most", 0.05),
    ]
