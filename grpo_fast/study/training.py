"""``grpo-fast study training``: the demonstration's model trained at several temperatures, each evaluated at several.

Each seed has one warm start, from which it is trained at every temperature by `GRPOTrainer`, whose `TemperatureSchedule` sampler and loss
both read. A run that is finished is in the JSON file before the next begins, and a study that is started again goes on from there.
"""

from __future__ import annotations

import copy
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import TrainerCallback

from grpo_fast.benchmark.machine import describe, load_average
from grpo_fast.benchmark.report import write_json
from grpo_fast.commands.settings import SettingsError, said
from grpo_fast.demo.compare import trainer_of
from grpo_fast.demo.evaluate import evaluate
from grpo_fast.demo.run import MAX_NEW_TOKENS, Options, Start, one_thread, warm_started
from grpo_fast.study.estimates import Estimate, difference, estimate, told_apart
from grpo_fast.study.options import check_count, check_place, sampling_temperatures, training_temperatures

__all__ = ["BEFORE", "TrainingOptions", "prepare", "run", "summarise"]

BEFORE = "before"  # the warm start itself
CURVES = {  # name here -> key in the trainer's log
    "accuracy": "rewards/accuracy_reward/mean",
    "entropy": "entropy",
    "zero_std": "frac_reward_zero_std",
    "distinct": "completions/distinct",
    "temperature": "temperature",
}
ENDS = 5  # steps at the beginning and at the end whose mean is reported
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
        quick: one seed and three steps, to see whether it runs; its figures mean nothing.
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
    result: dict[str, Any]

    @property
    def labels(self) -> list[str]:
        return [BEFORE, *self.schedules]

    def runs(self) -> list[dict[str, Any]]:
        """Those that are finished and asked for, seed by seed, in the order of the labels."""
        asked = [run for run in self.result["runs"] if run["seed"] < self.seeds and run["trained_at"] in self.labels]
        return sorted(asked, key=lambda run: (run["seed"], self.labels.index(run["trained_at"])))

    def missing(self, seed: int) -> list[str]:
        done = {run["trained_at"] for run in self.result["runs"] if run["seed"] == seed}
        return [label for label in self.labels if label not in done]


def prepare(args: Sequence[str]) -> Prepared:
    """Parse, check, and read what is finished of this study.

    Raises:
        SettingsError, ValueError: name the setting, what it was, what was expected and the cure.
    """
    given = said(args, None, TrainingOptions)
    if given.get("quick"):
        given = QUICK | {"output": TrainingOptions.output.replace(".json", "_quick.json")} | given
    options = TrainingOptions(**given)
    for name in ("seeds", "steps", "warm_start_steps", "prompts", "group_size", "evaluation_prompts"):
        check_count(name, getattr(options, name), f"By default {getattr(TrainingOptions, name)}.")
    demo = Options(
        steps=options.steps,
        group_size=options.group_size,
        prompts=options.prompts,
        learning_rate=options.learning_rate,
        loss_type=options.loss_type,
        warm_start_steps=options.warm_start_steps,
        evaluation_prompts=options.evaluation_prompts,
    )
    schedules = training_temperatures(options.temperatures, options.steps)
    eval_temperatures = sampling_temperatures(options.eval_temperatures, "eval_temperatures")
    path = check_place(options.output)
    apart = ("seed", "temperature")  # these differ from run to run
    told = {name: value for name, value in asdict(demo).items() if name not in apart} | {"eval_temperatures": eval_temperatures}
    return Prepared(demo, schedules, eval_temperatures, options.seeds, options.quick, path, _begun(path, told))


