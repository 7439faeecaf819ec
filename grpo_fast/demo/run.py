"""The demonstration from start to end: warm start, look, train, look again, judge, write down."""

from __future__ import annotations

import math
import platform
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import grpo_fast as gf
from grpo_fast.data.tasks.sorting import make_tokenizer, question, split_questions
from grpo_fast.demo import report
from grpo_fast.demo.evaluate import KEY_PATTERN, NGRAM, TEMPERATURES, Quality, evaluate, sample_texts
from grpo_fast.demo.grpo import Settings, train
from grpo_fast.demo.model import imitate, make_model
from grpo_fast.demo.success_criteria import judge
from grpo_fast.demo.teacher import Teacher
from grpo_fast.ops.backends import select
from grpo_fast.rewards import CoherenceReward, RepetitionPenalty, Reward, accuracy_reward, format_reward
from grpo_fast.utils.files import write_json
from grpo_fast.utils.install_hints import require_packages

MODULES = ("torch", "transformers", "tokenizers", "matplotlib")

# Correctness outweighs the rest together: no habit may pay better than the right answer.
REWARDS: dict[Reward, float] = {
    accuracy_reward: 1.0,
    format_reward: 0.2,
    CoherenceReward(key_pattern=KEY_PATTERN): 0.2,
    RepetitionPenalty(ngram_size=NGRAM): 0.2,
}
MAX_NEW_TOKENS = 32  # five lines of thinking do not fit: who repeats himself runs into it
SHOWN = ((0.0, 2), (0.6, 3))  # sample completions: (temperature, how many)


@dataclass(frozen=True)
class Options:
    """What can be set from the command line."""

    seed: int = 0
    steps: int = 60
    temperature: float = 1.0
    group_size: int = 8
    prompts: int = 32
    learning_rate: float = 3e-4
    loss_type: str = "dapo"
    warm_start_steps: int = 160
    evaluation_prompts: int = 96

    def __post_init__(self) -> None:
        for name in ("steps", "prompts", "warm_start_steps", "evaluation_prompts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1.")
        available = len(split_questions()[1])
        if self.evaluation_prompts > available:
            raise ValueError(f"evaluation_prompts is {self.evaluation_prompts}; expected at most {available}, the held-out questions.")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate is {self.learning_rate}; expected a number above 0 (3e-4 works for this model).")
        self.settings()  # the rest is checked there

    def settings(self) -> Settings:
        """The loop's settings. CISPO's ``epsilon_high`` is the raw bound of the ratio, so that 0.28 would shrink every gradient."""
        loss = gf.LossConfig(
            loss_type=self.loss_type, epsilon_high=5.0 if self.loss_type == "cispo" else 0.28, max_completion_length=MAX_NEW_TOKENS
        )
        return Settings(
            steps=self.steps,
            group_size=self.group_size,
            max_new_tokens=MAX_NEW_TOKENS,
            temperature=self.temperature,
            learning_rate=self.learning_rate,
            loss=loss,
        )


class Start(NamedTuple):
    """Where GRPO begins: the model that imitation left behind, its tokenizer, and the questions."""

    model: Any
    tokenizer: Any
    training: list[dict[str, str]]  # rows, see `question`
    held_out: list[dict[str, str]]


def warm_started(options: Options, on_loss: Callable[[float], None] = lambda loss: None) -> Start:
    """The demonstration's model after its warm start, a function of the seed; ``on_loss`` is told each step's."""
    torch.manual_seed(options.seed)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    training, held_out = split_questions()
    steps, seed = options.warm_start_steps, options.seed
    imitate(model, tokenizer, training, Teacher(), steps=steps, max_new_tokens=MAX_NEW_TOKENS, seed=seed, on_step=on_loss)
    return Start(model, tokenizer, [question(digits) for digits in training], [question(digits) for digits in held_out])


