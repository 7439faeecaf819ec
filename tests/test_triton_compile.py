"""Every Triton kernel is compiled for real GPUs, on any machine: no spills, few instructions, and one compilation for all batches."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def run(*command: str | Path) -> str:
    """In a process of its own: whether kernels are compiled or interpreted is settled when they are defined."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


def compiled(tmp_path: Path, *arguments: str) -> list[dict]:
    file = tmp_path / "compiled.json"
    print(run(ROOT / "tools" / "compile_triton.py", "--json", str(file), *arguments))
    return json.loads(file.read_text())


def test_spills_and_instructions(tmp_path: Path) -> None:
    """A covering subset; the tool itself fails on a spill and on too many instructions."""
    results = compiled(tmp_path, "--quick")
    assert {result["target"] for result in results} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert not [result for result in results if result["spills"]]
    bounded = {result["variant"]: result["per_logit"] for result in results if result["bound"]}
    assert set(bounded) == {"sums", "sums+entropy", "gradient", "gradient+entropy"}
    assert bounded["sums"] <= 9 and bounded["sums+entropy"] <= 10.5
    assert bounded["gradient"] <= 10 and bounded["gradient+entropy"] <= 10


@pytest.mark.sweep
@pytest.mark.timeout(1200)
def test_every_variant(tmp_path: Path) -> None:
    results = compiled(tmp_path)
    assert len(results) > 150 and not [result for result in results if result["wrong"]]


def test_one_compilation_for_all_batches() -> None:
    """Lengths, vocabularies, alignments, temperatures, settings and programs per row change; Triton's own cache keeps one entry each."""
    found = json.loads(run(ROOT / "tests" / "triton_one_compilation.py").splitlines()[-1])
    assert found["launches"] >= 20
    assert len(found["kept"]) == 6 and set(found["kept"].values()) == {1}, found
