"""Every Triton kernel is compiled for real GPUs, on any machine: no spills, few instructions, and one compilation for all batches."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def run(*command: str | Path) -> str:
    """In a separate process: whether kernels are compiled or interpreted is decided when they are defined."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


ASKED = {"sums": 9, "sums+entropy": 10.5, "gradient": 10, "gradient+entropy": 10}  # instructions per logit, at most
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


def compiled(file: Path, *options: str) -> list[dict[str, Any]]:
    """What tools/compile_triton.py found. It fails on a spill, on too many instructions and on loads of less than 16 bytes."""
    print(run(ROOT / "tools" / "compile_triton.py", "--json", file, *options))
    results: list[dict[str, Any]] = json.loads(file.read_text())
    assert not [result for result in results if result["spills"] or result["wrong"]]
    counted = {(result["variant"], result["target"]): result["per_logit"] for result in results if result["variant"] in ASKED}
    assert set(counted) == {(variant, target) for variant in ASKED for target in TARGETS}
    for (variant, target), per_logit in counted.items():  # AMD's machine code is not counted
        assert per_logit is None if target == "gfx942" else per_logit <= ASKED[variant], (variant, target)
    return results


@pytest.mark.slow
def test_each_variant(tmp_path: Path) -> None:
    """Each form of a kernel once; among them every kernel of whole rows with each type of the logits, and each type for each GPU."""
    results = compiled(tmp_path / "compiled.json", "--sample")
    assert len({result["variant"] for result in results}) == 33
    types = ("bf16", "fp16", "fp32")
    for kernel in ("sums", "gradient"):
        assert {result["dtype"] for result in results if result["variant"].partition("+")[0] == kernel} == set(types)
    of_types = [result for result in results if not result["variant"].startswith(("terms", "logprobs", "total"))]
    assert {(result["dtype"], result["target"]) for result in of_types} == {(dtype, target) for dtype in types for target in TARGETS}


@pytest.mark.sweep
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_every_variant_for_every_gpu(dtype: str, tmp_path: Path) -> None:
    assert len(compiled(tmp_path / "compiled.json", "--dtype", dtype)) >= 4 * 13


def test_the_search_for_the_maximum_is_not_taken_for_the_loop_over_plain_blocks() -> None:
    """With a soft cap both loops have exponentials: one for each logit in the search, two in the sums."""
    script = (
        "import sys; sys.path.insert(0, 'tools'); import compile_triton as c\n"
        "def loop(n): return ['LDG.E.128 R4, [R2]'] + ['MUFU.EX2 R1, R1'] * n + ['FADD R1, R1, R2'] * 8\n"
        "c.sass.loops = lambda code: [c.sass.Loop(loop(8)), c.sass.Loop(loop(16))]\n"
        "print(c._plain_loop('', 8, 2, 1), c._plain_loop('', 8, 2, 2))"
    )
    assert run("-c", script).splitlines()[-1] == "(2.125, True) (3.125, True)"


def test_one_compilation_for_all_batches() -> None:
    """Lengths, vocabularies, alignments, temperatures, settings and programs per row change; Triton's own cache keeps one entry each."""
    found = json.loads(run(ROOT / "tests" / "triton_one_compilation.py").splitlines()[-1])
    assert found["launches"] >= 20
    assert len(found["kept"]) == 6 and set(found["kept"].values()) == {1}, found
