"""Each example runs, with short settings."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SHORT = {
    "train_demo.py": ["--steps", "1", "--warm-start-steps", "1", "--eval-rounds", "1"],
    "lora.py": ["--steps", "2"],
    "reasoning_gym_task.py": ["--steps", "1"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORT)
def test_example_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip({"lora.py": "peft", "reasoning_gym_task.py": "reasoning_gym"}.get(name, "transformers"))
    monkeypatch.setattr(sys, "argv", [name, *SHORT[name], "--output", str(tmp_path)])
    monkeypatch.syspath_prepend(str(EXAMPLES))
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    said = {"train_demo.py": "after: ", "lora.py": "trainable params", "reasoning_gym_task.py": "eval_reward"}[name]
    assert said in capsys.readouterr().out


def test_every_example_is_tested() -> None:
    scripts = {path.name for path in EXAMPLES.glob("*.py")} - {"tiny.py"}
    assert scripts == {*SHORT, "two_processes.py"}  # the latter in test_trainer_distributed.py
