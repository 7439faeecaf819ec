"""docs/temperature.md: its tables and its advice are those of the results, its commands run."""

from __future__ import annotations

import json
import math
import re
import shlex
import statistics
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
from grpo_fast.demo.run import Options
from grpo_fast.study import report, sampling, sampling_setup, training_setup, training_summary
from grpo_fast.study.estimates import difference, told_apart
from grpo_fast.study.options import training_temperatures
from grpo_fast.trainer.config import GRPOConfig

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/temperature.md").read_text()
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.S) for line in block.replace("\\\n", " ").splitlines() if line]


def result(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / f"bench/results/temperature_{name}.json").read_text())
    return found


def as_markdown(rows: report.Rows) -> list[str]:
    """The lines of the table in a page."""
    _, headings, cells = rows
    return [f"| {' | '.join(line)} |" for line in (headings, ["---"] * len(headings), *cells)]


def test_the_tables_say_what_was_measured() -> None:
    trained = result("training")
    tables = [*report.sampling_tables(result("sampling")), report.matrix_table(trained), report.training_table(trained)]
    for title, *table in tables:
        expected = "\n".join(as_markdown((title, *table)))
        assert expected in PAGE, f"{title} is:\n{expected}"


@pytest.mark.parametrize("name", ["sampling", "training"])
def test_the_advice_is_quoted_as_it_was_given(name: str) -> None:
    for sentence in result(name)["reading"]["sentences"]:
        assert f"- {sentence}\n" in PAGE, sentence


def test_the_summary_is_that_of_the_runs() -> None:
    """What the file says in sum follows from the runs that it holds."""
    found = result("training")
    told = found["options"]
    schedules = training_temperatures(found["trained_at"][1:], told["steps"])
    prepared = training_setup.Prepared(Options(), schedules, told["eval_temperatures"], found["seeds"], False, Path("x.json"), found)
    assert len(prepared.runs()) == found["seeds"] * len(found["trained_at"]) and found["seeds"] >= 5
    again = training_summary.summarise(prepared)
    assert json.loads(json.dumps(again)) == {name: found[name] for name in again}


def test_the_sampling_summary_is_that_of_its_prompts() -> None:
    """Means, errors, zones and advice follow from what the file holds of each prompt; and means and errors from nothing but arithmetic."""
    found = result("sampling")
    again = sampling.summarise(found, found["temperatures"])
    assert json.loads(json.dumps(again)) == {name: found[name] for name in again}
    assert len(found["drawn"]) == len(found["rows"]) == len(found["temperatures"])
    for one, row in zip(found["drawn"], found["rows"], strict=True):
        for name, of_prompt in (("pass_at_1", "right"), ("cons_at_k", "cons_at_k"), ("distinct", "distinct"), ("zero_std", "zero_std")):
            values = one["per_prompt"][of_prompt]
            error = statistics.stdev(values) / math.sqrt(len(values))
            assert row[name]["mean"] == pytest.approx(statistics.fmean(values)) and row[name]["error"] == pytest.approx(error), name
    highest = max(found["rows"], key=lambda row: row["pass_at_1"]["mean"])
    assert found["reading"]["evaluate"] == highest["temperature"]


