"""``grpo-fast study training``: a model trained at several temperatures and truncations, each training evaluated at several temperatures.

The demonstration's model has one warm start per seed, from which `GRPOTrainer` trains; any other model begins with its own weights.
Every finished run is stored before the next begins, and a study that is started again continues from there.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from transformers import TrainerCallback

from grpo_fast.demo.evaluate import evaluate
from grpo_fast.demo.options import MAX_NEW_TOKENS, DemoOptions
from grpo_fast.demo.train_with_trainer import train_with_trainer
from grpo_fast.demo.warm_start import WarmStart, one_thread, warm_start
from grpo_fast.ops.environment import load_average
from grpo_fast.study.model_runs import model_run
from grpo_fast.study.result_files import JSONObject, versions, write_measurements, write_result
from grpo_fast.study.training_setup import CURVES
from grpo_fast.study.training_study import BEFORE, TrainingStudy
from grpo_fast.study.training_summary import summarize_training

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainerControl, TrainerState, TrainingArguments

__all__ = ["WARM_START", "OnStep", "published_result", "run"]

WARM_START = "warm start"  # label in progress reports, before the runs of a seed
OnStep = Callable[[int, str, int], None]


def run(study: TrainingStudy, on_step: OnStep = lambda seed, label, steps: None) -> JSONObject:
    """Make every run that is missing, store each, and write the result.

    Args:
        study: see `prepare_training`.
        on_step: called with seed, label, and the number of steps just done (all of them for a run that was finished before). WARM_START is
            a label too.

    Returns:
        The result: ``kind``, ``quick``, ``machine`` (on which the study began), ``options``, the keys of `summarize_training`, ``seconds``
        (means over the seeds by label), ``made_with`` (the different `versions`) and ``load_average`` (lowest and highest).
    """
    if study.result is not None:
        return study.result
    measurements, made_with = study.measurements, versions()
    demo = study.subject if isinstance(study.subject, DemoOptions) else None
    with one_thread() if demo else nullcontext(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="temperature goes down")  # the effect of a falling schedule is part of the study
        for seed in range(study.seeds):
            missing = study.missing(seed)
            for label in study.labels:
                if label not in missing:
                    on_step(seed, label, 0 if label == BEFORE else study.steps)
            if not missing:
                continue
            if demo:
                on_step(seed, WARM_START, 0)
                start = warm_start(replace(demo, seed=seed))
            for label in missing:
                load = load_average()
                found = _train_and_evaluate(study, start, seed, label, on_step) if demo else model_run(study, seed, label, on_step)
                measurements["runs"].append(found | {"made_with": made_with, "load_average": [load, load_average()]})
                write_measurements(study.path, measurements)
    result = published_result(study)
    write_result(study.path, result, measurements)
    return result


def published_result(study: TrainingStudy) -> JSONObject:
    """Return what is published of a finished study; see `run`."""
    runs = study.runs()
    head = {name: study.measurements[name] for name in ("kind", "quick", "machine", "options")}
    seconds = {label: [run["seconds"] for run in runs if run["trained_at"] == label] for label in study.labels}
    made_with: list[JSONObject] = []
    for run in runs:
        if run.get("made_with") not in (None, *made_with):
            made_with.append(run["made_with"])
    loads = [load for run in runs for load in run.get("load_average") or [] if load is not None]
    return (
        head
        | summarize_training(study)
        | {
            "seconds": {label: sum(values) / len(values) for label, values in seconds.items()},
            "made_with": made_with,
            "load_average": [min(loads), max(loads)] if loads else None,
        }
    )


def _train_and_evaluate(study: TrainingStudy, start: WarmStart, seed: int, label: str, on_step: OnStep) -> JSONObject:
    """Make one run.

    Returns:
        ``seed``, ``trained_at`` (the label), ``seconds``, ``curves`` (by name in CURVES, one number per step; empty for the warm start) and
        ``table`` (a `SamplingQuality` for each evaluation temperature).
    """
    began, demo = time.perf_counter(), _demo(study)
    model = copy.deepcopy(start.model)
    curves = {} if label == BEFORE else _train(model, study, start, seed, label, on_step)
    table = evaluate(
        model,
        start.tokenizer,
        start.held_out[: demo.evaluation_prompts],
        group_size=demo.group_size,
        max_new_tokens=MAX_NEW_TOKENS,
        seed=seed,
        temperatures=study.eval_temperatures,
    )
    seconds = time.perf_counter() - began
    return {"seed": seed, "trained_at": label, "seconds": seconds, "curves": curves, "table": [asdict(quality) for quality in table]}


def _train(
    model: PreTrainedModel, study: TrainingStudy, start: WarmStart, seed: int, label: str, on_step: OnStep
) -> dict[str, Sequence[float]]:
    class ProgressCallback(TrainerCallback):
        def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
            on_step(seed, label, 1)

    demo, variant = _demo(study), study.variants[label]
    logs = train_with_trainer(
        model,
        start.tokenizer,
        start.training,
        demo.settings(),
        demo.prompts,
        seed,
        callbacks=[ProgressCallback()],
        temperature=1.0,
        temperature_schedule=variant.schedule,
        **variant.truncation,
        metrics_on="all",
    ).logs
    return {name: [log[key] for log in logs] for name, key in CURVES.items()}


def _demo(study: TrainingStudy) -> DemoOptions:
    assert isinstance(study.subject, DemoOptions)
    return study.subject
