"""What README.md says is run: its Python, and its commands as far as one test run can contain them."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text()
COMMANDS = [
    line for block in re.findall(r"```bash\n(.*?)```", TEXT, re.S) for line in block.splitlines() if line and not line.startswith("#")
]

# Where a command of the README is run, if not here: a command that is in no list fails the test below.
RUN_ELSEWHERE = {
    "pip install .": "tests/test_packaging.py builds and installs the wheel",
    "pip install --no-build-isolation -e .": "tools/bootstrap.sh does it, for every run of these tests",
    "make demo": "tests/test_demo.py runs the command behind it",
    "make test": "is what runs this",
    "make bench": "tests/test_benchmark.py runs the command behind it",
}
RUN_HERE = ("grpo-fast doctor",)


def test_the_python_blocks_run_one_after_the_other_and_agree() -> None:
    before, after = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    torch.manual_seed(0)
    names = {
        "torch": torch,
        "logits": torch.randn(16, 6, 50, requires_grad=True),
        "completion_ids": torch.randint(50, (16, 5)),
        "completion_mask": (torch.rand(16, 5) > 0.2).long(),
        "rewards": torch.rand(16),
        "temperature": 0.7,
    }
    names["old_logprobs"] = torch.randn(16, 5) * 0.3 - 4
    results = []
    for block in (before, after):
        exec(block, names)
        loss = names["loss"] if block is before else names["out"].loss
        results.append((loss.detach(), names["logits"].grad))
        names["logits"].grad = None
    torch.testing.assert_close(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-5, atol=1e-7)
    assert results[1][1].abs().max() > 1e-3


def test_every_command_is_run_somewhere() -> None:
    commands = [command.split("#")[0].strip() for command in COMMANDS]
    assert commands, "README.md has no commands"
    assert sorted(set(commands)) == sorted([*RUN_ELSEWHERE, *RUN_HERE])


@pytest.mark.parametrize("command", RUN_HERE)
def test_command(command: str) -> None:
    program, *arguments = shlex.split(command)
    done = subprocess.run(
        [str(Path(sys.executable).parent / program), *arguments], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "reference" in done.stdout


@pytest.mark.parametrize("command", [command for command in RUN_ELSEWHERE if command.startswith("make")])
def test_make_knows_its_targets(command: str) -> None:
    done = subprocess.run([*shlex.split(command), "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "bootstrap.sh" in done.stdout


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        if "://" not in target:
            assert (ROOT / target).exists(), target
