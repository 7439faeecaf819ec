"""The comparison of TRL's loss stage with ours at toy size: it runs, and its gate refuses what differs."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peers import needs_trl
from typer.testing import CliRunner

from grpo_fast.benchmark import trl_stage
from grpo_fast.benchmark.harness.gate import relative_difference
from grpo_fast.benchmark.trainer_stage import LossStageSettings, make_batch, make_model
from grpo_fast.benchmark.trl_stage import LABELS, TrlWorker
from grpo_fast.cli import bench_command
from grpo_fast.cli.bench_trl import app
from grpo_fast.integrations import versions

pytestmark = needs_trl

TOY = LossStageSettings(tokens=6, width=16, vocabulary=101, rounds=1)


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, float], dict[str, Any]]:
    batch = tmp_path_factory.mktemp("trl") / "batch.pt"
    torch.save(make_batch(TOY), batch)
    workers = {name: TrlWorker(name, batch, TOY) for name in LABELS}
    return {(name, active): worker.repetition(active) for name, worker in workers.items() for active in TOY.active}


def difference(found: dict[str, Any], expected: dict[str, Any]) -> float:
    tensors = [{name: torch.tensor(value) for name, value in outputs.items()} for outputs in (found, expected)]
    return relative_difference(*tensors, smallest=1e-6)


def test_the_batch_straddles_the_clip_band() -> None:
    batch = make_batch(TOY)
    model = make_model(TOY)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    with torch.no_grad():
        logprobs = model(ids[:, :-1]).logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    ratio = (logprobs - batch["old_per_token_logps"]).exp()
    assert (ratio < 0.8).any() and (ratio > 1.2).any(), ratio
    assert batch["advantages"].view(-1, TOY.group).std(1).min() > 0.5


@pytest.mark.parametrize("active", TOY.active)
@pytest.mark.parametrize("name", LABELS)
def test_the_trainers_agree(name: str, active: float, answers: dict[tuple[str, float], dict[str, Any]]) -> None:
    stock, answer = answers["stock", active], answers[name, active]
    assert difference(answer["outputs"], stock["outputs"]) <= trl_stage.TOLERANCE
    assert answer["seconds"] > 0 and max(value for key, (value, *_) in answer["outputs"].items() if key.startswith("norm")) > 1e-3
    other = answers["stock", 1.5 - active]["outputs"]
    assert abs(stock["outputs"]["loss"][0] - other["loss"][0]) > 1e-3, "a degenerate group must show in the loss"


@pytest.mark.parametrize("factor", [0.0, 1.001, 2.0, -1.0, float("nan")])
def test_the_gate_refuses_another_gradient_and_another_loss(factor: float, answers: dict[tuple[str, float], dict[str, Any]]) -> None:
    stock = answers["stock", 1.0]["outputs"]
    norms = {name: value for name, value in stock.items() if name.startswith("norm")}
    largest = max(norms, key=norms.__getitem__)
    entries = [name for name in stock if name.startswith("entries")]
    for changed in ([largest], ["loss"], entries):
        scaled = {name: [value * factor for value in stock[name]] for name in changed}
        assert not difference({**stock, **scaled}, stock) <= trl_stage.TOLERANCE
    assert not difference({name: value for name, value in stock.items() if name not in norms}, stock) <= trl_stage.TOLERANCE


class StandIn:
    """Answers at once, as a process of its own would."""

    def __init__(self, name: str, *_: Any):
        self.name, self.asked = name, 0

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def ask(self, method: str, active: float) -> dict[str, Any]:
        seconds = {"stock": 3.0, "ours": 1.5, "ours_active": 1.0}[self.name] + 0.1 * self.asked
        self.asked += 1
        norm = 2.0 if self.name == "stock" else self.norm
        outputs = {"loss": [0.5], "norm of w": [norm], "entries of w": [norm, 0.0]}
        return {"seconds": seconds, "peak_bytes": 2**20, "outputs": outputs}

    norm = 2.0


def test_the_command_writes_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "trl.json"
    small = ["--tokens", "6", "--width", "16", "--vocabulary", "101", "--rounds", "1", "--output", str(output)]
    monkeypatch.setattr(trl_stage, "start_worker", StandIn)
    done = CliRunner().invoke(app, small)
    assert done.exit_code == 0, done.output
    result = json.loads(output.read_text())
    ours = next(entry for entry in result["results"] if (entry["implementation"], entry["active"]) == ("ours", 0.5))
    assert ours["faster_than_stock"] == pytest.approx(3.3 / 1.8) and len(ours["seconds"]) == 1
    output.unlink()

    monkeypatch.setattr(StandIn, "norm", 2.001)
    done = CliRunner().invoke(app, small)
    assert isinstance(done.exception, RuntimeError) and "No times are reported" in str(done.exception)
    assert not output.exists(), "no file on a red gate"


class InThisProcess(StandIn):
    """A trainer without a process of its own."""

    def __init__(self, name: str, batch: Path, settings: LossStageSettings):
        self.worker = TrlWorker(name, batch, settings)

    def ask(self, method: str, active: float) -> dict[str, Any]:
        answer: dict[str, Any] = getattr(self.worker, method)(active=active)
        return answer


@pytest.mark.slow
def test_a_trainer_in_its_own_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them: each process imports TRL, and test_the_trainers_agree has run all of them in this one."""
    two = {name: LABELS[name] for name in ("stock", "ours")}
    monkeypatch.setattr(trl_stage, "LABELS", two)
    start = trl_stage.start_worker
    monkeypatch.setattr(trl_stage, "start_worker", lambda name, *rest: (start if name == "ours" else InThisProcess)(name, *rest))
    result = trl_stage.run(TOY, lambda line: None)
    assert {(entry["implementation"], entry["active"]) for entry in result["results"]} == {(n, a) for n in two for a in TOY.active}
    assert max(result["gate"]["largest_relative_difference"].values()) <= trl_stage.TOLERANCE


@pytest.mark.parametrize(("installed", "message"), [(None, "trl is not installed"), ("1.14.0", "trl is 1.14.0; expected one of")])
def test_a_missing_trl_is_said_in_one_line_before_anything_runs(
    installed: str | None, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def version(name: str) -> str:
        if installed is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(versions.importlib.metadata, "version", version)
    versions.refuse_other_versions.cache_clear()
    monkeypatch.setattr(bench_command, "run_suite", lambda *_: pytest.fail("it ran"))
    done = CliRunner().invoke(app, ["--output", str(tmp_path / "trl.json")])
    assert done.exit_code == 2
    (line,) = done.output.strip().splitlines()
    assert message in line and "pip install '.[bench]' in the checkout" in line


def test_bad_settings_are_refused() -> None:
    for wrong in ({"sequences": 6}, {"active": (0.3,)}, {"active": (0.0,)}, {"rounds": 0}, {"threads": 0}):
        with pytest.raises(ValueError, match="expected"):
            LossStageSettings(**wrong)
