"""``grpo-fast study training``: from end to end at toy size, continuation, summary, advice, and settings that are refused."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

pytest.importorskip("transformers")
pytest.importorskip("datasets")
pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")

from grpo_fast.cli import main as cli
from grpo_fast.demo.options import DemoOptions
from grpo_fast.demo.warm_start import warm_start
from grpo_fast.study import options, report, training, training_setup, training_summary
from grpo_fast.utils.errors import SettingsError

pytest_plugins = ["study_cases"]
pytestmark = pytest.mark.usefixtures("figures")

TRAIN = ["--steps", "3", "--warm_start_steps", "2", "--prompts", "3", "--group_size", "4", "--evaluation_prompts", "3"]
TRAIN += ["--eval_temperatures", "0", "1.0", "--output", "training.json"]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str, status: int = 0) -> str:
    result = CliRunner().invoke(cli.app, ["study", *arguments], env={"COLUMNS": "400"})
    assert result.exit_code == status, (result.output, result.exception)
    return result.output


def stored(path: str = "training.json") -> dict[str, Any]:
    """The result, if there is one, and the measurements beside it."""
    result = json.loads(Path(path).read_text()) if Path(path).exists() else {}
    return result | json.loads(Path(path).with_suffix(".raw.json").read_text())


def cells(found: dict[str, Any]) -> list[tuple[int, str]]:
    return [(each["seed"], each["trained_at"]) for each in found["runs"]]


def test_training_from_the_command_line_interrupted_resumed_and_extended(
    here: Path, figures: list[Callable[[], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "versions", lambda: {"commit": "0000000"})
    monkeypatch.setattr(training_setup, "versions", lambda: {"commit": "0000000"})
    starts: list[int] = []

    def counted(demo: Any) -> Any:
        starts.append(demo.seed)
        return warm_start(demo)

    monkeypatch.setattr(training, "warm_start", counted)
    given = ["training", *TRAIN, "--temperatures", "0.5", "0.6->1.4"]
    whole = run(*given, "--seeds", "2")
    found = stored()
    labels = ["before", "0.5", "0.6->1.4"]
    assert cells(found) == [(seed, label) for seed in (0, 1) for label in labels]
    assert starts == [0, 1], "one warm start for all temperatures of a seed"
    before, cold, rising = found["runs"][:3]
    assert before["curves"] == {} and [quality["temperature"] for quality in before["table"]] == [0.0, 1.0]
    assert cold["curves"]["temperature"] == [0.5] * 3
    assert rising["curves"]["temperature"] == pytest.approx([0.6, 1.0, 1.4])
    assert all(len(curve) == 3 for curve in rising["curves"].values())
    assert min(rising["curves"]["zero_std"]) < 1, "otherwise nothing is trained, and no run could affect the next"
    assert cold["curves"]["entropy"][0] < rising["curves"]["entropy"][0], "the same weights are more certain at 0.5 than at 0.6"
    assert all(sentence in whole for sentence in found["advice"]["sentences"])
    told = [line for line in whole.splitlines() if line.startswith("seed ") and "━" not in line]
    assert told == [f"seed {seed}, {what}" for seed in (0, 1) for what in ("warm start", "trained at 0.5", "trained at 0.6->1.4")]
    figures[0]()
    assert Path("training.png").read_bytes().startswith(b"\x89PNG")
    lines = list(csv.DictReader(Path("training.csv").read_text().splitlines()))
    assert len(lines) == 2 * 3 * 2 and {line["trained_at"] for line in lines} == set(labels)

    # Interrupted after two runs, it continues: finished runs are kept, and the others are the same as before.
    cell = training._train_and_evaluate

    def dies(study: Any, start: Any, seed: int, label: str, on_step: Any) -> Any:
        if label == "0.6->1.4":
            raise KeyboardInterrupt
        return cell(study, start, seed, label, on_step)

    Path("training.json").unlink()
    Path("training.raw.json").unlink()
    with monkeypatch.context() as patched:
        patched.setattr(training, "_train_and_evaluate", dies)
        assert "interrupted" in run(*given, "--seeds", "2", status=130)
    assert not Path("training.json").exists()
    partial = stored()
    assert cells(partial) == [(0, "before"), (0, "0.5")]
    starts.clear()
    run(*given, "--seeds", "2")
    again = stored()
    assert again["runs"][:2] == partial["runs"] and cells(again) == cells(found) and starts == [0, 1]
    assert [each["curves"] for each in again["runs"]] == [each["curves"] for each in found["runs"]]
    assert [each["table"] for each in again["runs"]] == [each["table"] for each in found["runs"]]
    assert again["evaluation"] == found["evaluation"] and again["advice"] == found["advice"]

    # Nothing is missing; then one more temperature with fewer seeds, from the same file.
    starts.clear()
    run(*given, "--seeds", "2")
    assert starts == []
    run("training", *TRAIN, "--temperatures", "0.5", "2", "--seeds", "1")
    wider = stored()
    assert starts == [0] and cells(wider) == [*cells(found), (0, "2")] and wider["trained_at"] == ["before", "0.5", "2"]
    assert wider["seeds"] == 1 and wider["evaluation"]["0.5"]["1"]["accuracy"]["error"] is None

    # Any other setting is refused.
    others = {"steps": "4", "prompts": "2", "group_size": "3", "learning_rate": "0.01", "loss_type": "grpo", "warm_start_steps": "3"}
    others |= {"evaluation_prompts": "2", "eval_temperatures": "0.5"}
    assert set(others) == set(wider["options"])
    for name, value in others.items():
        changed = run("training", *TRAIN, f"--{name}", value, status=2)
        assert f"a study with {name} = {wider['options'][name]!r}, and now {name} is" in changed
        assert "expected the same, to go on with it. Fix: another --output" in changed
    assert "now quick is True" in run("training", *TRAIN, "--quick", status=2), "a quick study does not replace another study"
    assert stored() == wider


def test_means_errors_and_advice_over_seeds_worked_by_hand(tmp_path: Path) -> None:
    """Three seeds; at T = 1 the second training is better on each by 0.1 or so, at T = 0 no difference is significant."""
    accuracy = {"before": [(0.0, 0.2)] * 3, "0.6": [(0.9, 0.5), (0.8, 0.6), (0.7, 0.4)], "1": [(0.8, 0.61), (0.9, 0.7), (0.7, 0.51)]}
    runs: list[dict[str, Any]] = []
    for label, of_seeds in accuracy.items():
        for seed, pair in enumerate(of_seeds):
            table = [{"temperature": t, "samples": 8, "accuracy": value} for t, value in zip((0.0, 1.0), pair, strict=True)]
            curve = [0.0] * 5 + [0.5] * 10 + [0.2 * seed] * 5
            curves = {} if label == "before" else dict.fromkeys(training_setup.CURVES, curve)
            runs.append({"seed": seed, "trained_at": label, "curves": curves, "table": table})
    schedules: dict[str, Any] = {"0.6": {}, "1": {}}
    told = {"eval_temperatures": [0.0, 1.0]}
    result = {"runs": runs, "options": told}
    study = training_setup.TrainingStudy(DemoOptions(), schedules, [0.0, 1.0], 3, False, tmp_path / "x.json", result)
    found = training_summary.summarize_training(study)
    cell = found["evaluation"]["0.6"]["1"]["accuracy"]
    assert cell["mean"] == pytest.approx(0.5) and cell["error"] == pytest.approx(0.1 / math.sqrt(3))
    assert found["training"]["1"]["entropy"]["first"]["mean"] == 0.0
    assert found["training"]["1"]["entropy"]["last"]["mean"] == pytest.approx(0.2)
    sentences = found["advice"]["sentences"]
    assert "Evaluated at T = 1: best trained at 1 (0.607)." in sentences
    assert "Evaluated at T = 0: no significant difference between the trainings (highest: 0.800, of 0.6)." in sentences
    assert found["advice"]["train"] == "0.6" and found["advice"]["evaluate"] == 0.0
    assert found["advice"]["tied"] == [["1", 0.0], ["1", 1.0]]
    assert report.evaluation_table(result | found)[2][1] == ["0.6", "0.800 ± 0.058", "0.500 ± 0.058"]

    alone = training_setup.TrainingStudy(DemoOptions(), {"0.6": schedules["0.6"]}, [0.0], 3, False, tmp_path / "x.json", result)
    assert (
        training_summary.summarize_training(alone)["advice"]["sentences"][-1]
        == "Train at 0.6 and evaluate at T = 0: the only accuracy of the table, 0.800."
    )
    for one in runs:
        if one["trained_at"] == "0.6":
            one["table"][0]["accuracy"] += 0.5
    certain = training_summary.summarize_training(study)["advice"]["sentences"][-1]
    assert certain == "Train at 0.6 and evaluate at T = 0: the highest accuracy of the table, 1.300, significantly above all others."

    for one in runs:
        for quality in one["table"]:
            quality["accuracy"] = 0.0
    nothing = training_summary.summarize_training(study)["advice"]
    assert nothing["train"] is None and nothing["evaluate"] is None
    assert [sentence.split(",")[0] for sentence in nothing["sentences"]] == ["No answer was correct after any training"]


def test_a_tie_is_not_decided_by_rounding() -> None:
    """0.1 + 0.2 is larger than 0.3 in the last bit: the first of the two is the best all the same."""
    ends = {"first": {"mean": 0.5, "error": 0.1, "by_seed": [0.5]}, "last": {"mean": 0.5, "error": 0.1, "by_seed": [0.5]}}
    training: dict[str, Any] = {label: {"zero_std": ends, "entropy": ends} for label in ("1", "1.3")}
    found = training_summary.advise_training({"1": {"0": [0.3, 0.3]}, "1.3": {"0": [0.1 + 0.2, 0.3]}}, training, ["1", "1.3"], ["0"])
    assert found["train"] == "1" and "of 1)" in found["sentences"][0]


def test_a_long_list_is_shortened() -> None:
    names = [str(i) for i in range(10)]
    assert (
        training_summary._shorten(names[:8]) == "0, 1, 2, 3, 4, 5, 6, 7" and training_summary._shorten(names, "; ", 2) == "0; 1; and 8 more"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperatures", "0"], "temperatures has '0'; expected a number above 0"),
        (["--temperatures", "0.6->hot"], "temperatures has '0.6->hot'; expected a number above 0, or two as in '0.6->1.4'"),
        (["--eval_temperatures", "-1"], "eval_temperatures has '-1'; expected a number of at least 0"),
        (["--seeds", "0"], "seeds is 0; expected a whole number of at least 1"),
        (["--group_size", "1"], "group_size is 1; expected at least 2"),
        (["--evaluation_prompts", "100000"], "evaluation_prompts is 100000; expected at most 1000"),
        (["--output", "broken.json"], "which holds no JSON"),
        (["--output", "other.json"], "which holds something else"),
        (["--output", "no_machine.json"], "which holds something else"),
        (["--output", "no_options.json"], "which holds something else"),
        (["--output", "no_runs.json"], "which holds something else"),
        (["--output", "odd_options.json"], "which holds something else"),
        (["--output", "odd_run.json"], "which holds something else"),
        (["--temperatures", "1e-50"], "temperatures has '1e-50'; expected a number from 0.001 to 1000"),
        (["--temperatures", "1->1e30"], "temperatures has '1->1e30'; expected a number from 0.001 to 1000"),
        (["--eval_temperatures", "1e-320"], "eval_temperatures has '1e-320'; expected 0, or a number from 0.001 to 1000"),
        (["--loss_type", "ppo"], "loss_type is 'ppo'"),
    ],
)
def test_training_refuses_before_any_work(here: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str) -> None:
    def warm(demo: Any) -> None:
        raise AssertionError("work was begun")

    monkeypatch.setattr(training, "warm_start", warm)
    Path("broken.json").write_text("{")
    Path("other.json").write_text('{"kind": "cpu"}')
    whole: dict[str, Any] = {"kind": "temperature_training", "machine": {}, "options": {}, "runs": []}
    for broken in ("machine", "options", "runs"):
        Path(f"no_{broken}.json").write_text(json.dumps({name: value for name, value in whole.items() if name != broken}))
    Path("odd_options.json").write_text(json.dumps(whole | {"options": []}))
    Path("odd_run.json").write_text(json.dumps(whole | {"runs": [{"seed": 0, "trained_at": "0.6"}]}))
    assert message in run("training", *TRAIN, *arguments, status=2)
    assert not Path("training.json").exists() and Path("other.json").read_text() == '{"kind": "cpu"}'


def test_a_quick_study_starts_from_the_beginning(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[int] = []

    def counted(demo: DemoOptions) -> Any:
        starts.append(demo.seed)
        return warm_start(demo)

    monkeypatch.setattr(training, "warm_start", counted)
    quick = ["training", "--quick", "--temperatures", "1.0", "--eval_temperatures", "1.0"]
    out = run(*quick)
    assert "This was --quick: its figures mean nothing." in out and "With one seed there are no standard errors" in out
    found = stored("runs/study/training_quick.json")
    assert found["options"]["steps"] == 3 and len(found["runs"]) == 2
    assert "Train at 1 and evaluate at T = 1: the only accuracy of the table" in out or "No answer was correct" in out
    assert run(*quick, "--steps", "2") and starts == [0, 0], "whatever the options of the previous quick study"
    again = stored("runs/study/training_quick.json")
    assert len(again["runs"]) == 2 and again["options"]["steps"] == 2
    whole = ["--seeds", "1", "--steps", "2", "--warm_start_steps", "10", "--prompts", "4", "--evaluation_prompts", "8"]
    out = run(*quick[:1], *quick[2:], *whole, "--output", "runs/study/training_quick.json", status=2)
    assert "a study with quick = True, and now quick is False" in out


def test_each_temperature_has_a_name_of_its_own(here: Path) -> None:
    """With six digits two temperatures would have the same name, and share their results."""
    assert [options.temperature_name(t) for t in (1.0, 0.6, 0.60000001, 1e-3, 0.1 + 0.2)] == [
        "1",
        "0.6",
        "0.60000001",
        "0.001",
        "0.30000000000000004",
    ]
    given = [*TRAIN, "--steps", "1", "--seeds", "1", "--eval_temperatures", "0.1234567", "0.1234568"]
    run("training", *given, "--temperatures", "0.6")
    out = run("training", *given, "--temperatures", "0.60000001", "0.6->1.00000001")
    found = stored()
    assert [each["trained_at"] for each in found["runs"]] == ["before", "0.6", "0.60000001", "0.6->1.00000001"]
    assert set(found["evaluation"]["0.60000001"]) == {"0.1234567", "0.1234568"}
    assert "at 0.1234567" in out and "at 0.1234568" in out

    # Without the measurements the result is shown again, and cannot be extended.
    Path("training.raw.json").unlink()
    before = Path("training.json").read_bytes()
    again = run("training", *given, "--temperatures", "0.60000001", "0.6->1.00000001")
    assert all(sentence in again for sentence in found["advice"]["sentences"])
    refused = run("training", *given, "--temperatures", "0.6", status=2)
    assert "now trained_at is ['before', '0.6']; expected the same, since training.raw.json" in refused
    assert Path("training.json").read_bytes() == before and not Path("training.raw.json").exists()


@pytest.mark.parametrize("twice", [["0.6", "0.60"], ["0.6->1", "0.6->1.0"]])
def test_equal_temperatures_are_refused(twice: list[str]) -> None:
    with pytest.raises(SettingsError, match=r"twice; expected each once"):
        options.training_temperatures(twice, 3)


def test_the_smallest_and_the_largest_temperature_are_accepted() -> None:
    assert options.sampling_temperatures(["-0.0", "1000", "0.001"]) == [0.0, 0.001, 1000.0]
    assert math.copysign(1, options.sampling_temperatures(["-0.0"])[0]) == 1
    assert set(options.training_temperatures(["0.001->1000"], 3)) == {"0.001->1000"}


def test_every_evaluation_has_the_seed_of_its_run(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    evaluate = training.evaluate

    def noted(*args: Any, **more: Any) -> Any:
        seeds.append(more["seed"])
        return evaluate(*args, **more)

    monkeypatch.setattr(training, "evaluate", noted)
    run("training", *TRAIN, "--steps", "1", "--seeds", "2", "--temperatures", "1.0")
    assert seeds == [0, 0, 1, 1]


def test_runs_of_different_versions_are_reported(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["training", *TRAIN, "--steps", "1", "--temperatures", "1.0"]

    def at(commit: str, *more: str) -> str:
        for module in (training, training_setup):
            monkeypatch.setattr(module, "versions", lambda: {"torch": "2.13.0", "commit": commit})
        return run(*given, *more)

    assert "commit" not in at("aaaaaaa", "--seeds", "1")
    found = stored()
    assert [each["made_with"] for each in found["runs"]] == [{"torch": "2.13.0", "commit": "aaaaaaa"}] * 2
    assert all(len(each["load_average"]) == 2 for each in found["runs"])
    assert "commit" not in at("bbbbbbb", "--seeds", "1"), "no run is added, and all finished runs have one version"
    out = at("bbbbbbb", "--seeds", "2")
    assert "warning: the runs to be added to training.json differ from the finished ones in commit (aaaaaaa, bbbbbbb)" in out
    sentence = "The runs were not all made with the same commit (aaaaaaa, bbbbbbb)."
    again = stored()
    assert sentence in out and sentence in again["advice"]["sentences"] and again["runs"][:2] == found["runs"]

    # Earlier versions kept the measurements in the result itself, and no versions.
    for each in again["runs"]:
        del each["made_with"]
    del again["quick"]
    Path("training.json").write_text(json.dumps(again))
    Path("training.raw.json").unlink()
    assert "not all made" not in at("bbbbbbb", "--seeds", "2"), "all runs have unknown versions"
    out = at("bbbbbbb", "--seeds", "3")
    assert "the finished ones in torch (unknown, 2.13.0), commit (unknown, bbbbbbb)" in out
    assert "not all made with the same torch (unknown, 2.13.0), commit (unknown, bbbbbbb)." in out


def test_recorded_versions_are_those_installed() -> None:
    import torch
    import transformers

    import grpo_fast

    made = training_setup.versions()
    assert made["torch"] == torch.__version__ and made["transformers"] == transformers.__version__
    assert made["grpo_fast"] == grpo_fast.__version__ and made["cpu"] and "commit" in made
