"""An install without extras, an ASCII terminal, and warnings: one sentence each, which points at the place to change."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import grpo_fast as gf

BLOCK = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker())
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name.partition(".")[0] in {blocked!r} else found(name, package)
"""
EXTRAS = (
    "transformers",
    "datasets",
    "accelerate",
    "griffe",
    "httpx",
    "scipy",
    "matplotlib",
    "tokenizers",
    "trl",
    "yaml",
    "liger_kernel",
    "peft",
)


def run(code: str, blocked: tuple[str, ...] = EXTRAS, **environment: str) -> subprocess.CompletedProcess[str]:
    root = Path(gf.__file__).parents[1]
    env = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", **environment}
    return subprocess.run(
        [sys.executable, "-c", BLOCK.format(blocked=blocked) + code], capture_output=True, text=True, env=env, check=False
    )


@pytest.mark.parametrize("command", ["train --help", "train config.yaml", "demo", "study sampling --help"])
def test_a_command_without_its_packages_names_the_install(command: str) -> None:
    ended = run(f"from grpo_fast.cli.main import app\napp({command.split()!r})")
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert "which is not installed. Fix: pip install '.[" in " ".join(ended.stderr.split())


@pytest.mark.parametrize("name", ["GRPOTrainer", "GRPOConfig"])
def test_the_trainer_without_its_packages_names_the_install(name: str) -> None:
    ended = run(f"from grpo_fast.trainer import {name}")
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("ImportError")]
    assert line.startswith(f"ImportError: grpo_fast.trainer.{name} needs transformers, which is not installed. Fix: pip install '.[train]'")
    assert ended.stderr.count("Traceback") == 1


@pytest.mark.parametrize("command", ["doctor", "--help", "train --help"])
def test_an_ascii_terminal(command: str) -> None:
    if "train" in command:
        pytest.importorskip("transformers", reason="its settings are transformers'")
        pytest.importorskip("griffe", reason="the help reads docstrings")
    code = f"import sys\nsys.argv = ['grpo-fast', *{command.split()!r}]\nfrom grpo_fast.cli.main import start\nstart()"
    ended = run(code, (), PYTHONIOENCODING="ascii", LANG="C", LC_ALL="C", PYTHONUTF8="0")
    assert ended.returncode == 0, ended.stderr
    assert len(ended.stdout) > 500 and ended.stdout.isascii()


def test_completion_is_on() -> None:
    ended = run("import sys\nsys.argv = ['grpo-fast', '--help']\nfrom grpo_fast.cli.main import start\nstart()", ())
    assert "--install-completion" in ended.stdout
    code = "import sys\nsys.argv = ['grpo-fast']\nfrom grpo_fast.cli.main import start\nstart()"
    words = {"_GRPO_FAST_COMPLETE": "complete_bash", "COMP_WORDS": "grpo-fast doc", "COMP_CWORD": "1"}
    assert run(code, (), **words).stdout.split() == ["doctor"]


def test_the_help_of_train_is_a_screen_or_two(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="its settings are transformers'")
    pytest.importorskip("griffe", reason="the help reads docstrings")
    from grpo_fast.cli import train

    monkeypatch.setenv("COLUMNS", "120")
    shown = {}
    for option in ("--help", "--help-all"):
        with pytest.raises(SystemExit) as ended:
            train.app([option])
        assert ended.value.code == 0
        shown[option] = capsys.readouterr().out
    assert len(shown["--help"].splitlines()) < 90 < 300 < len(shown["--help-all"].splitlines())
    for name in ("--model", "--rewards", "--output_dir", "--learning_rate", "--num_generations", "--help-all"):
        assert name in shown["--help"]


def test_warnings_point_at_the_users_line() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gf.LossConfig(loss_type="cispo", epsilon_high=0.31)
        gf.LossConfig(loss_type="grpo").__class__(loss_type="cispo", epsilon_high=0.32)
    assert [Path(each.filename).name for each in caught] == [Path(__file__).name] * 2
    lines = Path(__file__).read_text().splitlines()
    assert ["0.31" in lines[caught[0].lineno - 1], "0.32" in lines[caught[1].lineno - 1]] == [True, True]


def test_warnings_of_the_settings_point_at_the_users_line(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="its settings are transformers'")
    from grpo_fast.trainer.config import GRPOConfig

    with pytest.warns(UserWarning, match="temperature goes down to 0.5") as caught:
        GRPOConfig(str(tmp_path), use_cpu=True, report_to=[], temperature=0.5)
    (warning,) = [each for each in caught if "temperature goes" in str(each.message)]
    assert warning.filename == __file__
