"""A training study whose settings are valid, and what of it is finished."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from grpo_fast.demo.options import DemoOptions
from grpo_fast.study.result_files import JSONObject

if TYPE_CHECKING:
    from grpo_fast.study.model_training import ModelTraining
    from grpo_fast.study.truncations import Variant

__all__ = ["BEFORE", "RUN_KEYS", "TrainingStudy"]

BEFORE = "before"  # label of the model before GRPO, which is evaluated too
RUN_KEYS = ("seed", "trained_at", "seconds", "curves", "table")  # of every finished run


@dataclass(frozen=True)
class TrainingStudy:
    """A training study whose settings are valid, and what of it is finished."""

    subject: DemoOptions | ModelTraining  # the demonstration's model, or a model of one's own
    variants: Mapping[str, Variant]  # by label, how each training samples
    eval_temperatures: list[float]
    seeds: int
    quick: bool
    path: Path
    measurements: JSONObject  # see `load_study`; its list "runs" grows
    result: JSONObject | None = None  # if everything is finished and only the result is there

    @property
    def labels(self) -> list[str]:
        """The runs of each seed: the model before GRPO, then one for each variant."""
        return [BEFORE, *self.variants]

    @property
    def steps(self) -> int:
        """Optimizer steps of each training."""
        return self.subject.steps if isinstance(self.subject, DemoOptions) else self.subject.config.max_steps

    def runs(self) -> list[JSONObject]:
        """Return the finished runs that are asked for, seed by seed, in the order of the labels."""
        asked = [run for run in self.measurements["runs"] if run["seed"] < self.seeds and run["trained_at"] in self.labels]
        return sorted(asked, key=lambda run: (run["seed"], self.labels.index(run["trained_at"])))

    def missing(self, seed: int) -> list[str]:
        """Return the labels of this seed's runs that are not finished."""
        if self.result is not None:
            return []
        done = {run["trained_at"] for run in self.measurements["runs"] if run["seed"] == seed}
        return [label for label in self.labels if label not in done]
