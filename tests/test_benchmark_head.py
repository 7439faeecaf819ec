"""The benchmark of heads at toy size: it runs, its gate refuses wrong gradients, its file can be drawn."""

from __future__ import annotations

import importlib.util
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import grpo_fast as gf
from grpo_fast.benchmark.harness.gate import UnavailableError
from grpo_fast.benchmark.harness.worker import WorkerError
from grpo_fast.benchmark.head import implementations, suite
from grpo_fast.benchmark.head.implementations import SEQUENCES, HeadCase, Step, arguments, make_cases
from grpo_fast.benchmark.head.suite import HeadSettings, HeadWorker
from grpo_fast.cli import bench_command
from grpo_fast.cli.bench_head import app


@pytest.fixture
def case() -> HeadCase:
    return make_cases(10 * SEQUENCES, 16, 101, torch.float32, [0.6], seed=0)[0]


def measure(name: str, case: HeadCase, trainable: bool, rounds: int) -> dict[str, Any]:
    """What a worker process answers, by a worker in this process."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save(case, Path(folder) / "case.pt")
        return HeadWorker(threads=1).measure(name, Path(folder) / "case.pt", trainable, rounds)


@pytest.mark.parametrize("share", [1.0, 0.6, 0.3, 0.125])
def test_the_share_of_active_tokens_is_exact(share: float) -> None:
    (case,) = make_cases(1024, 4, 11, torch.float32, [share], seed=0)
    active = (case.mask == 1) & (case.advantages != 0)[:, None]
    assert active.sum() == round(share * 1024)
    out = gf.linear_grpo_loss(case.hidden, case.weight, case.token_ids, case.advantages, **arguments(case))
    assert torch.equal(out.active, active) and out.metrics["clip_low"] + out.metrics["clip_high"] > 0.1


def test_the_cases_differ_in_their_activity_alone() -> None:
    full, part = make_cases(10 * SEQUENCES, 16, 101, torch.float32, [1.0, 0.6], seed=0)
    assert torch.equal(full.hidden, part.hidden) and torch.equal(full.old_logprobs, part.old_logprobs)
    for case in (full, part):
        assert case.truth.d_hidden.abs().max() > 1e-3 and case.truth.d_weight.abs().max() > 1e-3
    assert full.truth.loss != part.truth.loss


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize(
    ("name", "trainable", "frozen"),
    [
        ("roofline", 6, 4),
        ("ours", 6, 4),
        ("input", 6, 4),
        ("invariant", 6, 4),
        ("full", 6, 4),
        ("eager", 6, 4),
        ("trl", 8, 6),
        ("liger", 8, 6),
        ("cce", 6, 4),
    ],
)
def test_the_operations_are_counted(name: str, trainable: int, frozen: int, share: float) -> None:
    """Also that nobody but ours does less where fewer tokens are active, which is why the others are not timed there."""
    (like,) = make_cases(SEQUENCES, 4, 11, torch.float32, [share], seed=0)
    part = share if name in ("ours", "input", "invariant") else 1.0
    try:
        assert suite.flop_multiple(name, True, like) == trainable * part
    except UnavailableError as error:
        pytest.skip(str(error))
    assert suite.flop_multiple(name, False, like) == frozen * part


@pytest.mark.parametrize("name", ["ours", "full", "eager", "trl"])
@pytest.mark.parametrize("trainable", [True, False])
def test_implementations_pass_the_gate(name: str, trainable: bool, case: HeadCase) -> None:
    answer = measure(name, case, trainable, rounds=1)
    assert answer["right"], answer
    assert ("d_weight" in answer["errors"]) == trainable
    assert len(answer["seconds"]) == 1 and answer["seconds"][0] > 0


def test_what_is_compiled_is_called_once_before_it_is_timed(case: HeadCase, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def make(name: str, some: HeadCase) -> Step:
        ours = implementations.make("ours", some)

        def counted(hidden: Tensor, weight: Tensor) -> Tensor:
            if some.hidden.shape == case.hidden.shape:  # and not the small one on which operations are counted
                calls.append(name)
            return ours(hidden, weight)

        return counted

    monkeypatch.setattr(suite, "make", make)
    for name, expected in (("ours", 2), ("liger", 3)):
        calls.clear()
        answer = measure(name, case, True, rounds=2)
        assert answer["right"] and len(answer["seconds"]) == 2 and len(calls) == expected


@pytest.mark.parametrize("factor", [0.0, 2.0])
def test_the_gate_refuses_a_wrong_gradient(factor: float, case: HeadCase, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(name: str, some: HeadCase) -> Step:
        ours = implementations.make(name, some)

        def wrong(hidden: Tensor, weight: Tensor) -> Tensor:
            loss = ours(hidden, weight)
            return loss.detach() + factor * (loss - loss.detach())

        return wrong

    monkeypatch.setattr(suite, "make", make)
    assert not measure("ours", case, True, rounds=1)["right"]


def test_a_process_answers(case: HeadCase, tmp_path: Path) -> None:
    torch.save(case, tmp_path / "case.pt")
    answer = suite.ask_worker("ours", tmp_path / "case.pt", trainable=False, rounds=2, threads=1)
    assert answer["right"] and len(answer["seconds"]) == 2 and answer["flop_multiple"] == 4 * 0.6
    with pytest.raises(WorkerError, match="nobody"):
        suite.ask_worker("nobody", tmp_path / "case.pt", trainable=False, rounds=1, threads=1)


def test_the_command_writes_what_it_can_draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(name: str, path: Path, trainable: bool, rounds: int, threads: int) -> Any:
        return HeadWorker(threads).measure(name, path, trainable, rounds)

    monkeypatch.setattr(suite, "ask_worker", ask)  # processes take their time to start
    output = tmp_path / "head.json"
    small = [
        "--tokens",
        "48",
        "--tokens",
        "96",
        "--width",
        "16",
        "--vocabulary",
        "101",
        "--rounds",
        "2",
        "--active",
        "1",
        "--active",
        "0.5",
    ]
    chosen = ["--implementation", "roofline", "--implementation", "ours"]
    done = CliRunner().invoke(app, [*small, *chosen, "--output", str(output)])
    assert done.exit_code == 0, done.output
    result = json.loads(output.read_text())
    assert not result["skipped"]
    found = {(e["implementation"], e["active"], e["trainable"]) for e in result["results"] if e["tokens"] == 48}
    assert found == {
        *((name, 1.0, head) for name in ("roofline", "ours") for head in (True, False)),
        *(("ours", 0.5, head) for head in (True, False)),
    }
    assert all(entry["median"] > 0 and entry["times_roofline"] > 0 for entry in result["results"])
    visits = {(e["tokens"], e["implementation"]): len(e["seconds"]) for e in result["results"] if e["active"] == 1}
    assert visits == {(48, "roofline"): 4, (48, "ours"): 2, (96, "roofline"): 2, (96, "ours"): 1}
    assert result["settings"]["clock"] == "CPU time of the thread" and "N D V" in done.output
    output.with_suffix(".png").unlink()
    assert CliRunner().invoke(app, ["--plot", str(output)]).exit_code == 0
    assert output.with_suffix(".png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "cannot be read"), ("{", "cannot be read"), ("{}", "holds no results"), ("[]", "holds no results"), ("", "FILES is empty")],
)
def test_what_cannot_be_drawn_is_said(text: str | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    if text:
        file.write_text(text)
    done = CliRunner().invoke(app, ["--plot", *([] if text == "" else [str(file)])])
    assert done.exit_code == 2 and message in " ".join(done.output.replace("│", "").split())


def test_without_matplotlib_nothing_is_drawn_and_the_fix_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *package: None)
    result: dict[str, Any] = {"results": [{}], "skipped": []}
    stand_in = replace(suite.SUITE, run=lambda *_: result, print_report=lambda *_: None)
    app = bench_command.bench_app(stand_in)
    done = CliRunner().invoke(app, ["--output", str(tmp_path / "found.json")])
    assert done.exit_code == 0 and "No figure" in done.output and "pip install '.[plot]'" in done.output
    assert (tmp_path / "found.json").exists()
    done = CliRunner().invoke(app, ["--plot", str(tmp_path / "found.json")])
    assert done.exit_code == 2 and "pip install '.[plot]'" in " ".join(done.output.replace("│", "").split())


def test_bad_settings_are_refused() -> None:
    for wrong in ({"tokens": (7,)}, {"active": (0.0,)}, {"implementations": ("mine",)}, {"dtypes": ("int8",)}, {"rounds": 0}):
        with pytest.raises(ValueError, match="expected"):
            replace(HeadSettings(), **wrong)