def test_what_the_page_concludes_is_so() -> None:
    """Its numbers are those of the files, to the last digit that is given."""
    sampled, trained = result("sampling"), result("training")
    places, labels = trained["options"]["eval_temperatures"], trained["trained_at"][1:]
    runs = {label: [run for run in trained["runs"] if run["trained_at"] == label] for label in labels}
    accuracy = {(label, at): [run["table"][i]["accuracy"] for run in runs[label]] for label in labels for i, at in enumerate(places)}
    curve = {
        label: [statistics.fmean(step) for step in zip(*(run["curves"]["accuracy"] for run in runs[label]), strict=True)]
        for label in labels
    }
    flat = [statistics.fmean(step) for step in zip(*(run["curves"]["zero_std"] for run in runs["0.2"]), strict=True)]

    def begins(label: str) -> list[float]:
        return [statistics.fmean(run["curves"]["accuracy"][:5]) for run in runs[label]]

    ahead = [step for step, (cold, warm) in enumerate(zip(curve["0.2"], curve["0.6"], strict=True), start=1) if cold > warm]
    assert ahead[:9] == list(range(6, 15)) and 15 not in ahead, "from the sixth step to the fourteenth"
    said = ["it is ahead of 0.6 from the sixth step to the fourteenth"]
    said += [f"from the thirteenth on, {min(flat[12:]):.2f} to {max(flat[12:]):.2f} of its groups"]
    for label, like, verb in (("0.6->1.4", "0.6", "differ"), ("1.4->0.6", "1.4", "differing")):
        gap = difference(begins(label), begins(like))
        said += [f"{statistics.fmean(begins(label)):.3f} and {statistics.fmean(begins(like)):.3f}", f"{verb}"]
        said += [f"by {abs(gap.mean):.3f} ± {gap.margin:.3f}"]
    colder = [difference(accuracy[label, at], accuracy[label, 0.6]) for label in labels if label != "0.2" for at in (0.0, 0.2)]
    told = sum(told_apart(gap) for gap in colder)
    said += [f"gains {min(g.mean for g in colder):.3f} to {max(g.mean for g in colder):.3f} at T = 0 and 0.2 over 0.6"]
    said += [f"{told} of {len(colder)} times by more than the margin"]
    margins = {label: difference(accuracy["0.6->1.4", 0.6], accuracy[label, 0.6]).margin for label in labels if label != "0.6->1.4"}
    others = [margin for label, margin in margins.items() if label != "1"]
    said += [f"{min(others):.3f} to {max(others):.3f}", f"but {margins['1']:.3f} for T = 1", f"stays at {min(accuracy['1', 0.6]):.3f}"]
    row = {row["temperature"]: row for row in sampled["rows"]}
    shares = [f"{row[at]['zero_std_correct']['mean']:.1%}".replace("%", " %") for at in (0.8, 1.0)]
    said += [f"{shares[0]} of the groups at 0.8 and {shares[1]} at 1 have equal rewards"]
    votes, ones = ({at: row[at][name]["mean"] for at in row} for name in ("cons_at_k", "pass_at_1"))
    said += [f"{max(ones, key=ones.__getitem__):g} for pass@1, {max(votes, key=votes.__getitem__):g} for the majority of eight"]
    of_prompts = {one["temperature"]: one["per_prompt"]["cons_at_k"] for one in sampled["drawn"]}
    gap = difference(of_prompts[0.4], of_prompts[0.6])
    said += [f"the vote at 0.4 is ahead of that at 0.6 by {gap.mean:.3f} ± {gap.margin:.3f}"]
    page = " ".join(PAGE.split())
    assert [words for words in said if words not in page] == []


@pytest.mark.parametrize("name", ["sampling", "training"])
def test_results_name_their_machine_and_are_no_quick_look(name: str) -> None:
    found = result(name)
    machine = found["machine"]
    assert machine["cpu"] and machine["torch"] and re.fullmatch(r"[0-9a-f]{7,}", machine["commit"])
    assert machine["cpu"] in PAGE and machine["torch"].partition("+")[0] in PAGE
    assert not found.get("quick") and not any("--quick" in sentence for sentence in found["reading"]["sentences"])
    assert (ROOT / f"bench/results/temperature_{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_commands_of_the_results_are_those_that_made_them() -> None:
    made = {Path(command.split("--output ")[1]).stem.removeprefix("temperature_"): command for command in COMMANDS if "--output" in command}
    args = [*shlex.split(made["sampling"])[3:], "--output", "elsewhere.json"]
    prepared = sampling_setup.prepare(args, GRPOConfig)
    found = result("sampling")
    assert [row["temperature"] for row in found["rows"]] == prepared.temperatures
    assert found["prompts"] == len(prepared.rows) == len(found["drawn"][0]["per_prompt"]["right"])
    assert prepared.result["options"] == found["options"]
    asked = training_setup.prepare([*shlex.split(made["training"])[3:], "--output", "elsewhere.json"])
    found = result("training")
    assert asked.labels == found["trained_at"] and asked.seeds == found["seeds"] and asked.result["options"] == found["options"]


def test_every_command_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a small model in place of one from the hub, a few short completions, and the first steps of a training."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    tokenizer = make_tokenizer()
    make_model(tokenizer).save_pretrained("model")
    tokenizer.save_pretrained("model")
    Path("sums.yaml").write_text("model: ./model\ndataset: reasoning_gym:chain_sum\nrewards: [task, format]\noutput_dir: runs/sums\n")
    readme = re.findall(r"^grpo-fast study.*$", (ROOT / "README.md").read_text(), re.M)
    assert len(readme) == 1 and readme[0] in COMMANDS and len(COMMANDS) == 5
    for number, command in enumerate(COMMANDS):
        args = shlex.split(command.replace("Qwen/Qwen3-0.6B", "./model"))[1:]
        few = {
            "training": ["--seeds", "1", "--steps", "1", "--warm_start_steps", "1", "--eval_temperatures", "0.6"],
            "sampling": ["--prompts", "2", "--rounds", "1", "--samples", "2", "--warm_start_steps", "1", "--use_cpu"],
        }[args[1]]
        done = CliRunner().invoke(cli.app, [*args, "--quick", *few, "--output", f"{number}.json"])
        assert done.exit_code == 0, (command, done.output)
        assert Path(f"{number}.json").is_file() and Path(f"{number}.csv").is_file() and Path(f"{number}.png").is_file()


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", PAGE):
        if "://" not in target:
            assert (ROOT / "docs" / target).exists(), target