def run(prepared: Prepared, on_step: Callable[[int, str, int], None] = lambda seed, label, steps: None) -> dict[str, Any]:
    """Make every run that is missing, and write each into the file. Returns the whole result, with what it says.

    Args:
        prepared: see `prepare`.
        on_step: told seed, label, and steps that were just done (all of them, when a run was there already).
    """
    result, load = prepared.result, load_average()
    with one_thread(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="temperature goes down")  # what comes of it is what is measured
        for seed in range(prepared.seeds):
            missing = prepared.missing(seed)
            for label in prepared.labels:
                if label not in missing:
                    on_step(seed, label, 0 if label == BEFORE else prepared.demo.steps)
            if not missing:
                continue
            start = warm_started(replace(prepared.demo, seed=seed))
            for label in missing:
                result["runs"].append(_cell(prepared, start, seed, label, on_step))
                result["machine"]["load_average"] = [load, load_average()]
                write_json(result, prepared.path)
    result |= summarise(prepared)
    write_json(result, prepared.path)
    return result


def summarise(prepared: Prepared) -> dict[str, Any]:
    """Means over the seeds with their standard errors, and a reading in words; of all runs that were asked for."""
    runs = prepared.runs()
    by_label = {label: [run for run in runs if run["trained_at"] == label] for label in prepared.labels}
    places = [f"{temperature:g}" for temperature in prepared.eval_temperatures]
    accuracy = {
        label: {place: [run["table"][i]["accuracy"] for run in of_label] for i, place in enumerate(places)}
        for label, of_label in by_label.items()
    }
    measured = [name for name in runs[0]["table"][0] if name not in ("temperature", "samples")]
    matrix = {
        label: {place: {name: _numbers([run["table"][i][name] for run in of_label]) for name in measured} for i, place in enumerate(places)}
        for label, of_label in by_label.items()
    }
    curves = {
        label: {
            name: {
                "first": _numbers([fmean(run["curves"][name][:ENDS]) for run in by_label[label]]),
                "last": _numbers([fmean(run["curves"][name][-ENDS:]) for run in by_label[label]]),
            }
            for name in CURVES
        }
        for label in prepared.schedules
    }
    reading = _reading(accuracy, curves, prepared.labels[1:], places)
    if prepared.seeds == 1:
        reading["sentences"].append("One seed has no errors, so that nothing can be told apart. Cure: --seeds 5.")
    if prepared.quick:
        reading["sentences"].append("This was --quick: its figures mean nothing.")
    return {"seeds": prepared.seeds, "trained_at": prepared.labels, "matrix": matrix, "training": curves, "reading": reading}


def _begun(path: Path, told: dict[str, Any]) -> dict[str, Any]:
    """The file of the same study, or a new result."""
    new: dict[str, Any] = {"kind": "temperature_training", "machine": describe(), "options": told, "runs": []}
    if not path.exists():
        return new
    cure = "Cure: another --output, or remove the file."
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SettingsError(f"output is {str(path)!r}, which holds no JSON ({error}); expected a study to go on with. {cure}") from error
    if not isinstance(found, dict) or found.get("kind") != new["kind"]:
        raise SettingsError(f"output is {str(path)!r}, which holds something else; expected a study of training to go on with. {cure}")
    differ = [name for name, value in told.items() if found["options"].get(name) != value]
    if differ:
        name = differ[0]
        raise SettingsError(
            f"output is {str(path)!r}, a study with {name} = {found['options'].get(name)!r}, and now {name} is {told[name]!r}; expected "
            f"the same, to go on with it. {cure}"
        )
    return {name: found[name] for name in new}


def _cell(prepared: Prepared, start: Start, seed: int, label: str, on_step: Callable[[int, str, int], None]) -> dict[str, Any]:
    began, demo = time.perf_counter(), prepared.demo
    model, curves = copy.deepcopy(start.model), {}
    if label != BEFORE:
        curves = _train(model, prepared, start, seed, label, on_step)
    table = evaluate(
        model,
        start.tokenizer,
        start.held_out[: demo.evaluation_prompts],
        group_size=demo.group_size,
        max_new_tokens=MAX_NEW_TOKENS,
        seed=seed,
        temperatures=prepared.eval_temperatures,
    )
    found = {"seed": seed, "trained_at": label, "seconds": time.perf_counter() - began, "curves": curves}
    return found | {"table": [asdict(quality) for quality in table]}


