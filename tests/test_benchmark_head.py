"""The benchmark of heads at toy size: it runs, its gate refuses wrong gradients, its file can be drawn."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from grpo_fast.benchmark.head import contestants, worker
from grpo_fast.benchmark.head.case import SEQUENCES, Case, make_case
from grpo_fast.benchmark.head.cli import app
from grpo_fast.benchmark.head.run import Settings


@pytest.fixture
def case() -> Case:
    return make_case(6 * SEQUENCES, 16, 101, torch.float32, active=0.625, seed=0)


def test_a_dead_sequence_has_no_advantage_and_the_others_straddle_the_band(case: Case) -> None:
    assert (case.advantages == 0).sum() == 3
    assert case.truth.d_hidden.abs().max() > 1e-3 and case.truth.d_weight.abs().max() > 1e-3


@pytest.mark.parametrize("name", ["ours", "full", "eager", "trl"])
@pytest.mark.parametrize("trainable", [True, False])
def test_contestants_pass_the_gate(name: str, trainable: bool, case: Case) -> None:
    answer = worker.measure(name, case, trainable, rounds=1, threads=1)
    assert answer["right"], answer
    assert ("d_weight" in answer["errors"]) == trainable
    assert len(answer["seconds"]) == 1


@pytest.mark.parametrize("factor", [0.0, 2.0])
def test_the_gate_refuses_a_wrong_gradient(factor: float, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = contestants.make("ours")

    def wrong(some: Case, hidden: Tensor, weight: Tensor) -> Tensor:
        loss = ours(some, hidden, weight)
        return loss.detach() + factor * (loss - loss.detach())

    monkeypatch.setattr(worker, "make", lambda name: wrong)
    assert not worker.measure("ours", case, True, rounds=1, threads=1)["right"]


def test_the_command_writes_what_it_can_draw(tmp_path: Path) -> None:
    output = tmp_path / "head.json"
    small = ["--tokens", "48", "--width", "16", "--vocabulary", "101", "--rounds", "1", "--active", "1", "--active", "0.5"]
    chosen = ["--contestant", "floor", "--contestant", "ours"]
    done = CliRunner().invoke(app, [*small, *chosen, "--output", str(output)])
    assert done.exit_code == 0, done.output
    result = json.loads(output.read_text())
    assert not result["skipped"]
    found = {(e["contestant"], e["active"], e["trainable"]) for e in result["results"]}
    assert found == {
        *((name, 1.0, head) for name in ("floor", "ours") for head in (True, False)),
        *(("ours", 0.5, head) for head in (True, False)),
    }
    assert all(entry["median"] > 0 and entry["times_floor"] > 0 for entry in result["results"])
    output.with_suffix(".png").unlink()
    assert CliRunner().invoke(app, ["--plot", str(output)]).exit_code == 0
    assert output.with_suffix(".png").stat().st_size > 1000


def test_bad_settings_are_refused() -> None:
    for wrong in ({"tokens": (7,)}, {"active": (0.0,)}, {"contestants": ("mine",)}, {"dtypes": ("int8",)}, {"rounds": 0}):
        with pytest.raises(ValueError, match="expected"):
            replace(Settings(), **wrong)
