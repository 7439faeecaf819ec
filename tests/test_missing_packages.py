"""An install without extras, an ASCII terminal, and warnings: one sentence each, which points at the place to change."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import grpo_fast as gf
from grpo_fast.cli.completion import train_flags
from grpo_fast.cli.main import start

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


MODULES = {"griffelib": "griffe"}  # where a module has another name than its distribution


def packages_of(extras: list[str]) -> set[str]:
    """The modules that these extras of pyproject.toml install. (Python 3.10 has no parser of TOML.)"""
    text = (Path(gf.__file__).parents[1] / "pyproject.toml").read_text()
    optional = dict(re.findall(r"^(\w+) = \[(.*?)\]$", text.partition("[project.optional-dependencies]")[2], re.M | re.S))
    names = [name for extra in extras for name in re.findall(r'"([\w-]+)', optional[extra])]
    return {MODULES.get(name, name.replace("-", "_")) for name in names}


def test_without_the_packages_each_command_and_class_names_the_install() -> None:
    """All in one process: each start imports torch."""
    commands = ["train --help", "train config.yaml", "demo", "study sampling --help"]
    names = ["GRPOTrainer", "GRPOConfig"]
    ended = run(f"""
import json, traceback
from typer.testing import CliRunner
from grpo_fast.cli.main import app
outcomes = {{}}
for command in {commands!r}:
    done = CliRunner().invoke(app, command.split())
    outcomes[command] = [done.exit_code, " ".join(done.output.split())]
for name in {names!r}:
    try:
        exec(f"from grpo_fast.trainer import {{name}}")
    except ImportError as error:
        outcomes[name] = [traceback.format_exc().count("Traceback"), f"ImportError: {{error}}"]
print(json.dumps(outcomes))
""")
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout.splitlines()[-1])
    for command in commands:
        code, output = found[command]
        told = re.search(r"needs ([\w ]+), which is not installed\. Fix: pip install '\.\[([\w,]+)\]'", output)
        assert code == 2 and told is not None, (command, output)
        assert packages_of(told[2].split(",")) >= set(told[1].split(" and ")), (command, output)
    for name in names:
        tracebacks, line = found[name]
        cure = "needs transformers, which is not installed. Fix: pip install '.[train]'"
        assert tracebacks == 1 and line.startswith(f"ImportError: grpo_fast.trainer.{name} {cure}")


def test_an_ascii_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command writes to an ASCII stream, and none ends with an error because of a character that it lacks."""
    commands = ["doctor", "--help"]
    if importlib.util.find_spec("transformers") and importlib.util.find_spec("griffe"):  # its settings, and their docstrings
        commands.append("train --help")
    for command in commands:
        written = io.BytesIO()
        terminal = io.TextIOWrapper(written, encoding="ascii", write_through=True)
        with monkeypatch.context() as patched:
            for stream in ("stdout", "stderr"):
                patched.setattr(sys, stream, terminal)
            patched.setattr(sys, "argv", ["grpo-fast", *command.split()])
            with pytest.raises(SystemExit) as ended:
                start()
        shown = written.getvalue().decode("ascii")
        assert terminal.errors == "replace", "a character that the terminal lacks ends the command"
        assert not ended.value.code and len(shown) > 500, (command, shown)
        assert ("--install-completion" in shown) == (command == "--help")


def test_completion_is_on() -> None:
    code = "import sys\nsys.argv = ['grpo-fast']\nfrom grpo_fast.cli.main import start\nstart()"
    words = {"_GRPO_FAST_COMPLETE": "complete_bash", "COMP_WORDS": "grpo-fast train --lear", "COMP_CWORD": "2"}
    assert run(code, (), **words).stdout.split() == ["--learning_rate"]


def test_the_options_of_train_are_completed() -> None:
    pytest.importorskip("transformers", reason="its settings are transformers'")
    assert train_flags("--num_g") == ["--num_generations"]
    assert train_flags("--hel") == ["--help", "--help-all"]
    assert train_flags("--lr_sched") == ["--lr_scheduler_kwargs", "--lr_scheduler_type"] and train_flags("--nothing") == []


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
