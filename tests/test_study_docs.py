"""docs/temperature.md: its tables, advice and conclusions are those of the result files, and its commands run."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

pytest.importorskip("transformers")
pytest.importorskip("datasets")
pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")
pytest.importorskip("reasoning_gym")

from grpo_fast.cli import main as cli
from grpo_fast.data.tasks.sorting import make_tokenizer
from grpo_fast.demo.model import make_model
from grpo_fast.study import model_training, report, sampling_setup, training_setup, training_summary
from grpo_fast.study.estimates import Estimate, difference, is_significant
from grpo_fast.study.options import temperature_name
from grpo_fast.study.sampling_summary import COMPARED
from grpo_fast.study.temperature_regions import COLD, COLLAPSE, EXPLORATION, ROBUST
from grpo_fast.study.training_gains import not_learned

pytest_plugins = ["study_cases"]

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/temperature.md").read_text()
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.S) for line in block.replace("\\\n", " ").splitlines() if line]


def result(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / f"bench/results/temperature_{name}.json").read_text())
    return found


def as_markdown(table: report.TextTable) -> list[str]:
    """The lines of the table in a page."""
    _, headings, cells = table
    return [f"| {' | '.join(line)} |" for line in (headings, ["---"] * len(headings), *cells)]


def test_the_tables_are_those_of_the_results() -> None:
    tables = report.sampling_tables(result("sampling"))
    for name in ("training", "truncation"):
        trained = result(name)
        tables += [report.evaluation_table(trained), report.training_table(trained)]
    first_step = report.first_step_table(trained)
    assert first_step is not None
    for table in [*tables, first_step]:
        expected = "\n".join(as_markdown(table))
        assert expected in PAGE, f"{table.title} is:\n{expected}"


def test_the_tables_of_make_real_are_those_of_its_result() -> None:
    """The model learned: its gain is more than twice its error, over questions and seeds, which follow from the listed parts."""
    found = json.loads((ROOT / "bench/results/real_capitals.json").read_text())
    assert found["seeds"] == 3 and found["machine"]["cpu"] and found["options"]["eval_temperatures"] == [0.0, 0.3, 0.6, 1.0, 1.3]
    assert not_learned(found) == [] and not found["quick"] and "runs" not in found
    for cell in found["gains"]["1"].values():
        assert cell["error"] == pytest.approx(math.hypot(cell["error_questions"], cell["error_seeds"]))
    for place in ("0", "0.3", "0.6", "1", "1.3"):
        before, after = (found["evaluation"][label][place]["accuracy"]["mean"] for label in ("before", "1"))
        assert found["gains"]["1"][place]["mean"] == pytest.approx(after - before, abs=1e-5)
    for table in report.training_tables(found)[:3]:
        assert "\n".join(as_markdown(table)) in PAGE, table.title


@pytest.mark.parametrize("name", ["sampling", "training", "truncation"])
def test_the_advice_is_quoted_from_the_results(name: str) -> None:
    for sentence in result(name)["advice"]["sentences"]:
        assert f"- {sentence}\n" in PAGE, sentence


def test_the_results_hold_summaries_only() -> None:
    files = [ROOT / f"bench/results/temperature_{name}.json" for name in ("sampling", "training", "truncation")]
    assert max(file.stat().st_size for file in files) < 150_000
    assert not {"drawn", "per_prompt"} & set(result("sampling")) and "runs" not in result("training") | result("truncation")


@pytest.mark.parametrize(("name", "seeds", "steps"), [("training", 12, "steps"), ("truncation", 2, "max_steps")])
def test_the_training_summary_follows_from_its_seeds(name: str, seeds: int, steps: str) -> None:
    """Means and errors follow from the numbers of the seeds, the ends of the curves from the curves, and the advice from both."""
    found = result(name)
    labels, places = found["trained_at"][1:], [temperature_name(each) for each in found["options"]["eval_temperatures"]]
    assert found["seeds"] == seeds and set(found["evaluation"]) == {training_setup.BEFORE, *labels}
    cells = [cell for of_label in found["evaluation"].values() for place in places for cell in of_label[place].values()]
    cells += [ends[end] for of_label in found["training"].values() for ends in of_label.values() for end in ("first", "last")]
    for cell in cells:
        values = cell["by_seed"]
        assert len(values) == found["seeds"]
        rounding = 0.5 * 10 ** (1 - training_summary.DIGITS) * max(map(abs, values))  # of the values that are listed, at most
        assert cell["mean"] == pytest.approx(statistics.fmean(values), rel=1e-9, abs=rounding)
        assert cell["error"] == pytest.approx(statistics.stdev(values) / math.sqrt(len(values)), rel=1e-9, abs=1.5 * rounding + 1e-12)
    for label in labels:
        for name, ends in found["training"][label].items():
            curve = found["learning_curves"][label][name]["mean"]
            assert len(curve) == found["options"][steps]
            assert ends["first"]["mean"] == pytest.approx(statistics.fmean(curve[:5]), rel=1e-5)
            assert ends["last"]["mean"] == pytest.approx(statistics.fmean(curve[-5:]), rel=1e-5)
    accuracy = {
        label: {place: of_label[place]["accuracy"]["by_seed"] for place in places} for label, of_label in found["evaluation"].items()
    }
    again = training_summary.advise_training(accuracy, found["training"], labels, places)
    assert json.loads(json.dumps(again)) == found["advice"]


def gap_of(found: dict[str, Any], measure: str, colder: float, hotter: float) -> Estimate:
    """The paired difference of two sampling temperatures, the first minus the second."""
    (one,) = (each for each in found["comparisons"] if each["measure"] == measure and each["temperatures"] == sorted((colder, hotter)))
    return Estimate(one["mean"] if colder < hotter else -one["mean"], one["error"], found["prompts"])


def test_the_sampling_advice_follows_from_its_means_and_comparisons() -> None:
    """Regions and advice follow from the numbers of each temperature and of each pair of temperatures."""
    found = result("sampling")
    rows = {row["temperature"]: row for row in found["rows"]}
    assert list(rows) == found["temperatures"] == [one["temperature"] for one in found["runs"]]
    assert len(found["comparisons"]) == len(COMPARED) * len(rows) * (len(rows) - 1) // 2
    for measure in COMPARED:
        for at, row in rows.items():
            for other in (each for each in rows if each > at):
                gap, errors = gap_of(found, measure, at, other), (row[measure]["error"], rows[other][measure]["error"])
                assert gap.mean == pytest.approx(row[measure]["mean"] - rows[other][measure]["mean"], abs=1e-12)
                assert abs(errors[0] - errors[1]) - 1e-12 <= gap.error <= sum(errors) + 1e-12, "possible errors of a paired difference"
    best = max(rows, key=lambda at: rows[at]["pass_at_1"]["mean"])
    advice, keep = found["advice"], found["options"]["keep"]
    assert advice["evaluate"] == best
    assert advice["tied"] == [at for at in rows if at != best and not is_significant(gap_of(found, "pass_at_1", at, best))] == []
    kept = {at: row["pass_at_1"]["mean"] / rows[best]["pass_at_1"]["mean"] for at, row in rows.items()}
    collapse = min(at for at in rows if at > best and kept[at] < keep)
    expected = {at: COLD if at < best else ROBUST if at == best else EXPLORATION if at < collapse else COLLAPSE for at in rows}
    assert {one["temperature"]: one["region"] for one in advice["regions"]} == expected
    exploring = [at for at in rows if expected[at] == EXPLORATION]
    assert advice["train"] == min(exploring, key=lambda at: (rows[at]["zero_std"]["mean"], at))


def test_the_conclusions_of_the_page_follow_from_the_results() -> None:
    """Its numbers are those of the files, to the last digit that is given."""
    sampled, trained = result("sampling"), result("training")
    places, labels = trained["options"]["eval_temperatures"], trained["trained_at"][1:]
    evaluation = trained["evaluation"]
    accuracy = {(label, at): evaluation[label][temperature_name(at)]["accuracy"]["by_seed"] for label in labels for at in places}
    curve = {label: trained["learning_curves"][label]["accuracy"]["mean"] for label in labels}
    flat = trained["learning_curves"]["0.2"]["zero_std"]["mean"]

    def begins(label: str) -> list[float]:
        by_seed: list[float] = trained["training"][label]["accuracy"]["first"]["by_seed"]
        return by_seed

    ahead = [step for step, (cold, warm) in enumerate(zip(curve["0.2"], curve["0.6"], strict=True), start=1) if cold > warm]
    assert ahead[:9] == list(range(6, 15)) and 15 not in ahead, "from the sixth step to the fourteenth"
    quoted = ["it is ahead of 0.6 from the sixth step to the fourteenth"]
    quoted += [f"from the thirteenth on, {min(flat[12:]):.2f} to {max(flat[12:]):.2f} of its groups"]
    for label, like, verb in (("0.6->1.4", "0.6", "differ"), ("1.4->0.6", "1.4", "differing")):
        gap = difference(begins(label), begins(like))
        quoted += [f"{statistics.fmean(begins(label)):.3f} and {statistics.fmean(begins(like)):.3f}", f"{verb}"]
        quoted += [f"by {abs(gap.mean):.3f} ± {gap.margin:.3f}"]
    colder = [difference(accuracy[label, at], accuracy[label, 0.6]) for label in labels if label != "0.2" for at in (0.0, 0.2)]
    told = sum(is_significant(gap) for gap in colder)
    quoted += [f"gains {min(g.mean for g in colder):.3f} to {max(g.mean for g in colder):.3f} at T = 0 and 0.2 over 0.6"]
    quoted += [f"{told} of {len(colder)} times by more than the margin"]
    margins = {label: difference(accuracy["0.6->1.4", 0.6], accuracy[label, 0.6]).margin for label in labels if label != "0.6->1.4"}
    others = [margin for label, margin in margins.items() if label != "1"]
    quoted += [f"{min(others):.3f} to {max(others):.3f}", f"but {margins['1']:.3f} for T = 1", f"stays at {min(accuracy['1', 0.6]):.3f}"]
    row = {row["temperature"]: row for row in sampled["rows"]}
    shares = [f"{row[at]['zero_std_correct']['mean']:.1%}".replace("%", " %") for at in (0.8, 1.0)]
    quoted += [f"{shares[0]} of the groups at 0.8 and {shares[1]} at 1 have equal rewards"]
    votes, ones = ({at: row[at][name]["mean"] for at in row} for name in ("cons_at_k", "pass_at_1"))
    quoted += [f"{max(ones, key=ones.__getitem__):g} for pass@1, {max(votes, key=votes.__getitem__):g} for the majority of eight"]
    gap = gap_of(sampled, "cons_at_k", 0.4, 0.6)
    quoted += [f"the vote at 0.4 is ahead of that at 0.6 by {gap.mean:.3f} ± {gap.margin:.3f}"]
    page = " ".join(PAGE.split())
    assert [words for words in quoted if words not in page] == []


@pytest.mark.parametrize("name", ["sampling", "training"])
def test_results_name_their_machine_and_were_not_made_with_quick(name: str) -> None:
    found = result(name)
    machine = found["machine"]
    assert machine["cpu"] and machine["torch"] and re.fullmatch(r"[0-9a-f]{7,}", machine["commit"])
    assert machine["cpu"] in PAGE and machine["torch"].partition("+")[0] in PAGE
    assert not found.get("quick") and not any("--quick" in sentence for sentence in found["advice"]["sentences"])
    assert (ROOT / f"bench/results/temperature_{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_commands_of_the_results_are_those_that_made_them() -> None:
    made = {Path(command.split("--output ")[1]).stem.removeprefix("temperature_"): command for command in COMMANDS if "--output" in command}
    args = [*shlex.split(made["sampling"])[3:], "--output", "elsewhere.json"]
    study = sampling_setup.prepare_sampling(args)
    found = result("sampling")
    assert [row["temperature"] for row in found["rows"]] == study.temperatures
    assert found["prompts"] == len(study.rows)
    # Settings that are newer than the results, whose default is what was done then.
    since = {"chat": "auto", "repetition_penalty": 1.0, "generation_kwargs": None}
    not_read = {"scale_rewards"}  # settings that the study read then, and that changed nothing it measures
    assert study.measurements["options"] == since | {name: value for name, value in found["options"].items() if name not in not_read}
    asked = training_setup.prepare_training([*shlex.split(made["training"])[3:], "--output", "elsewhere.json"])
    found = result("training")
    assert asked.labels == found["trained_at"] and asked.seeds == found["seeds"] and asked.measurements["options"] == found["options"]


def test_the_command_of_the_truncation_is_that_which_made_its_result(monkeypatch: pytest.MonkeyPatch) -> None:
    (command,) = (command for command in COMMANDS if "temperature_truncation" in command)
    args = [os.path.expanduser(each) for each in shlex.split(command)[3:]]
    if not Path(args[args.index("--model") + 1]).is_dir():
        pytest.skip("the model of the measurement is not there; `make real-parts` builds it")
    monkeypatch.chdir(ROOT)
    found = result("truncation")
    asked = model_training.prepare_model_training([*args, "--output", "elsewhere.json"])
    assert asked.labels == found["trained_at"] and asked.seeds == found["seeds"] and asked.measurements["options"] == found["options"]


def test_every_command_runs(tmp_path: Path, figures: list[Callable[[], None]], monkeypatch: pytest.MonkeyPatch) -> None:
    """With a small model in place of one from the hub, a few short completions, and the first steps of a training; the first figure of
    either kind is drawn."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    tokenizer = make_tokenizer()
    make_model(tokenizer).save_pretrained("model")
    tokenizer.save_pretrained("model")
    Path("sums.yaml").write_text("model: ./model\ndataset: reasoning_gym:chain_sum\nrewards: [task, format]\noutput_dir: runs/sums\n")
    readme = re.findall(r"^grpo-fast study.*$", (ROOT / "README.md").read_text(), re.M)
    # tests/test_study_models.py runs the kind of the others.
    own = [command for command in COMMANDS if not command.startswith(("grpo-fast study training examples", "make "))]
    assert (
        len(readme) == 1 and readme[0] in own and len(own) == 5 and len(COMMANDS) == 8
    )  # tests/test_study_models.py runs the others' kind
    drawn: dict[str, bytes] = {}
    for number, command in enumerate(own):
        args = shlex.split(command.replace("Qwen/Qwen3-0.6B", "./model"))[1:]
        few = {
            "training": [
                "--seeds",
                "1",
                "--steps",
                "1",
                "--warm_start_steps",
                "1",
                "--eval_temperatures",
                "0.6",
                "--prompts",
                "2",
                "--group_size",
                "2",
                "--evaluation_prompts",
                "2",
            ],
            "sampling": [
                "--prompts",
                "2",
                "--rounds",
                "1",
                "--samples",
                "2",
                "--warm_start_steps",
                "1",
                "--use_cpu",
                "--max_completion_length",
                "8",
            ],
        }[args[1]]
        done = CliRunner().invoke(cli.app, [*args, "--quick", *few, "--output", f"{number}.json"])
        assert done.exit_code == 0, (command, done.output)
        assert Path(f"{number}.json").is_file() and Path(f"{number}.csv").is_file() and len(figures) == number + 1
        if args[1] not in drawn:
            figures[number]()
            drawn[args[1]] = Path(f"{number}.png").read_bytes()
    assert drawn.keys() == {"sampling", "training"} and all(figure.startswith(b"\x89PNG") for figure in drawn.values())


def test_relative_links_point_to_existing_files() -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", PAGE):
        if "://" not in target:
            assert (ROOT / "docs" / target).exists(), target
