"""docs/temperature.md: its tables and its advice are those of the results, its commands run."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

pytest.importorskip("transformers")
pytest.importorskip("datasets")
pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")
pytest.importorskip("reasoning_gym")

from grpo_fast import cli
from grpo_fast.demo.model import make_model
from grpo_fast.demo.run import Options
from grpo_fast.demo.task import make_tokenizer
from grpo_fast.grpo_config import GRPOConfig
from grpo_fast.study import matrix, prepare, prepare_training, report
from grpo_fast.study.options import training_temperatures

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
    prepared = prepare_training.Prepared(Options(), schedules, told["eval_temperatures"], found["seeds"], False, Path("x.json"), found)
    assert len(prepared.runs()) == found["seeds"] * len(found["trained_at"]) and found["seeds"] >= 5
    again = matrix.summarise(prepared)
    assert json.loads(json.dumps(again)) == {name: found[name] for name in again}


@pytest.mark.parametrize("name", ["sampling", "training"])
def test_results_name_their_machine_and_are_no_quick_look(name: str) -> None:
    found = result(name)
    machine = found["machine"]
    assert machine["cpu"] and machine["torch"] and re.fullmatch(r"[0-9a-f]{7,}", machine["commit"])
    assert machine["cpu"] in PAGE and machine["torch"].partition("+")[0] in PAGE
    assert not found["options"].get("quick") and not any("--quick" in sentence for sentence in found["reading"]["sentences"])
    assert (ROOT / f"bench/results/temperature_{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_commands_of_the_results_are_those_that_made_them() -> None:
    made = {Path(command.split("--output ")[1]).stem.removeprefix("temperature_"): command for command in COMMANDS if "--output" in command}
    args = shlex.split(made["sampling"])[3:]
    prepared = prepare.prepare(args, GRPOConfig)
    found = result("sampling")
    assert [row["temperature"] for row in found["rows"]] == prepared.temperatures
    assert found["prompts"] == len(prepared.rows) == len(found["rows"][0]["right"])
    for name, value in found["options"].items():
        assert getattr(prepared.options if hasattr(prepared.options, name) else prepared.config, name) == value, name
    asked = prepare_training.prepare([*shlex.split(made["training"])[3:], "--output", "elsewhere.json"])
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
