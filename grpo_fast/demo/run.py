"""The whole demonstration: warm start, evaluation, training, evaluation, success criteria, result files."""

from __future__ import annotations

import platform
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import grpo_fast as gf
from grpo_fast.demo import report
from grpo_fast.demo.evaluate import TEMPERATURES, SamplingQuality, evaluate, sample_texts
from grpo_fast.demo.grpo import train
from grpo_fast.demo.options import MAX_NEW_TOKENS, REWARDS, DemoOptions
from grpo_fast.demo.success_criteria import success_criteria
from grpo_fast.demo.warm_start import one_thread, warm_start
from grpo_fast.ops.backends import select
from grpo_fast.utils.files import write_json
from grpo_fast.utils.install_hints import require_packages

__all__ = ["MODULES", "draw_batches", "run"]

MODULES = ("torch", "transformers", "tokenizers", "matplotlib")

SHOWN = ((0.0, 2), (0.6, 3))  # completions to show: (temperature, number)


def run(options: DemoOptions, output: Path, console: Console) -> dict[str, Any]:
    """Run the demonstration, and write ``curves.png`` and ``result.json`` into ``output``.

    Args:
        options: of the command line.
        output: folder, created if it is missing.
        console: for tables and progress bars.

    Returns:
        The content of ``result.json``.
    """
    require_packages(*MODULES, extras=("demo",), needed_by="The demo")
    output.mkdir(parents=True, exist_ok=True)  # before the training: an error should not lose its result
    started = time.perf_counter()
    with one_thread():
        demo = _Demonstration(options, console)
        before = demo.evaluate("before")
        console.print(report.quality_table(before.table, "Before GRPO, after imitation"))
        history = demo.train()
        after = demo.evaluate("after")
    console.print(report.quality_table(after.table, "After GRPO"))

    shown = [(temperature, row["prompt"]) for temperature, count in SHOWN for row in demo.rows[:count]]
    samples = [
        {"temperature": temperature, "prompt": prompt, "before": first, "after": last}
        for (temperature, prompt), first, last in zip(shown, before.texts, after.texts, strict=False)
    ]
    console.print(report.samples_table(samples))

    criteria = [criterion.as_dict() for criterion in success_criteria(before.table, after.table)]
    result = {
        "learned": all(criterion["met"] for criterion in criteria),
        "criteria": criteria,
        "seconds": demo.seconds | {"total": time.perf_counter() - started, "process_cpu": time.process_time()},
        "options": asdict(options),
        "settings": asdict(demo.settings),
        "rewards": {reward.__name__: weight for reward, weight in REWARDS.items()},
        "versions": {"python": platform.python_version(), "grpo_fast": gf.__version__} | {name: version(name) for name in MODULES},
        "backend": select(torch.device("cpu")),
        "machine": f"{platform.system()} {platform.machine()}, one thread",
        "before": [asdict(quality) for quality in before.table],
        "after": [asdict(quality) for quality in after.table],
        "history": history,
        "samples": samples,
    }
    report.write_curves(result, output / "curves.png")
    write_json(output / "result.json", result)
    return result


class _Evaluation(NamedTuple):
    table: list[SamplingQuality]
    texts: list[str]


class _Demonstration:
    """The model after its warm start, its data, and the seconds that each phase took."""

    def __init__(self, options: DemoOptions, console: Console) -> None:
        self.options, self.console, self.settings = options, console, options.settings()
        self.seconds: dict[str, float] = {}
        with self._bar("warm_start", "warm start by imitation", options.warm_start_steps) as step:
            start = warm_start(options, lambda loss: step(f"loss {loss:.3f}"))
        self.model, self.tokenizer, self.training = start.model, start.tokenizer, start.training
        self.rows = start.held_out[: options.evaluation_prompts]

    def evaluate(self, when: str) -> _Evaluation:
        group_size, seed = self.options.group_size, self.options.seed
        with self._bar("evaluation", f"evaluation {when}", len(TEMPERATURES)) as step:
            done = partial(step, f"{len(self.rows)} x {group_size} samples")
            table = evaluate(
                self.model,
                self.tokenizer,
                self.rows,
                group_size=group_size,
                max_new_tokens=MAX_NEW_TOKENS,
                seed=seed,
                on_temperature=done,
            )
            texts = []
            for temperature, count in SHOWN:
                prompts = [row["prompt"] for row in self.rows[:count]]
                texts += sample_texts(self.model, self.tokenizer, prompts, temperature, MAX_NEW_TOKENS, seed)
        return _Evaluation(table, texts)

    def train(self) -> list[dict[str, float]]:
        batches = draw_batches(self.training, self.options.prompts, self.options.seed)
        with self._bar("training", f"GRPO at T = {self.options.temperature:g}", self.options.steps) as step:

            def on_step(record: dict[str, float]) -> None:
                note = f"reward {record['reward']:.2f} accuracy {record['rewards/accuracy_reward']:.2f}"
                step(note)
                if not self.console.is_terminal and record["step"] % 10 == 0:  # a log file shows no progress bar
                    self.console.print(f"step {record['step']:3d}  {note}", highlight=False)

            torch.manual_seed(self.options.seed)
            return train(self.model, self.tokenizer, batches, REWARDS, self.settings, on_step)

    @contextmanager
    def _bar(self, name: str, description: str, total: int) -> Iterator[Callable[[str], None]]:
        """Show a progress bar, and add the seconds to ``name``. The yielded function advances the bar and sets the note beside it."""
        begin = time.perf_counter()
        columns = TextColumn("{task.description:<23}"), BarColumn(bar_width=12), MofNCompleteColumn(), TimeElapsedColumn()
        with Progress(*columns, TextColumn("{task.fields[note]}"), console=self.console) as progress:
            task = progress.add_task(description, total=total, note="")
            yield lambda note: progress.update(task, advance=1, note=note)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin


def draw_batches(rows: list[dict[str, str]], count: int, seed: int) -> Iterator[list[dict[str, str]]]:
    """Yield random batches of ``count`` different rows, endlessly."""
    rng = random.Random(seed)
    while True:
        yield rng.sample(rows, count)
