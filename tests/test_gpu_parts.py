"""The parts of a visit to a GPU machine: their limits, and that nothing that is done is done again."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
from test_gpu_bench import few, gpu_bench, measure, run  # noqa: F401

ROOT = Path(__file__).parent.parent


@pytest.fixture
def parts(gpu_bench: ModuleType) -> ModuleType:  # noqa: F811
    return importlib.import_module("gpu_parts")


def test_every_call_is_within_its_limits(parts: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = parts.calls()
    assert [part for call in calls for part in call] == list(parts.PARTS)
    assert all(sum(part.seconds for part in call) <= 9 * 60 for call in calls)
    assert sum(part.seconds for part in parts.PARTS) <= 30 * 60
    assert all(len({name for part in call for name in part.leaves.split(", ")}) <= 6 for call in calls)
    text = parts.plan()
    for part in parts.PARTS:
        assert f"   {part.name}: {part.what}; at most {part.seconds} s" in text
    monkeypatch.delenv("BUDGET_S", raising=False)
    assert parts.budget("cluster") == 130
    monkeypatch.setenv("BUDGET_S", "7")
    assert parts.budget("cluster") == 7


def test_every_part_is_known_to_the_script(parts: ModuleType) -> None:
    script = (ROOT / "bench" / "gpu.sh").read_text()
    for part in parts.PARTS:
        assert f"|{part.name}" in script.split("[plan", 1)[1].split("]", 1)[0]
        for step in part.steps:
            assert (
                f"step {step.name} " in script
                or step.name in ("build", "preflight")
                or f"measure {step.name}" in script
                or '*) step "$name"' in script
            )


def test_a_part_is_done_by_this_machine_and_from_these_sources(parts: ModuleType, measure: ModuleType, tmp_path: Path) -> None:  # noqa: F811
    output, here = tmp_path / "gpu.json", measure.machine("cpu")
    measure.record_done(output, "test", "cpu", "abc")
    whole = json.loads(output.read_text())
    assert parts.is_done("test", whole, here, "abc")
    assert not parts.is_done("test", whole, here, "def")
    assert not parts.is_done("bench", whole, here, "abc")
    assert not parts.is_done("test", whole, here | {"device": "Another Card"}, "abc")
    assert not parts.is_done("test", whole | {"test": [{"skipped": "the time budget is spent"}]}, here, "abc")
    measure.Results(output, "bench", "cpu").add({"name": "ours"})
    assert json.loads(output.read_text())["done"] == {"test": "abc"}


def test_a_part_that_was_interrupted_goes_on(few: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """What was measured from the same sources stays; failures and what was left out are tried again."""
    output = tmp_path / "gpu.json"
    monkeypatch.setenv("GRPO_FAST_SOURCES", "abc")
    first = run(few, "bench", output, [(3, 33)])["bench"]
    first[1] = {**{k: first[1][k] for k in ("rows", "vocabulary", "step", "name")}, "skipped": "the time budget is spent"}
    first[2]["ms"] = -1.0
    output.write_text(json.dumps(json.loads(output.read_text()) | {"bench": first}))
    again = run(few, "bench", output, [(3, 33)])["bench"]
    assert len(again) == len(first) and again[-1]["name"] == first[1]["name"] and again[-1]["ms"] > 0
    assert again[:-1] == [first[0], *first[2:]]
    monkeypatch.setenv("AGAIN", "1")
    assert all(entry["ms"] > 0 for entry in run(few, "bench", output, [(3, 33)])["bench"])
    monkeypatch.delenv("AGAIN")
    monkeypatch.setenv("GRPO_FAST_SOURCES", "def")
    assert run(few, "bench", output, [(3, 33)])["built_from"] == {"bench": "def"}


def test_what_ncu_prints(gpu_bench: ModuleType) -> None:  # noqa: F811
    profile = importlib.import_module("gpu_profile")
    metrics = profile.METRICS
    names = ["ID", metrics["ms"], metrics["dram_percent"], metrics["registers"], metrics["stall_barrier"]]
    lines = [names, ["", "usecond", "%", "register/thread", ""], ["0", "1,250.5", "91.5", "72", "0.25"]]
    text = "==PROF== Connected\n" + "\n".join(",".join(f'"{cell}"' for cell in line) for line in lines)
    assert profile.parse(text) == {"ms": pytest.approx(1.2505), "dram_percent": 91.5, "registers": 72.0, "stall_barrier": 0.25}
    with pytest.raises(RuntimeError, match=r"no values.*ERR_NVGPUCTRPERM"):
        profile.parse("==ERROR== ERR_NVGPUCTRPERM")
    command = profile.command("ncu", "_token_sums_kernel")
    assert command[command.index("--clock-control") + 1] == "none" and "--launch-count" in command
