"""What the guides replace against what replaces it, at toy size: it runs, its gate refuses what differs, and the guides say what was
measured."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from grpo_fast.benchmark import drop_ins
from grpo_fast.benchmark.drop_ins import PAIRS, DropInSettings, markdown, measured, run
from grpo_fast.benchmark.harness.gate import UnavailableError, relative_difference
from grpo_fast.benchmark.harness.suite import load
from grpo_fast.benchmark.head.implementations import TEMPERATURE, make
from grpo_fast.cli.bench_drop_ins import app

ROOT = Path(__file__).resolve().parent.parent
TOY = DropInSettings(tokens=6, width=16, vocabulary=101, rounds=1)
SHOWN = {
    "plain.md": ("plain", "`gf.linear_grpo_loss`"),
    "liger.md": ("liger", "grpo_fast's"),
    "verl.md": ("verl", "`linear_cross_entropy`"),
}


def outputs_of(pair: str, active: float) -> Any:
    """What both sides compute."""
    case = TOY.cases()[active]
    try:
        return [measured(make(name, case), case, 1)["outputs"] for name in PAIRS[pair][1]]
    except UnavailableError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("active", [1.0, 0.5])
@pytest.mark.parametrize("pair", PAIRS)
def test_both_sides_do_the_same(pair: str, active: float) -> None:
    expected, found = outputs_of(pair, active)
    assert relative_difference(found, expected) <= drop_ins.TOLERANCE
    assert all(x.abs().max() > 1e-3 for x in expected.values())
    other, _ = outputs_of(pair, 1.5 - active)
    assert relative_difference(other, expected) > 0.1, "degenerate groups must show"


def test_the_batch_straddles_the_clip_band() -> None:
    case = TOY.cases()[1.0]
    logprobs = (case.hidden @ case.weight.T / TEMPERATURE).log_softmax(-1).gather(-1, case.token_ids.unsqueeze(-1)).squeeze(-1)
    ratio = (logprobs - case.old_logprobs).exp()
    assert (ratio < 0.8).any()
    assert (ratio > 1.2).any()


@pytest.mark.parametrize("part", ["loss", "d_hidden", "d_weight"])
@pytest.mark.parametrize("factor", [0.0, -1.0, 1.002, 2.0, float("nan")])
def test_the_gate_refuses_what_differs(part: str, factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever of the three it is: the two sides of a pair are the same implementation, one of them with a wrong result."""
    honest, calls = drop_ins.measured, []

    def spoiling(*given: Any) -> dict[str, Any]:
        answer = honest(*given)
        calls.append(given)
        if len(calls) % 2 == 0:
            answer["outputs"][part] = answer["outputs"][part] * factor
        return answer

    monkeypatch.setattr(drop_ins, "measured", spoiling)
    monkeypatch.setattr(drop_ins, "PAIRS", {"plain": ("", ("eager", "eager"), (1.0,))})
    with pytest.raises(RuntimeError, match="No times are reported"):
        run(TOY, lambda line: None)


def test_the_command_writes_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make_others(name: str, *case: Any) -> Any:
        if name == "liger":
            raise UnavailableError("there is no liger. Fix: a fix")
        return make(name, *case)

    monkeypatch.setattr(drop_ins, "make", make_others)
    output = tmp_path / "drop_ins.json"
    small = ["--tokens", "6", "--width", "16", "--vocabulary", "101", "--rounds", "2", "--output", str(output)]
    done = CliRunner().invoke(app, small)
    assert done.exit_code == 0, done.output
    result = json.loads(output.read_text())
    assert [(entry["implementation"], entry["active"]) for entry in result["results"] if entry["pair"] == "plain"] == [
        ("theirs", 1.0),
        ("ours", 1.0),
        ("ours", 0.5),
    ]
    assert all(len(entry["seconds"]) == 2 and entry["median"] > 0 for entry in result["results"])
    assert "liger" in result["left_out"]
    assert "there is no liger. Fix: a fix" in done.output


def test_the_rows_of_a_table() -> None:
    def entry(implementation: str, active: float, median: float) -> dict[str, Any]:
        return {"pair": "plain", "implementation": implementation, "active": active, "median": median, "peak_bytes": 3 * 2**29}

    result = {"results": [entry("theirs", 1.0, 6.0), entry("ours", 1.0, 4.0), entry("ours", 0.5, 2.5)]}
    assert markdown(result, "plain", "ours") == [
        "| PyTorch, logits in float32 | 6.0 s | 1,536 MiB |",
        "| ours | 4.0 s (1.50x) | 1,536 MiB |",
        "| ours, half of the groups degenerate | 2.5 s (2.40x) | 1,536 MiB |",
    ]


@pytest.mark.parametrize("guide", SHOWN)
def test_the_guides_say_what_was_measured(guide: str) -> None:
    result = load(ROOT / "bench/results/drop_ins_cpu.json", "bench-drop-ins")
    expected = markdown(result, *SHOWN[guide])
    rows = [line for line in (ROOT / "docs" / guide).read_text().splitlines() if re.match(r"\|.* MiB \|$", line)]
    assert rows == expected, "the rows of this guide's table are:\n" + "\n".join(expected)
    assert torch.tensor([entry["median"] for entry in result["results"]]).min() > 0.1, "a toy's times are not for a guide"
