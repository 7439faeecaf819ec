"""What ``grpo-fast study training`` is asked for, checked, and what of it is there already."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from grpo_fast.demo.run import Options
from grpo_fast.ops.environment import describe
from grpo_fast.study.options import check_count, sampling_temperatures, training_temperatures
from grpo_fast.study.result_files import begun, made_with, made_with_others
from grpo_fast.trainer.run_settings import parse_overrides
from grpo_fast.utils.files import check_output

__all__ = ["BEFORE", "CURVES", "Prepared", "TrainingOptions", "prepare"]

BEFORE = "before"  # the warm start itself
RUN = ("seed", "trained_at", "seconds", "curves", "table")  # what every run says
CURVES = {  # its curves by name -> key in the trainer's log
    "accuracy": "rewards/accuracy_reward/mean",
    "entropy": "entropy",
    "zero_std": "frac_reward_zero_std",
    "distinct": "completions/distinct",
    "temperature": "temperature",
}
QUICK = {"seeds": 1, "steps": 3, "warm_start_steps": 10, "prompts": 4, "evaluation_prompts": 8}


@dataclass
class TrainingOptions:
    """The demonstration's model and task; see ``grpo-fast demo``.

    Args:
        temperatures: to train at: numbers above 0, and schedules that go on a straight line, as in '0.6->1.4'.
        eval_temperatures: to evaluate each at; 0 is greedy decoding.
        seeds: how many, from 0 on; each has one warm start for all temperatures.
        steps: of GRPO.
        warm_start_steps: of imitation before GRPO.
        prompts: per step.
        group_size: completions per prompt.
        learning_rate: of GRPO.
        loss_type: which member of the family.
        evaluation_prompts: held-out questions of each evaluation.
        output: the result as JSON, which also holds what is finished; table and figure take the same name with .csv and .png.
        quick: one seed and three steps, to see whether it runs, from the beginning each time; its figures mean nothing.
    """

    temperatures: list[str] = field(default_factory=lambda: ["0.2", "0.6", "1.0", "1.4", "0.6->1.4"])
    eval_temperatures: list[str] = field(default_factory=lambda: ["0", "0.2", "0.6", "1.0", "1.4"])
    seeds: int = 5
    steps: int = Options.steps
    warm_start_steps: int = Options.warm_start_steps
    prompts: int = Options.prompts
    group_size: int = Options.group_size
    learning_rate: float = Options.learning_rate
    loss_type: str = Options.loss_type
    evaluation_prompts: int = Options.evaluation_prompts
    output: str = "runs/study/training.json"
    quick: bool = False


@dataclass(frozen=True)
class Prepared:
    """A study that fits, and what of it is there already."""

    demo: Options
    schedules: dict[str, dict[str, Any]]  # label -> what TemperatureSchedule.from_config takes
    eval_temperatures: list[float]
    seeds: int
    quick: bool
    path: Path
    result: dict[str, Any]  # what `begun` gives; runs are added

    @property
    def labels(self) -> list[str]:
        """Of a seed's runs: the warm start, then what it is trained at."""
        return [BEFORE, *self.schedules]

    def runs(self) -> list[dict[str, Any]]:
        """Those that are finished and asked for, seed by seed, in the order of the labels."""
        asked = [run for run in self.result["runs"] if run["seed"] < self.seeds and run["trained_at"] in self.labels]
        return sorted(asked, key=lambda run: (run["seed"], self.labels.index(run["trained_at"])))

    def missing(self, seed: int) -> list[str]:
        """The labels of this seed's runs that are still to be made."""
        done = {run["trained_at"] for run in self.result["runs"] if run["seed"] == seed}
        return [label for label in self.labels if label not in done]


def prepare(args: Sequence[str]) -> Prepared:
    """Parse, check, and read what is finished of this study.

    Raises:
        SettingsError, ValueError: name the setting, what it was, what was expected and the cure.
    """
    given = parse_overrides(args, None, TrainingOptions)
    if given.get("quick"):
        given = QUICK | {"output": TrainingOptions.output.replace(".json", "_quick.json")} | given
    options = TrainingOptions(**given)
    for name in ("seeds", "steps", "warm_start_steps", "prompts", "group_size", "evaluation_prompts"):
        check_count(name, getattr(options, name), f"By default {getattr(TrainingOptions, name)}.")
    shared = {each.name for each in fields(Options)} & {each.name for each in fields(TrainingOptions)}  # the same in all runs
    demo = Options(**{name: getattr(options, name) for name in shared})
    schedules = training_temperatures(options.temperatures, options.steps)
    eval_temperatures = sampling_temperatures(options.eval_temperatures, "eval_temperatures")
    path = Path(options.output)
    check_output(path)
    told = {name: value for name, value in asdict(demo).items() if name in shared} | {"eval_temperatures": eval_temperatures}
    new = {"kind": "temperature_training", "quick": options.quick, "machine": describe(), "options": told, "runs": []}
    result = begun(path, new, "training", RUN)
    prepared = Prepared(demo, schedules, eval_temperatures, options.seeds, options.quick, path, result)
    there = prepared.runs()
    if there and any(prepared.missing(seed) for seed in range(options.seeds)):
        others = made_with_others([*there, {"made_with": made_with()}])
        if others is not None:
            warnings.warn(f"what is added to {path} is made with others than what it holds: {others}.", stacklevel=2)
    return prepared
