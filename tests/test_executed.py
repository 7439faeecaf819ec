"""What is stated about where the GPU kernels were executed is the same everywhere, and no more than what was done."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rich.console import Console

from grpo_fast.cli import doctor
from grpo_fast.ops.executed import EXECUTED, NEVER, markdown

ROOT = Path(__file__).resolve().parent.parent


def test_the_readme_and_doctor_state_it() -> None:
    assert markdown() in (ROOT / "kernels" / "README.md").read_text()
    console = Console(width=250, record=True, file=sys.stderr)
    console.print(doctor._executed_table())
    shown = console.export_text()
    for each in EXECUTED:
        assert f"{each.kernels} " in shown and each.target in shown and each.executed in shown
    assert shown.count(NEVER) == sum(each.hardware == NEVER for each in EXECUTED)


def test_every_target_that_is_compiled_is_stated() -> None:
    stated = " ".join(each.target for each in EXECUTED if each.kernels == "Triton" and each.compiled == "to machine code")
    source = (ROOT / "tools" / "compile_triton.py").read_text()
    targets = source.split("TARGETS = {", 1)[1].split("}", 1)[0]
    named = {line.split('"')[1] for line in targets.splitlines() if '"' in line}
    assert named == {word.strip(",") for word in stated.split()} - {"NVIDIA", "AMD"}


def test_hardware_is_named_where_a_result_exists() -> None:
    """A committed GPU result is the evidence for `hardware`, and needs it."""
    devices = [json.loads(path.read_text())["machine"]["device"] for path in (ROOT / "bench" / "results").glob("gpu*.json")]
    named = " ".join(each.hardware for each in EXECUTED if each.hardware != NEVER)
    assert bool(devices) == bool(named) and all(device in named for device in devices)
