"""The benchmark of the trainer's loss stage: both sides do equal work, and it reports no time where results differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from grpo_fast.benchmark import trainer_stage
from grpo_fast.benchmark.harness.gate import relative_difference
from grpo_fast.benchmark.trainer_stage import LABELS, EagerForward
from grpo_fast.cli.bench_trainer import app

SMALL = ["--quick", "--rounds", "2"]


def test_all_implementations_agree_and_are_timed(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, [*SMALL, "--output", str(tmp_path / "found.json")])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "found.json").read_text())
    assert {entry["implementation"] for entry in found["results"]} == set(LABELS)
    assert all(len(entry["seconds"]) == 2 and min(entry["seconds"]) > 0 for entry in found["results"])
    assert len({round(entry["loss"], 6) for entry in found["results"]}) == 1 and found["results"][0]["loss"] != 0
    differences = found["gate"]["largest_relative_difference"]
    assert differences["eager"] == 0 < differences["fused"] < found["gate"]["tolerance"]


@pytest.mark.parametrize("wrong", ["doubled", "zeroed", "entropy"])
def test_nothing_is_reported_where_they_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    honest = trainer_stage.ModelForward.loss

    def loss(self: Any, model: Any, rows: Any, **options: Any) -> Any:
        out = honest(self, model, rows, **options)
        if wrong == "entropy":
            return out._replace(metrics={**out.metrics, "entropy": out.metrics["entropy"] * 1.001})
        return out._replace(loss=out.loss * (2.0 if wrong == "doubled" else 0.0))

    monkeypatch.setattr(trainer_stage.ModelForward, "loss", loss)
    assert "loss" in vars(EagerForward)  # its own, which is as it was
    result = CliRunner().invoke(app, [*SMALL, "--output", str(tmp_path / "found.json")])
    assert isinstance(result.exception, RuntimeError) and "No times are reported" in str(result.exception)
    assert not (tmp_path / "found.json").exists()


def test_a_gradient_that_is_wrong_in_one_parameter_is_seen() -> None:
    expected = {"loss": torch.tensor(1.0), "entropy": torch.tensor(2.0), "a": torch.ones(3), "b": torch.ones(2)}
    assert relative_difference(expected, expected) == 0
    assert relative_difference({**expected, "b": torch.zeros(2)}, expected) == pytest.approx(1)
    assert relative_difference({**expected, "b": -expected["b"]}, expected) == pytest.approx(2)
    assert relative_difference({name: value for name, value in expected.items() if name != "b"}, expected) == float("inf")
    assert relative_difference({**expected, "loss": torch.tensor(float("nan"))}, expected) == float("inf")
