"""``python -m grpo_fast.demo.compare``: the demonstration's plain loop (`grpo.py`) compared with GRPOTrainer, on several seeds.

Both begin with the same warm start and have the same questions, rewards, settings and number of completions per step. The time is the CPU
time of the process from the first step to the last, on one thread. The result holds the learning curves of reward and accuracy, their
means, the final accuracy on held-out questions at T = 0.6, and the time.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from grpo_fast.demo.evaluate import evaluate
from grpo_fast.demo.grpo import train
from grpo_fast.demo.options import MAX_NEW_TOKENS, REWARDS, DemoOptions
from grpo_fast.demo.run import draw_batches
from grpo_fast.demo.train_with_trainer import train_with_trainer
from grpo_fast.demo.warm_start import one_thread, warm_start
from grpo_fast.ops.environment import describe, load_average
from grpo_fast.utils.files import write_json
from grpo_fast.utils.install_hints import require_packages
from grpo_fast.utils.statistics import standard_error

__all__ = ["compare"]

WAYS = ("loop", "trainer")
CURVES = ("reward", "rewards/accuracy_reward")


def compare(options: DemoOptions, seeds: Sequence[int], console: Console) -> dict[str, Any]:
    """Train with the loop and with the trainer from each seed, and return the content of the JSON file."""
    load, runs = load_average(), []
    with one_thread():
        for seed in seeds:
            for found in _run_seed(options, seed):
                runs.append(found)
                shown = f"accuracy at T = 0.6 {found['accuracy']:.3f}, {found['seconds']:.1f} s of CPU"
                console.print(f"seed {seed}, {found['way']:7}  {shown}", highlight=False)
    return {
        "kind": "demo_trainer",
        "machine": {**describe(), "load_average": [load, load_average()]},
        "options": {"steps": options.steps, "prompts": options.prompts, "group_size": options.group_size, "seeds": list(seeds)},
        "timed": "CPU seconds of the process over all steps, one thread",
        "summary": {name: _paired(runs, name) for name in ("accuracy", "mean_training_reward", "mean_training_accuracy", "seconds")},
        "runs": runs,
    }


def _run_seed(options: DemoOptions, seed: int) -> list[dict[str, Any]]:
    start, tokenizer, rows, held_out = warm_start(replace(options, seed=seed))
    settings = options.settings()
    found: list[dict[str, Any]] = []
    for way in WAYS:
        model = copy.deepcopy(start)
        if way == "loop":
            torch.manual_seed(seed)
            began = time.process_time()
            history = train(model, tokenizer, draw_batches(rows, options.prompts, seed), REWARDS, settings)
            seconds = time.process_time() - began
        else:
            logs, seconds = train_with_trainer(model, tokenizer, rows, settings, options.prompts, seed)
            history = [{**log, CURVES[1]: log[f"{CURVES[1]}/mean"]} for log in logs]
        (quality,) = evaluate(
            model,
            tokenizer,
            held_out[: options.evaluation_prompts],
            group_size=options.group_size,
            max_new_tokens=MAX_NEW_TOKENS,
            seed=seed,
            temperatures=[0.6],
        )
        curves = {name: [record[name] for record in history] for name in CURVES}
        means = {"mean_training_reward": fmean(curves[CURVES[0]]), "mean_training_accuracy": fmean(curves[CURVES[1]])}
        found.append({"seed": seed, "way": way, "seconds": seconds, "accuracy": quality.accuracy, **means, "curves": curves})
    return found


def _paired(runs: list[dict[str, Any]], name: str) -> dict[str, float | None]:
    """Return the means over the seeds, and the mean of the paired differences with its standard error (None for one seed)."""
    loop, trainer = ([run[name] for run in runs if run["way"] == way] for way in WAYS)
    gaps = [mine - theirs for mine, theirs in zip(trainer, loop, strict=True)]
    error = standard_error(gaps)
    means = {"loop": fmean(loop), "trainer": fmean(trainer), "difference": fmean(gaps)}
    return {**means, "standard_error": None if math.isnan(error) else error}


def command(
    seeds: Annotated[int, typer.Option(help="Number of seeds, from 0 on.", min=1)] = 5,
    steps: Annotated[int, typer.Option(help="GRPO steps.")] = DemoOptions.steps,
    warm_start_steps: Annotated[int, typer.Option(help="Steps of imitation before GRPO.")] = DemoOptions.warm_start_steps,
    prompts: Annotated[int, typer.Option(help="Prompts per step.")] = DemoOptions.prompts,
    output: Annotated[Path, typer.Option(help="The result as JSON.")] = Path("runs/bench/demo_trainer.json"),
) -> None:
    """Compare the demonstration's plain loop with GRPOTrainer. About two minutes per seed."""
    require_packages("transformers", "tokenizers", "accelerate", "datasets", extras=("demo", "train"), needed_by="The demo")
    console = Console()
    try:
        options = DemoOptions(steps=steps, warm_start_steps=warm_start_steps, prompts=prompts)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    result = compare(options, range(seeds), console)
    write_json(output, result)
    table = Table("", *WAYS, "difference", title="Mean over the seeds", title_justify="left")
    for name, found in result["summary"].items():
        margin = "" if found["standard_error"] is None else f" ± {found['standard_error']:.3f}"
        table.add_row(name.replace("_", " "), f"{found['loop']:.3f}", f"{found['trainer']:.3f}", f"{found['difference']:+.3f}{margin}")
    console.print(table)
    typer.echo(f"All numbers: {output}")


app = typer.Typer(add_completion=False)
app.command()(command)

if __name__ == "__main__":
    app()
