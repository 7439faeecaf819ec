"""Settings of ``grpo-fast study training`` with a model, a dataset and rewards of one's own, checked before the model is loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from grpo_fast.ops.environment import describe
from grpo_fast.study.correctness import correctness_index
from grpo_fast.study.options import check_count, sampling_temperatures
from grpo_fast.study.result_files import load_study
from grpo_fast.study.training_study import BEFORE, RUN_KEYS, TrainingStudy
from grpo_fast.study.truncations import training_variants
from grpo_fast.trainer.config import GRPOConfig
from grpo_fast.trainer.run_parts import RunParts, load_run_parts
from grpo_fast.trainer.run_settings import TrainOptions, parse
from grpo_fast.utils.errors import SettingsError
from grpo_fast.utils.files import check_output
from grpo_fast.utils.redaction import redact

__all__ = ["ModelTraining", "ModelTrainingOptions", "prepare_model_training"]

STUDIED = {  # settings of a training that the study sets itself -> the option of the study
    "temperature": "temperatures",
    "temperature_schedule": "temperatures",
    **dict.fromkeys(("top_p", "top_k", "min_p", "replay_support"), "truncations"),
    "eval_temperature": "eval_temperatures",
    "seed": "seeds",
    "output_dir": "output",
}
NOT_RECORDED = ("temperatures", "truncations", "seeds", "output", "quick", "require_gain")  # a study may be continued with others
QUICK = {"seeds": 1, "max_steps": 2, "max_completion_length": 8, "eval_rounds": 1}
QUICK_ROWS = 4


@dataclass
class ModelTrainingOptions(TrainOptions):
    """What is compared. Model, data, rewards and the settings of the training are named as for ``grpo-fast train``, whose settings file
    can be given. ``max_steps`` and ``eval_dataset`` are needed: each training is evaluated on all rows of the latter, at each evaluation
    temperature with ``eval_rounds`` completions of each row.

    Args:
        temperatures: to train at: numbers above 0, and linear schedules as in '0.6->1.4'.
        truncations: each is combined with each temperature: 'none', or settings as in 'top_p=0.95' or 'top_p=0.95,replay_support=false'.
        eval_temperatures: to evaluate each training at, without truncation; 0 is greedy decoding.
        seeds: number of seeds, from 0 on.
        correct: the reward that says whether an answer is correct (full marks: 1); by default accuracy, math, or the task's own.
        output: the result as JSON; measurements, table, figure and page take the same name with .raw.json, .csv, .png and .html.
        quick: one seed and two steps, to test whether it runs, from the beginning each time; its figures mean nothing.
        require_gain: exit with status 1 unless each training raised the held-out accuracy, over all evaluation temperatures, by more than
            twice its standard error over questions and seeds.
    """

    temperatures: list[str] = field(default_factory=lambda: ["0.6", "1.0", "1.3"])
    truncations: list[str] = field(default_factory=lambda: ["none"])
    eval_temperatures: list[str] = field(default_factory=lambda: ["0", "0.6", "1.0"])
    seeds: int = 3
    correct: str | None = None
    output: str = "runs/study/training.json"
    quick: bool = False
    require_gain: bool = False


@dataclass(frozen=True)
class ModelTraining:
    """A model and what it is trained on; everything is loaded but the model."""

    options: ModelTrainingOptions
    given: Mapping[str, Any]  # settings of GRPOConfig that were given explicitly
    config: GRPOConfig
    parts: RunParts
    correct: int  # index of the reward that says whether an answer is correct


def prepare_model_training(args: Sequence[str]) -> TrainingStudy:
    """Parse and check the settings, load rewards, tokenizer and data, and read what is finished of this study.

    Raises:
        SettingsError, ValueError, TypeError: names the setting, what it was, what was expected and the fix.
    """
    options, _, overrides = parse(args, GRPOConfig, ModelTrainingOptions)
    own = {each.name for each in fields(ModelTrainingOptions)}
    given = {name: value for name, value in overrides.items() if name not in own}
    for name, option in STUDIED.items():
        if name in given:
            raise SettingsError(f"{name} is set; the study compares several values. Fix: --{option}, and leave {name} out.")
    if options.quick:
        for name, value in QUICK.items():
            if name not in overrides:
                if name in own:
                    setattr(options, name, value)
                else:
                    given[name] = value
        if "output" not in overrides:
            options.output = options.output.replace(".json", "_quick.json")
    path = Path(options.output)
    check_output(path)
    given.setdefault("per_device_eval_batch_size", 64)  # as in `grpo-fast study sampling`
    config = GRPOConfig(str(path.parent), **given)
    if config.max_steps < 1:
        raise SettingsError(f"max_steps is {config.max_steps}; expected the number of steps of each training, as in --max_steps 100.")
    check_count("seeds", options.seeds, f"The default is {ModelTrainingOptions.seeds}.")
    if options.eval_dataset is None:
        raise SettingsError("eval_dataset is not set; expected the held-out questions that each training is evaluated on.")
    variants = training_variants(options.temperatures, options.truncations, config.max_steps)
    for variant in variants.values():
        GRPOConfig(str(path.parent), **given, **variant.truncation)  # refuses wrong values
    eval_temperatures = sampling_temperatures(options.eval_temperatures, "eval_temperatures")
    parts = load_run_parts(options, config)
    if options.quick and parts.eval_dataset is not None:
        parts = parts._replace(eval_dataset=parts.eval_dataset.select(range(min(QUICK_ROWS, len(parts.eval_dataset)))))
    correct = correctness_index(options.correct, list(options.rewards or ["task"]), parts.runner.names, parts.rewards, parts.task)
    recorded = _recorded_options(options, given, parts) | {"eval_temperatures": eval_temperatures}
    new = {"kind": "model_training", "quick": options.quick, "machine": describe(), "options": recorded, "runs": []}
    question = {"seeds": options.seeds, "trained_at": [BEFORE, *variants]}
    stored = load_study(path, new, "training", part_keys=RUN_KEYS, question=question)
    return TrainingStudy(
        ModelTraining(options, given, config, parts, correct),
        variants,
        eval_temperatures,
        options.seeds,
        options.quick,
        path,
        stored.measurements,
        stored.result,
    )


def _recorded_options(options: ModelTrainingOptions, given: Mapping[str, Any], parts: RunParts) -> dict[str, Any]:
    """Return every setting that the measurements depend on, and a digest of the rows: the dataset behind a name may change."""
    recorded = {each.name: getattr(options, each.name) for each in fields(options) if each.name not in NOT_RECORDED}
    rows = [[dict(row) for row in dataset] for dataset in (parts.train_dataset, parts.eval_dataset or [])]
    digest = hashlib.sha256(json.dumps(rows, sort_keys=True, default=str).encode()).hexdigest()[:16]
    found: dict[str, Any] = redact(recorded | {name: given[name] for name in sorted(given)})
    if isinstance(found["model"], str):  # a result is published: it does not name the user's folders
        found["model"] = found["model"].replace(str(Path.home()), "~", 1)
    return found | {"digest_of_rows": digest}
