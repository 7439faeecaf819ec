"""The model that predicts the times of the GPU kernels: its table, its inputs, and that a run is compared with it."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module("model")


def test_the_table_is_what_the_model_predicts(model: ModuleType) -> None:
    readme = (ROOT / "bench" / "README.md").read_text()
    found = re.search(r"<!-- predictions: .*? -->\n(.*?)\n<!-- end of predictions -->", readme, re.S)
    assert found and found.group(1) == model.table(), "Fix: replace the table in bench/README.md by what python bench/model.py prints."


def test_instructions_and_registers_are_those_of_the_compiled_kernels(model: ModuleType) -> None:
    """Those that kernels/README.md states."""
    stated = {}
    for line in (ROOT / "kernels" / "README.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 7 and (numbers := re.fullmatch(r"([\d.]+) / (\d+)", cells[3])):
            stated[cells[0], cells[1]] = float(numbers[1]), int(numbers[2])
    assert len(stated) >= 8
    for form, kernel in model.KERNELS.items():
        assert (kernel.instructions, kernel.registers) == stated[form], form


def test_the_shape_of_a_prediction(model: ModuleType) -> None:
    """Hand-computed where one bound decides, and the stragglers of a last wave."""
    gpu = model.GPUS["H200"]
    kernel = model.Kernel(1, 1.0, 1.0, 64)  # 8 programs each
    assert model.resident(kernel, gpu) == 132 * 8
    rows, vocabulary = 132 * 8 * 4, 4096 * 32
    assert model.over_rows(kernel, "bf16", rows, vocabulary, gpu) == pytest.approx(rows * vocabulary * 2 / gpu.bandwidth)
    one_more = model.over_rows(kernel, "bf16", rows + 1, vocabulary, gpu) - model.over_rows(kernel, "bf16", rows, vocabulary, gpu)
    assert one_more == pytest.approx(32 * model.LATENCY)
    arithmetic = model.Kernel(1, 100.0, 1.0, 64)
    expected = rows * vocabulary * 100 / (132 * 128 * gpu.clock)
    assert model.over_rows(arithmetic, "bf16", rows, vocabulary, gpu) == pytest.approx(expected)


def test_programs_per_row_are_those_of_the_launcher(model: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    torch, launcher = pytest.importorskip("torch"), pytest.importorskip("grpo_fast.kernels.token_logprobs")
    monkeypatch.setattr(launcher, "multiprocessors", lambda device: 132)
    for rows in (1, 8, 64, 256, 511, 1024, 4096):
        for vocabulary in (32000, 128256, 262144):
            expected = launcher.parts_of(rows, vocabulary, launcher.BLOCK, torch.device("cpu"), None)
            assert model.parts_of(rows, vocabulary, launcher.BLOCK, model.GPUS["H200"]) == expected


def test_a_measurement_is_compared_with_its_prediction(model: ModuleType) -> None:
    entry = {"step": "gradient", "name": "ours", "rows": 4096, "vocabulary": 128256}
    expected = model.gradient(4096, 128256, model.GPUS["H200"]).seconds * 1e3
    found = model.predicted({**entry, "ms": 2 * expected}, "NVIDIA H200")
    assert found == {"predicted_ms": expected, "times_predicted": pytest.approx(2.0)}
    assert "times_predicted" not in model.predicted(entry, "NVIDIA H200")
    assert model.predicted({**entry, "ms": 1.0}, "cpu") == model.predicted({**entry, "name": "trl"}, "NVIDIA H200") == {}
    head = {"name": "ours_head", "rows": 16384, "width": 3584, "vocabulary": 152064, "ms": 1.0}
    kept = {"name": "kept", "size": "32", "trainable": True, "rows": 2048, "width": 4096, "vocabulary": 128256, "ms": 1.0}
    assert model.predicted(head, "NVIDIA H200")["predicted_ms"] > 1 and model.predicted(kept, "NVIDIA H100 80GB HBM3")["predicted_ms"] > 0


def test_registers_are_limited_only_where_nothing_spills() -> None:
    launcher = pytest.importorskip("grpo_fast.kernels.token_logprobs")
    limited = {"maxnreg": launcher.HOPPER_REGISTERS}
    assert launcher.register_limit(2, True, False, (9, 0)) == limited
    for other in (
        (4, True, False, (9, 0)),
        (2, False, False, (9, 0)),
        (2, True, True, (9, 0)),
        (2, True, False, (10, 0)),
        (2, True, False, None),
    ):
        assert launcher.register_limit(*other) == {}
