"""``grpo-fast study``: both commands from end to end at toy size, what they resume, and what they refuse."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("transformers")
pytest.importorskip("datasets")
pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")

from grpo_fast import cli, reference
from grpo_fast.demo.model import imitate, make_model
from grpo_fast.demo.run import warm_started
from grpo_fast.demo.task import Teacher, make_tokenizer, question, split_questions
from grpo_fast.generation import Completion
from grpo_fast.grpo_config import GRPOConfig
from grpo_fast.study import draw, prepare, report, training
from grpo_fast.study import sampling as study

ROWS = [question(digits) for digits in ("5281", "3316", "9070", "4498")]
FAST = ["--use_cpu", "--max_completion_length", "6", "--per_device_eval_batch_size", "64"]
TRAIN = ["--steps", "3", "--warm_start_steps", "2", "--prompts", "3", "--group_size", "4", "--evaluation_prompts", "3"]
TRAIN += ["--eval_temperatures", "0", "1.0", "--output", "training.json"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demonstration's model, barely begun, and rows for it."""
    import datasets

    folder = tmp_path_factory.mktemp("study")
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    imitate(model, tokenizer, split_questions()[0], Teacher(), steps=12, max_new_tokens=32, seed=0)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "study_rewards.py").write_text(
        "def odd_first(completion_ids, **columns):\n    return [float(ids[0] % 2) for ids in completion_ids]\n\n\n"
        "def blind(completion_ids, **columns):\n    return [None] * len(completion_ids)\n"
    )
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    return folder


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for name in ("model", "rows.jsonl", "study_rewards.py"):
        (tmp_path / name).symlink_to(folder / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def run(*arguments: str, status: int = 0) -> str:
    result = CliRunner().invoke(cli.app, ["study", *arguments], env={"COLUMNS": "400"})
    assert result.exit_code == status, (result.output, result.exception)
    return result.output


def sampled(*arguments: str, status: int = 0) -> str:
    return run("sampling", "--model", "./model", "--dataset", "rows.jsonl", *FAST, "--output", "found.json", *arguments, status=status)


def probability_of_odd(model: Any, tokenizer: Any, temperature: float) -> float:
    """Of an odd first token, over the prompts, in float64."""
    odd = torch.arange(len(tokenizer)) % 2 == 1
    ids = tokenizer([row["prompt"] for row in ROWS], return_tensors="pt")
    with torch.no_grad():
        logits = model.double()(**ids).logits[:, -1]
    return (logits / temperature).softmax(-1)[:, odd].sum(-1).mean().item()


# ---- sampling


def test_sampling_from_the_command_line(here: Path) -> None:
    """pass@1 is what the model's own probabilities say it must be, at each temperature; every file holds the same."""
    from transformers import AutoModelForCausalLM

    rewards = ["--rewards", "study_rewards.py:odd_first", "format", "--correct", "study_rewards.py:odd_first"]
    out = sampled(*rewards, "--temperatures", "1.6", "0", "0.5", "--samples", "8", "--rounds", "24", "--seed", "3")
    found = json.loads(Path("found.json").read_text())
    assert [row["temperature"] for row in found["rows"]] == [0.0, 0.5, 1.6]
    assert (found["prompts"], found["options"]["samples"], found["options"]["rounds"]) == (4, 8, 24)
    model, tokenizer = AutoModelForCausalLM.from_pretrained("model"), make_tokenizer()
    expected = {temperature: probability_of_odd(model, tokenizer, temperature) for temperature in (0.5, 1.6)}
    assert abs(expected[0.5] - expected[1.6]) > 0.1, "or the temperature is not tested"
    greedy, *warm = found["rows"]
    for row in warm:
        at_1 = row["pass_at_1"]
        assert abs(at_1["mean"] - expected[row["temperature"]]) < 4 * at_1["sampling_error"] < 0.08
        assert row["sampler_gap"] < 1e-4 and row["distinct"]["mean"] > 0.25
        assert row["pass_at_k"]["mean"] >= at_1["mean"]
    assert greedy["sampler_gap"] is None and greedy["entropy"] == 0.0 and greedy["entropy_at_1"] > 0
    assert greedy["zero_std"]["mean"] == 1.0 and greedy["distinct"]["mean"] == 1 / 8 and greedy["pass_at_1"]["sampling_error"] == 0
    assert set(greedy["right"]) <= {0.0, 1.0}

    lines = list(csv.DictReader(Path("found.csv").read_text().splitlines()))
    assert [float(line["pass_at_1"]) for line in lines] == [row["pass_at_1"]["mean"] for row in found["rows"]]
    assert [float(line["pass_at_1_error"]) for line in lines] == [row["pass_at_1"]["error"] for row in found["rows"]]
    assert [line["zone"] for line in lines] == [zoned["zone"] for zoned in found["reading"]["zones"]]
    assert Path("found.png").read_bytes().startswith(b"\x89PNG")
    for sentence in found["reading"]["sentences"]:
        assert sentence in out
    for line in (f"{row['pass_at_1']['mean']:.3f}±{row['pass_at_1']['error']:.3f}" for row in found["rows"]):
        assert line in out
    assert found["machine"]["torch"] == torch.__version__ and found["correct"] == "odd_first"


def made(*arguments: str, rewards: tuple[str, ...] = ("accuracy", "format"), width: str = "64") -> prepare.Prepared:
    given = ["--model", "./model", "--dataset", "rows.jsonl", *FAST, "--output", "found.json", "--per_device_eval_batch_size", width]
    return prepare.prepare([*given, "--rewards", *rewards, *arguments], GRPOConfig)


@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0, 1.7])
def test_entropies_against_the_reference_in_float64(here: Path, temperature: float) -> None:
    prepared = made("--samples", "3")
    model = prepare.load_model(prepared)
    call = draw.Drawer(prepared, model).call(range(1, 4), temperature, 0)
    copies = call.drawn[::3] if temperature == 0 else call.drawn
    prompts = [row["prompt"] for row in (call.rows[::3] if temperature == 0 else call.rows)]
    at_t, at_1, tokens = 0.0, 0.0, 0
    exact = model.double()
    for prompt, completion in zip(prompts, copies, strict=True):
        ids = prepared.tokenizer(prompt)["input_ids"]
        with torch.no_grad():
            logits = exact(torch.tensor([ids + completion.token_ids])).logits[:, len(ids) - 1 : -1]
        answer = torch.tensor([completion.token_ids])
        at_1 += reference.token_statistics(logits, answer)[1].sum().item()
        if temperature > 0:
            at_t += reference.token_statistics(logits, answer, temperature)[1].sum().item()
        tokens += len(completion.token_ids)
    assert call.sums[:3] == (pytest.approx(at_t, rel=1e-5), pytest.approx(at_1, rel=1e-5), tokens)
    assert at_1 > 0.1 * tokens


