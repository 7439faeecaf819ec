"""What the guides replace against what replaces it, at toy size: it runs, its gate refuses what differs, and the guides say what was
measured."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from grpo_fast.benchmark import drop_ins
from grpo_fast.benchmark.contestants import UnavailableError
from grpo_fast.benchmark.drop_ins import PAIRS, Settings, disagreement, make_batch, markdown, measured, run

ROOT = Path(__file__).resolve().parent.parent
TOY = Settings(tokens=6, width=16, vocabulary=101, rounds=1)
SHOWN = {
    "plain.md": ("plain", "`gf.linear_grpo_loss`"),
    "liger.md": ("liger", "this one"),
    "verl.md": ("verl", "`linear_cross_entropy`"),
}


def steps_of(pair: str) -> Any:
    try:
        return PAIRS[pair][1]()
    except UnavailableError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("active", [1.0, 0.5])
@pytest.mark.parametrize("pair", PAIRS)
def test_both_sides_do_the_same(pair: str, active: float) -> None:
    theirs, ours = steps_of(pair)
    batch, hidden, weight = make_batch(TOY)
    expected, found = (measured(step, batch, hidden, weight, active, 1)["found"] for step in (theirs, ours))
    assert disagreement(found, expected) <= drop_ins.TOLERANCE
    assert all(x.abs().max() > 1e-3 for x in expected)
    other = measured(theirs, batch, hidden, weight, 1.5 - active, 1)["found"]
    assert disagreement(other, expected) > 0.1, "degenerate groups must show"


def test_the_batch_straddles_the_clip_band() -> None:
    batch, hidden, weight = make_batch(TOY)
    logprobs = (hidden @ weight.T / drop_ins.TEMPERATURE).log_softmax(-1).gather(-1, batch["token_ids"].unsqueeze(-1)).squeeze(-1)
    ratio = (logprobs - batch["old_logprobs"]).exp()
    assert (ratio < 0.8).any()
    assert (ratio > 1.2).any()


@pytest.mark.parametrize("part", [0, 1, 2], ids=["loss", "of the hidden states", "of the weight"])
@pytest.mark.parametrize("factor", [0.0, -1.0, 1.002, 2.0, float("nan")])
def test_the_gate_refuses_what_differs(part: int, factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever of the three it is: the two sides of a pair are the same step, one of them spoilt."""
    step, _ = PAIRS["plain"][1]()
    honest = drop_ins.measured

    def spoiling(given: Any, *rest: Any) -> dict[str, Any]:
        answer = honest(step, *rest)
        if given is not step:
            found: list[Tensor] = list(answer["found"])
            found[part] = found[part] * factor
            answer["found"] = tuple(found)
        return answer

    monkeypatch.setattr(drop_ins, "measured", spoiling)
    monkeypatch.setattr(drop_ins, "PAIRS", {"plain": ("", lambda: (step, None), (1.0,))})
    with pytest.raises(RuntimeError, match="No times are given"):
        run(TOY, lambda line: None)


def test_the_command_writes_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def not_there() -> Any:
        raise UnavailableError("there is no liger. Cure: a cure")

    monkeypatch.setitem(PAIRS, "liger", (PAIRS["liger"][0], not_there, (1.0,)))
    output = tmp_path / "drop_ins.json"
    small = ["--tokens", "6", "--width", "16", "--vocabulary", "101", "--rounds", "2", "--output", str(output)]
    done = CliRunner().invoke(drop_ins.app, small)
    assert done.exit_code == 0, done.output
    result = json.loads(output.read_text())
    assert [(entry["side"], entry["active"]) for entry in result["results"] if entry["pair"] == "plain"] == [
        ("theirs", 1.0),
        ("ours", 1.0),
        ("ours", 0.5),
    ]
    assert all(len(entry["seconds"]) == 2 and entry["median"] > 0 for entry in result["results"])
    assert "liger" in result["left_out"]
    assert "there is no liger. Cure: a cure" in done.output


def test_the_rows_of_a_table() -> None:
    def entry(side: str, active: float, median: float) -> dict[str, Any]:
        return {"pair": "plain", "side": side, "active": active, "median": median, "peak_bytes": 3 * 2**29}

    result = {"results": [entry("theirs", 1.0, 6.0), entry("ours", 1.0, 4.0), entry("ours", 0.5, 2.5)]}
    assert markdown(result, "plain", "ours") == [
        "| PyTorch, logits in float32 | 6.0 s | 1,536 MiB |",
        "| ours | 4.0 s (1.50x) | 1,536 MiB |",
        "| ours, half of the groups degenerate | 2.5 s (2.40x) | 1,536 MiB |",
    ]


@pytest.mark.parametrize("guide", SHOWN)
def test_the_guides_say_what_was_measured(guide: str) -> None:
    result = json.loads((ROOT / "bench/results/drop_ins_cpu.json").read_text())
    expected = markdown(result, *SHOWN[guide])
    rows = [line for line in (ROOT / "docs" / guide).read_text().splitlines() if re.match(r"\|.* MiB \|$", line)]
    assert rows == expected, "the rows of this guide's table are:\n" + "\n".join(expected)
    assert torch.tensor([entry["median"] for entry in result["results"]]).min() > 0.1, "a toy's times are not for a guide"
