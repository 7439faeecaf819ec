"""Settings of ``grpo-fast study training`` with the demonstration's model: parsed, checked, and compared with what is finished."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from grpo_fast.demo.options import DemoOptions
from grpo_fast.ops.environment import describe
from grpo_fast.study.options import check_count, sampling_temperatures
from grpo_fast.study.result_files import differing_versions, load_study, versions
from grpo_fast.study.training_study import BEFORE, RUN_KEYS, TrainingStudy
from grpo_fast.study.truncations import NO_TRUNCATION, training_variants
from grpo_fast.trainer.run_settings import parse_overrides
from grpo_fast.utils.files import check_output
from grpo_fast.utils.warn import warn

__all__ = ["CURVES", "TrainingOptions", "prepare_training", "warn_of_other_versions"]

CURVES = {  # learning curve -> key in the trainer's log
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
        temperatures: to train at: numbers above 0, and linear schedules as in '0.6->1.4'.
        truncations: each is combined with each temperature: 'none', or settings as in 'top_p=0.95' or 'top_p=0.95,replay_support=false'.
        eval_temperatures: to evaluate each training at, without truncation; 0 is greedy decoding.
        seeds: number of seeds, from 0 on; all trainings of a seed begin with the same warm start.
        steps: of GRPO.
        warm_start_steps: of imitation before GRPO.
        prompts: per step.
        group_size: completions per prompt.
        learning_rate: of GRPO.
        loss_type: which loss of the family.
        evaluation_prompts: held-out questions of each evaluation.
        output: the result as JSON; measurements, table, figure and page take the same name with .raw.json, .csv, .png and .html.
        quick: one seed and three steps, to test whether it runs, from the beginning each time; its figures mean nothing.
    """

    temperatures: list[str] = field(default_factory=lambda: ["0.2", "0.6", "1.0", "1.4", "0.6->1.4"])
    truncations: list[str] = field(default_factory=lambda: [NO_TRUNCATION])
    eval_temperatures: list[str] = field(default_factory=lambda: ["0", "0.2", "0.6", "1.0", "1.4"])
    seeds: int = 5
    steps: int = DemoOptions.steps
    warm_start_steps: int = DemoOptions.warm_start_steps
    prompts: int = DemoOptions.prompts
    group_size: int = DemoOptions.group_size
    learning_rate: float = DemoOptions.learning_rate
    loss_type: str = DemoOptions.loss_type
    evaluation_prompts: int = DemoOptions.evaluation_prompts
    output: str = "runs/study/training.json"
    quick: bool = False


def prepare_training(args: Sequence[str]) -> TrainingStudy:
    """Parse and check the command line, and read what is finished of this study.

    Raises:
        SettingsError, ValueError: names the setting, what it was, what was expected and the fix.
    """
    given = parse_overrides(args, None, TrainingOptions)
    if given.get("quick"):
        given = QUICK | {"output": TrainingOptions.output.replace(".json", "_quick.json")} | given
    options = TrainingOptions(**given)
    for name in ("seeds", "steps", "warm_start_steps", "prompts", "group_size", "evaluation_prompts"):
        check_count(name, getattr(options, name), f"The default is {getattr(TrainingOptions, name)}.")
    shared = {each.name for each in fields(DemoOptions)} & {each.name for each in fields(TrainingOptions)}  # the same in all runs
    demo = DemoOptions(**{name: getattr(options, name) for name in shared})
    variants = training_variants(options.temperatures, options.truncations, options.steps)
    eval_temperatures = sampling_temperatures(options.eval_temperatures, "eval_temperatures")
    path = Path(options.output)
    check_output(path)
    recorded: dict[str, Any] = {name: value for name, value in asdict(demo).items() if name in shared}
    recorded["eval_temperatures"] = eval_temperatures
    new = {"kind": "temperature_training", "quick": options.quick, "machine": describe(), "options": recorded, "runs": []}
    question = {"seeds": options.seeds, "trained_at": [BEFORE, *variants]}
    stored = load_study(path, new, "training", part_keys=RUN_KEYS, question=question)
    study = TrainingStudy(demo, variants, eval_temperatures, options.seeds, options.quick, path, stored.measurements, stored.result)
    warn_of_other_versions(study)
    return study


def warn_of_other_versions(study: TrainingStudy) -> None:
    """Warn if runs are missing that would be made with other versions than the finished ones."""
    finished = study.runs()
    if finished and any(study.missing(seed) for seed in range(study.seeds)):
        differing = differing_versions([*finished, {"made_with": versions()}])
        if differing is not None:
            warn(f"the runs to be added to {study.path} differ from the finished ones in {differing}.")
