"""Shared by the tests of ``grpo-fast study``: a model after a few steps, rows for it, the command, figures, and a sampler that counts."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from grpo_fast.cli import main as cli
from grpo_fast.data.tasks.sorting import make_tokenizer, question, split_questions
from grpo_fast.demo.model import make_model
from grpo_fast.demo.teacher import Teacher
from grpo_fast.demo.warm_start import imitate
from grpo_fast.generation import Completion
from grpo_fast.study import page, plot
from grpo_fast.study.sampling_setup import SamplingStudy, prepare_sampling

ROWS = [question(digits) for digits in ("5281", "3316", "9070", "4498")]
FAST = ["--use_cpu", "--max_completion_length", "6", "--per_device_eval_batch_size", "64"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demonstration's model after a few steps of imitation, and rows for it."""
    import datasets

    folder = tmp_path_factory.mktemp("study")
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    imitate(model, tokenizer, split_questions()[0], Teacher(), steps=12, max_new_tokens=32, seed=0)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "study_rewards.py").write_text(
        "def odd_first(completion_ids, **columns):\n    return [float(ids[0] % 2) for ids in completion_ids]\n\n\n"
        "def even_first(completion_ids, **columns):\n    return [float(ids[0] % 2 == 0) for ids in completion_ids]\n\n\n"
        "def blind(completion_ids, **columns):\n    return [None] * len(completion_ids)\n\n\n"
        "def differs(completion_ids, **columns):\n    return [float(i % 2) for i in range(len(completion_ids))]\n\n\n"
        "def same(completion_ids, **columns):\n    return [1.0] * len(completion_ids)\n"
    )
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    return folder


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for name in ("model", "rows.jsonl", "study_rewards.py"):
        (tmp_path / name).symlink_to(folder / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], None]]:
    """The figures that a study would draw, which takes longer than a small study: a call draws one. Its page has no charts."""
    monkeypatch.setattr(page, "charts_of", lambda draw, result: page.Charts([]))
    asked: list[Callable[[], None]] = []
    for name in ("write_sampling_figure", "write_training_figure"):
        draw = getattr(plot, name)
        monkeypatch.setattr(plot, name, lambda result, path, draw=draw: asked.append(functools.partial(draw, result, path)))
    return asked


def run(*arguments: str, status: int = 0) -> str:
    result = CliRunner().invoke(cli.app, ["study", *arguments], env={"COLUMNS": "400"})
    assert result.exit_code == status, (result.output, result.exception)
    return result.output


def sampled(*arguments: str, status: int = 0) -> str:
    return run("sampling", "--model", "./model", "--dataset", "rows.jsonl", *FAST, "--output", "found.json", *arguments, status=status)


def made(*arguments: str, rewards: tuple[str, ...] = ("accuracy", "format"), width: str = "64") -> SamplingStudy:
    given = ["--model", "./model", "--dataset", "rows.jsonl", *FAST, "--output", "found.json", "--per_device_eval_batch_size", width]
    return prepare_sampling([*given, "--rewards", *rewards, *arguments])


class Counting:
    """A sampler whose completions name their prompt (its last digit) and their number (as token 7 + number), three at most per prompt."""

    def __init__(self) -> None:
        self.asked: dict[tuple[int, ...], int] = {}
        self.closed = False

    def generate(self, prompts: list[list[int]], params: Any) -> list[Completion]:
        found = []
        for prompt in prompts:
            number = self.asked.get(tuple(prompt), 0)
            self.asked[tuple(prompt)] = number + 1
            found.append(Completion([prompt[-2], 7 + number, 1], True))
        return found

    def update_weights(self, model: Any, step: int) -> None: ...

    def close(self) -> None:
        self.closed = True
