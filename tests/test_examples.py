"""Each example runs, with short settings."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from typing import Any

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
    expected = {"train_demo.py": "after: ", "lora.py": "trainable params", "reasoning_gym_task.py": "eval_reward"}[name]
    assert expected in capsys.readouterr().out


@pytest.mark.slow
def test_code_of_the_page_on_training_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step of the page's code, with a local model in place of one of the hub."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from tiny import tiny_model, tiny_tokenizer

    tokenizer = tiny_tokenizer()
    tiny_model(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    code = re.findall(r"```python\n(.*?)```", (EXAMPLES.parent / "docs" / "training.md").read_text(), re.S)[0]
    for old, new in {
        "Qwen/Qwen3-0.6B": str(tmp_path / "model"),
        '"runs/arithmetic"': f"{str(tmp_path / 'out')!r}, max_steps=1, per_device_train_batch_size=8, use_cpu=True",
        "max_completion_length=256": "max_completion_length=8",
    }.items():
        assert old in code
        code = code.replace(old, new)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["trainer"].state.global_step == 1
    assert names["trainer"].model.config._attn_implementation == "sdpa"


def test_every_example_is_tested() -> None:
    scripts = {path.name for path in EXAMPLES.glob("*.py")} - {"tiny.py"}
    assert scripts == {*SHORT, "two_processes.py"}  # test_trainer_distributed.py runs the latter