def run(options: Options, output: Path, console: Console) -> dict[str, Any]:
    """Play the whole demonstration, write ``curves.png`` and ``result.json`` into ``output``, and return what the latter holds."""
    require_packages(*MODULES, extras=("demo",), needed_by="The demo")
    output.mkdir(parents=True, exist_ok=True)  # better refused now than after the training
    started = time.perf_counter()
    with one_thread():
        stage = _Stage(options, console)
        before = stage.look("before")
        console.print(report.quality_table(before.table, "Before GRPO: what imitation left behind"))
        history = stage.train()
        after = stage.look("after")
    console.print(report.quality_table(after.table, "After GRPO"))

    shown = [(temperature, row["prompt"]) for temperature, count in SHOWN for row in stage.rows[:count]]
    samples = [
        {"temperature": temperature, "prompt": prompt, "before": first, "after": last}
        for (temperature, prompt), first, last in zip(shown, before.texts, after.texts, strict=False)
    ]
    console.print(report.samples_table(samples))

    criteria = [criterion.as_dict() for criterion in judge(before.table, after.table)]
    result = {
        "learned": all(criterion["met"] for criterion in criteria),
        "criteria": criteria,
        "seconds": stage.seconds | {"total": time.perf_counter() - started, "process_cpu": time.process_time()},
        "options": asdict(options),
        "settings": asdict(stage.settings),
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


class _Look(NamedTuple):
    table: list[Quality]
    texts: list[str]


class _Stage:
    """The model after its warm start, its data, and a stopwatch: what the acts of the demonstration share."""

    def __init__(self, options: Options, console: Console) -> None:
        self.options, self.console, self.settings = options, console, options.settings()
        self.seconds: dict[str, float] = {}
        with self._bar("warm_start", "warm start by imitation", options.warm_start_steps) as step:
            start = warm_started(options, lambda loss: step(f"loss {loss:.3f}"))
        self.model, self.tokenizer, self.training = start.model, start.tokenizer, start.training
        self.rows = start.held_out[: options.evaluation_prompts]

    def look(self, when: str) -> _Look:
        draw: dict[str, Any] = {"max_new_tokens": MAX_NEW_TOKENS, "seed": self.options.seed}
        group_size = self.options.group_size
        with self._bar("evaluation", f"evaluation {when}", len(TEMPERATURES)) as step:
            done = partial(step, f"{len(self.rows)} x {group_size} samples")
            table = evaluate(self.model, self.tokenizer, self.rows, group_size=group_size, on_temperature=done, **draw)
            texts = []
            for temperature, count in SHOWN:
                texts += sample_texts(self.model, self.tokenizer, [row["prompt"] for row in self.rows[:count]], temperature, **draw)
        return _Look(table, texts)

    def train(self) -> list[dict[str, float]]:
        batches = drawn_from(self.training, self.options.prompts, self.options.seed)
        with self._bar("training", f"GRPO at T = {self.options.temperature:g}", self.options.steps) as step:

            def on_step(record: dict[str, float]) -> None:
                note = f"reward {record['reward']:.2f} accuracy {record['rewards/accuracy_reward']:.2f}"
                step(note)
                if not self.console.is_terminal and record["step"] % 10 == 0:  # a log file has no live bar
                    self.console.print(f"step {record['step']:3d}  {note}", highlight=False)

            torch.manual_seed(self.options.seed)
            return train(self.model, self.tokenizer, batches, REWARDS, self.settings, on_step)

    @contextmanager
    def _bar(self, name: str, description: str, total: int) -> Iterator[Callable[[str], None]]:
        """A progress bar, advanced by calling what it yields with the words that stand beside it; its seconds are added to ``name``."""
        begin = time.perf_counter()
        words = TextColumn("{task.description:<23}"), BarColumn(bar_width=12), MofNCompleteColumn(), TimeElapsedColumn()
        with Progress(*words, TextColumn("{task.fields[note]}"), console=self.console) as progress:
            task = progress.add_task(description, total=total, note="")
            yield lambda note: progress.update(task, advance=1, note=note)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin


def drawn_from(rows: list[dict[str, Any]], count: int, seed: int) -> Iterator[list[dict[str, Any]]]:
    """Batches of as many different rows, without end."""
    rng = random.Random(seed)
    while True:
        yield rng.sample(rows, count)


@contextmanager
def one_thread() -> Iterator[None]:
    """A model this small gains nothing from a second thread, and where cores are shared its spinning costs several times the run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