class Counting:
    """A sampler whose answers say which prompt they are to, and the how-manieth answer: token 7 + number of the answer, three at most."""

    def __init__(self) -> None:
        self.asked: dict[tuple[int, ...], int] = {}
        self.closed = False

    def generate(self, prompts: list[list[int]], params: Any) -> list[Completion]:
        found = []
        for prompt in prompts:
            number = self.asked.get(tuple(prompt), 0)
            self.asked[tuple(prompt)] = number + 1
            found.append(Completion([prompt[-2], 7 + number, 1], True))
        return found

    def update_weights(self, model: Any, step: int) -> None: ...

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize("width", ["1", "4", "5", "64"])
def test_completions_stand_prompt_by_prompt_and_round_by_round(here: Path, monkeypatch: pytest.MonkeyPatch, width: str) -> None:
    """However many prompts a call of the sampler has."""
    sampler = Counting()
    monkeypatch.setattr(draw, "make_sampler", lambda *args, **options: sampler)
    prepared = made("--samples", "2", "--rounds", "3", width=width)
    model = prepare.load_model(prepared)
    told: list[tuple[int, int]] = []
    drawn = draw.Drawer(prepared, model).at(0.7, lambda temperature, done, total: told.append((done, total)))
    last = [row["prompt"][-2] for row in ROWS]  # the digit before "="
    numbers = [prepared.tokenizer.decode([7 + i]) for i in range(6)]
    assert drawn.texts == [f"{digit}{number}" for digit in last for number in numbers]
    assert [done for done, _ in told] == list(range(1, told[-1][1] + 1)) and told[-1][0] == told[-1][1]
    sampler.asked.clear()
    greedy = draw.Drawer(prepared, model).at(0.0, lambda temperature, done, total: None)
    assert greedy.texts == [f"{digit}{numbers[0]}" for digit in last for _ in range(6)]
    assert set(sampler.asked.values()) == {1}, "greedy decoding is not done twice"
    sampler.asked.clear()
    prepared.temperatures = [0.7]
    study.run(prepared, model)
    assert sampler.closed


