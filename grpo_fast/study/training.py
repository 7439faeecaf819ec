"""``grpo-fast study training``: the demonstration's model trained at several temperatures, each evaluated at several.

Each seed has one warm start, from which it is trained at every temperature by `GRPOTrainer`, whose `TemperatureSchedule` sampler and loss
both read. A run that is finished is in the JSON file before the next begins, and a study that is started again goes on from there.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from transformers import TrainerCallback

from grpo_fast.demo.evaluate import evaluate
from grpo_fast.demo.run import MAX_NEW_TOKENS, Start, one_thread, warm_started
from grpo_fast.demo.train_with_trainer import train_by_trainer
from grpo_fast.ops.environment import load_average
from grpo_fast.study.result_files import made_with
from grpo_fast.study.training_setup import BEFORE, CURVES, Prepared
from grpo_fast.study.training_summary import summarise
from grpo_fast.utils.files import write_json

__all__ = ["WARM_START", "run"]

WARM_START = "warm start"  # what a seed begins with, for whoever watches


def run(prepared: Prepared, on_step: Callable[[int, str, int], None] = lambda seed, label, steps: None) -> dict[str, Any]:
    """Make every run that is missing, and write each into the file.

    Args:
        prepared: see `prepare`.
        on_step: told seed, label, and steps that were just done (all of them, when a run was there already); WARM_START is a label too.

    Returns:
        What the file holds: ``kind``, ``quick``, ``machine`` (where it began), ``options``, what `summarise` says, and ``runs``. Of each:
        ``seed``, ``trained_at`` (a label), ``seconds``, ``curves`` (of each of CURVES one number a step; none of the warm start),
        ``table`` (a `Quality` for each evaluation temperature), ``made_with`` and ``load_average`` (before and after).
    """
    result, made = prepared.result, made_with()
    with one_thread(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="temperature goes down")  # what comes of it is what is measured
        for seed in range(prepared.seeds):
            missing = prepared.missing(seed)
            for label in prepared.labels:
                if label not in missing:
                    on_step(seed, label, 0 if label == BEFORE else prepared.demo.steps)
            if not missing:
                continue
            on_step(seed, WARM_START, 0)
            start = warm_started(replace(prepared.demo, seed=seed))
            for label in missing:
                load = load_average()
                cell = _cell(prepared, start, seed, label, on_step)
                result["runs"].append(cell | {"made_with": made, "load_average": [load, load_average()]})
                write_json(prepared.path, result)
    result |= summarise(prepared)
    write_json(prepared.path, result)
    return result


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
    more: dict[str, Any] = {"temperature": 1.0, "temperature_schedule": prepared.schedules[label], "metrics_on": "all"}
    arguments = (model, start.tokenizer, start.training, demo.settings(), demo.prompts, seed)
    logs = train_by_trainer(*arguments, callbacks=[Tell()], **more).logs
    return {name: [log[key] for log in logs] for name, key in CURVES.items()}