def _train(
    model: Any, prepared: Prepared, start: Start, seed: int, label: str, on_step: Callable[[int, str, int], None]
) -> dict[str, list[float]]:
    class Tell(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            on_step(seed, label, 1)

    demo = prepared.demo
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(seed)
        more = {"temperature": 1.0, "temperature_schedule": prepared.schedules[label], "metrics_on": "all"}
        trainer = trainer_of(model, start.tokenizer, start.training, demo.settings(), demo.prompts, seed, Path(folder), **more)
        trainer.add_callback(Tell())
        trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return {name: [log[key] for log in logs] for name, key in CURVES.items()}


def _reading(
    accuracy: Mapping[str, Mapping[str, list[float]]], curves: Mapping[str, Any], labels: Sequence[str], places: Sequence[str]
) -> dict[str, Any]:
    """The pair to take, and in words: which training is best at each evaluation temperature, and what the curves did."""
    if not any(value for label in labels for values in accuracy[label].values() for value in values):
        nothing = (
            "No answer was right after any training, so no temperature can be advised. Cure: more --steps or --warm_start_steps."
        )
        return {"train": None, "evaluate": None, "tied": [], "sentences": [nothing]}
    sentences = []
    for place in places:
        best, tied = _best({label: accuracy[label][place] for label in labels})
        mean = fmean(accuracy[best][place])
        if len(labels) > 1 and len(tied) == len(labels) - 1:
            sentences.append(f"Evaluated at T = {place}: the trainings cannot be told apart (highest: {mean:.3f}, of {best}).")
        else:
            sentences.append(f"Evaluated at T = {place}: best trained at {best} ({mean:.3f}){_not_told(tied)}.")
    over_all = {label: [fmean(values) for values in zip(*accuracy[label].values(), strict=True)] for label in labels}
    best, tied = _best(over_all)
    average = f"{fmean(over_all[best]):.3f} on average"
    sentences.append(f"Over all evaluation temperatures: best trained at {best}, {average}{_not_told(tied)}.")
    for label in labels:
        flat, entropy = curves[label]["zero_std"], curves[label]["entropy"]
        sentences.append(
            f"Trained at {label}: groups without a gradient {flat['first']['mean']:.2f} at first, {flat['last']['mean']:.2f} in the end; "
            f"entropy of softmax(z/T) {entropy['first']['mean']:.3f} and {entropy['last']['mean']:.3f} nats a token."
        )
    pairs = {(label, place): accuracy[label][place] for label in labels for place in places}
    train, evaluate = max(pairs, key=lambda pair: fmean(pairs[pair]))
    rivals = [pair for pair in pairs if pair != (train, evaluate) and not told_apart(difference(pairs[train, evaluate], pairs[pair]))]
    chosen = f"Train at {train} and evaluate at T = {evaluate}: the highest accuracy of the table, {fmean(pairs[train, evaluate]):.3f}"
    rest = ", not to be told within the errors from " if rivals else ", by more than the errors"
    sentences.append(f"{chosen}{rest}{_few([f'{label} at {place}' for label, place in rivals], '; ')}.")
    return {"train": train, "evaluate": float(evaluate), "tied": [[label, float(place)] for label, place in rivals], "sentences": sentences}


def _best(values: Mapping[str, Sequence[float]]) -> tuple[str, list[str]]:
    """The one with the highest mean, the first of equal ones, and those that cannot be told from it, seed by seed."""
    best = max(values, key=lambda label: fmean(values[label]))
    return best, [label for label in values if label != best and not told_apart(difference(values[best], values[label]))]


def _not_told(labels: Sequence[str]) -> str:
    return f", not to be told within the errors from {_few(labels)}" if labels else ""


def _few(names: Sequence[str], between: str = ", ", most: int = 8) -> str:
    """Not more than a reader takes in."""
    rest = len(names) - most
    return between.join([*names[:most], *([f"and {rest} more"] if rest > 0 else [])])


def _numbers(values: Sequence[float]) -> dict[str, float | None]:
    found: Estimate = estimate(values)
    return {"mean": found.mean, "error": found.error if len(values) > 1 else None}