def test_rounds_differ_and_the_seed_repeats_them(here: Path) -> None:
    def texts(seed: str) -> list[str]:
        prepared = made("--samples", "2", "--rounds", "2", "--seed", seed)
        drawn = draw.Drawer(prepared, prepare.load_model(prepared)).at(1.5, lambda temperature, done, total: None)
        return drawn.texts

    first = texts("5")
    rounds = [first[start : start + 2] for start in range(0, len(first), 2)]
    assert rounds[0::2] != rounds[1::2] and len(first) == 4 * 4
    assert texts("5") == first != texts("6")


def test_a_sampler_at_another_temperature_is_found_out(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Hotter(Counting):
        def generate(self, prompts: list[list[int]], params: Any) -> list[Completion]:
            return [Completion(c.token_ids, True, [-0.1] * 3) for c in super().generate(prompts, params)]

    monkeypatch.setattr(draw, "make_sampler", lambda *args, **options: Hotter())
    prepared = made("--samples", "2", "--rounds", "1", "--temperatures", "1.0")
    sentences = study.run(prepared, prepare.load_model(prepared))["reading"]["sentences"]
    assert any("The sampler's log-probabilities differ from the loss's by" in sentence for sentence in sentences)


def test_the_file_of_a_training_is_taken_and_the_command_line_wins(here: Path) -> None:
    Path("sums.yaml").write_text(
        "model: ./model\ndataset: rows.jsonl\nrewards: [accuracy, format]\noutput_dir: runs/sums\nlearning_rate: 1e-6\n"
        "per_device_train_batch_size: 8\nmax_completion_length: 5\nuse_cpu: true\ntop_p: 0.9\n"
    )
    given = ["sums.yaml", "--temperatures", "0.8", "--samples", "2", "--rounds", "1", "--prompts", "3", "--output", "out/found.json"]
    run("sampling", *given)
    found = json.loads(Path("out/found.json").read_text())
    assert found["prompts"] == 3 and found["options"]["top_p"] == 0.9 and found["options"]["max_completion_length"] == 5
    assert found["rows"][0]["length"]["mean"] <= 5 and found["rows"][0]["format"] is not None
    assert not Path("runs").exists()


def test_the_demonstrations_model_and_quick(here: Path) -> None:
    out = run(
        "sampling", "--model", "demo", "--dataset", "demo", "--rewards", "accuracy", "format", "--use_cpu", "--quick", "--samples", "3"
    )
    assert "This was --quick: its figures mean nothing." in out
    found = json.loads(Path("runs/study/sampling_quick.json").read_text())
    assert found["prompts"] == 8 and found["options"]["samples"] == 3, "what is said wins"
    assert len(found["rows"]) == 5 and found["options"]["ngram"] == 6 and found["rows"][0]["coherence"] is not None


# ---- what sampling refuses

WRONG = {
    "temperatures has '-0.5'; expected a number of at least 0": ["--temperatures", "0.6", "-0.5"],
    "temperatures has 'warm'; expected a number": ["--temperatures", "warm"],
    "samples is 0; expected a whole number of at least 1": ["--samples", "0"],
    "rounds is -1; expected a whole number of at least 1": ["--rounds", "-1"],
    "prompts is 0; expected a whole number of at least 1": ["--prompts", "0"],
    "ngram is 0; expected a whole number of at least 1": ["--ngram", "0"],
    "keep is 1.0; expected a number above 0 and below 1": ["--keep", "1.0"],
    "correct is 'length'; expected one of the rewards: accuracy": ["--correct", "length"],
    "no reward says whether an answer is right: rewards are format;": ["--rewards", "format"],
    "output is 'found.txt'; expected the name of a .json file": ["--output", "found.txt"],
    "reward 'accuracy_reward' needs 'answer'": ["--dataset", "no_answers.jsonl"],
    "there is no --tempratures. Did you mean temperatures": ["--tempratures", "1"],
    "'nowhere'": ["--model", "./nowhere"],
    "there is no such file": ["--dataset", "nowhere.jsonl"],
}


@pytest.mark.parametrize("message", WRONG)
def test_sampling_refuses_before_any_work(here: Path, monkeypatch: pytest.MonkeyPatch, message: str) -> None:
    def load_model(prepared: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(prepare, "load_model", load_model)
    Path("no_answers.jsonl").write_text('{"prompt": "sort 1="}\n')
    out = sampled("--rewards", "accuracy", *WRONG[message], status=2)
    assert message.replace("'nowhere'", "./nowhere") in out
    assert not list(here.glob("found*"))


def test_missing_packages_and_missing_rewards_are_named(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "rewards is not set" in sampled(status=2)
    assert "model is not set" in run("sampling", "--dataset", "rows.jsonl", status=2)
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: None if name == "matplotlib" else find(name, *more))
    cure = "the study needs matplotlib, which is not installed. Cure: pip install '.[{}]'"
    assert cure.format("train,plot") in sampled("--rewards", "accuracy", status=2)
    assert cure.format("demo,train") in run("training", *TRAIN, status=2)
    assert cure.format("train,plot") in run("sampling", "--help", status=2)


def test_where_no_prompt_can_be_scored_it_is_said(here: Path) -> None:
    rewards = ["--rewards", "study_rewards.py:blind", "--correct", "study_rewards.py:blind"]
    out = sampled(*rewards, "--temperatures", "1.0", "--samples", "2", "--rounds", "1")
    assert "No completion could be scored by blind" in out
    assert json.loads(Path("found.json").read_text())["prompts_without_answer"] == 4


def test_an_unknown_study_and_the_help() -> None:
    assert "there is no study 'cooking'; expected sampling or training" in run("cooking", status=2)
    assert "usage: grpo-fast study sampling" in run("--help") and "usage" in run(status=2)
    out = run("sampling", "--help")
    assert "--temperatures" in out and "--max_completion_length" in out and "--prompt_template" in out and "CosineLengthReward" not in out
    assert "--eval_temperatures" in run("training", "--help")


# ---- training


def cells(found: dict[str, Any]) -> list[tuple[int, str]]:
    return [(each["seed"], each["trained_at"]) for each in found["runs"]]


def test_training_from_the_command_line_interrupted_resumed_and_extended(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[int] = []

    def counted(options: Any) -> Any:
        starts.append(options.seed)
        return warm_started(options)

    monkeypatch.setattr(training, "warm_started", counted)
    given = ["training", *TRAIN, "--temperatures", "0.5", "0.6->1.4"]
    whole = run(*given, "--seeds", "2")
    found = json.loads(Path("training.json").read_text())
    labels = ["before", "0.5", "0.6->1.4"]
    assert cells(found) == [(seed, label) for seed in (0, 1) for label in labels]
    assert starts == [0, 1], "one warm start for all temperatures of a seed"
    before, cold, rising = found["runs"][:3]
    assert before["curves"] == {} and [quality["temperature"] for quality in before["table"]] == [0.0, 1.0]
    assert cold["curves"]["temperature"] == [0.5] * 3
    assert rising["curves"]["temperature"] == pytest.approx([0.6, 1.0, 1.4])
    assert all(len(curve) == 3 for curve in rising["curves"].values())
    assert min(rising["curves"]["zero_std"]) < 1, "or nothing is trained, and no run could disturb the next"
    assert cold["curves"]["entropy"][0] < rising["curves"]["entropy"][0], "the same weights are more certain at 0.5 than at 0.6"
    assert all(sentence in whole for sentence in found["reading"]["sentences"])
    assert Path("training.png").read_bytes().startswith(b"\x89PNG")
    lines = list(csv.DictReader(Path("training.csv").read_text().splitlines()))
    assert len(lines) == 2 * 3 * 2 and {line["trained_at"] for line in lines} == set(labels)

    # Killed after two of its runs, it goes on: what was there stays, what is made again is the same.
    cell = training._cell

    def dies(prepared: Any, start: Any, seed: int, label: str, on_step: Any) -> Any:
        if label == "0.6->1.4":
            raise KeyboardInterrupt
        return cell(prepared, start, seed, label, on_step)

    Path("training.json").unlink()
    with monkeypatch.context() as patched:
        patched.setattr(training, "_cell", dies)
        assert "interrupted" in run(*given, "--seeds", "2", status=130)
    partial = json.loads(Path("training.json").read_text())
    assert cells(partial) == [(0, "before"), (0, "0.5")]
    starts.clear()
    run(*given, "--seeds", "2")
    again = json.loads(Path("training.json").read_text())
    assert again["runs"][:2] == partial["runs"] and cells(again) == cells(found) and starts == [0, 1]
    assert [each["curves"] for each in again["runs"]] == [each["curves"] for each in found["runs"]]
    assert [each["table"] for each in again["runs"]] == [each["table"] for each in found["runs"]]
    assert again["matrix"] == found["matrix"] and again["reading"] == found["reading"]

    # Nothing is left to do; one more temperature is; and a narrower question is answered from the same file.
    starts.clear()
    run(*given, "--seeds", "2")
    assert starts == []
    run("training", *TRAIN, "--temperatures", "0.5", "2", "--seeds", "1")
    wider = json.loads(Path("training.json").read_text())
    assert starts == [0] and cells(wider) == [*cells(found), (0, "2")] and wider["trained_at"] == ["before", "0.5", "2"]
    assert wider["seeds"] == 1 and wider["matrix"]["0.5"]["1"]["accuracy"]["error"] is None

    # Other settings are another study.
    changed = run("training", *TRAIN, "--steps", "4", status=2)
    assert "a study with steps = 3, and now steps is 4; expected the same, to go on with it. Cure: another --output" in changed
    assert json.loads(Path("training.json").read_text()) == wider


def test_means_errors_and_advice_over_seeds_worked_by_hand(tmp_path: Path) -> None:
    """Three seeds; at T = 1 the second training is better on each by 0.1 or so, at T = 0 nothing is told."""
    accuracy = {"before": [(0.0, 0.2)] * 3, "0.6": [(0.9, 0.5), (0.8, 0.6), (0.7, 0.4)], "1": [(0.8, 0.61), (0.9, 0.7), (0.7, 0.51)]}
    runs = []
    for label, of_seeds in accuracy.items():
        for seed, pair in enumerate(of_seeds):
            table = [{"temperature": t, "samples": 8, "accuracy": value} for t, value in zip((0.0, 1.0), pair, strict=True)]
            curve = [0.0] * 5 + [0.5] * 10 + [0.2 * seed] * 5
            curves = {} if label == "before" else dict.fromkeys(training.CURVES, curve)
            runs.append({"seed": seed, "trained_at": label, "curves": curves, "table": table})
    schedules = {"0.6": {}, "1": {}}
    told = {"eval_temperatures": [0.0, 1.0]}
    result = {"runs": runs, "options": told}
    prepared = training.Prepared(training.Options(), schedules, [0.0, 1.0], 3, False, tmp_path / "x.json", result)
    found = training.summarise(prepared)
    cell = found["matrix"]["0.6"]["1"]["accuracy"]
    assert cell["mean"] == pytest.approx(0.5) and cell["error"] == pytest.approx(0.1 / math.sqrt(3))
    assert found["training"]["1"]["entropy"]["first"]["mean"] == 0.0
    assert found["training"]["1"]["entropy"]["last"]["mean"] == pytest.approx(0.2)
    sentences = found["reading"]["sentences"]
    assert "Evaluated at T = 1: best trained at 1 (0.607)." in sentences
    assert "Evaluated at T = 0: the trainings cannot be told apart (highest: 0.800, of 0.6)." in sentences
    assert found["reading"]["train"] == "0.6" and found["reading"]["evaluate"] == 0.0
    assert found["reading"]["tied"] == [["1", 0.0], ["1", 1.0]]
    assert report.matrix_table(result | found)[2][1] == ["0.6", "0.800 ± 0.058", "0.500 ± 0.058"]
    assert report.as_markdown(("", ["a", "b"], [["1", "2"]])) == ["| a | b |", "| --- | --- |", "| 1 | 2 |"]

    for one in runs:
        for quality in one["table"]:
            quality["accuracy"] = 0.0
    nothing = training.summarise(prepared)["reading"]
    assert nothing["train"] is None and nothing["evaluate"] is None
    assert [sentence.split(",")[0] for sentence in nothing["sentences"]] == ["No answer was right after any training"]


def test_a_long_list_is_cut() -> None:
    names = [str(i) for i in range(10)]
    assert training._few(names[:8]) == "0, 1, 2, 3, 4, 5, 6, 7" and training._few(names, "; ", 2) == "0; 1; and 8 more"


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
        (["--loss_type", "ppo"], "loss_type is 'ppo'"),
    ],
)
def test_training_refuses_before_any_work(here: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str) -> None:
    def warm(options: Any) -> None:
        raise AssertionError("work was begun")

    monkeypatch.setattr(training, "warm_started", warm)
    Path("broken.json").write_text("{")
    Path("other.json").write_text('{"kind": "cpu"}')
    assert message in run("training", *TRAIN, *arguments, status=2)
    assert not Path("training.json").exists() and Path("other.json").read_text() == '{"kind": "cpu"}'


def test_quick_training(here: Path) -> None:
    out = run("training", "--quick", "--temperatures", "1.0", "--eval_temperatures", "1.0")
    assert "This was --quick: its figures mean nothing." in out and "One seed has no errors" in out
    assert json.loads(Path("runs/study/training_quick.json").read_text())["options"]["steps"] == 3
