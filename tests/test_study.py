"""``grpo-fast study``: the measurement from end to end at toy size, and the settings that it refuses. Training: test_study_training.py."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets")
pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")

from study_cases import ROWS, Counting, made, run, sampled

from grpo_fast.data.tasks.sorting import make_tokenizer
from grpo_fast.generation import Completion
from grpo_fast.loss import reference
from grpo_fast.study import generate_completions, sampling, sampling_setup
from grpo_fast.study.generate_completions import TemperatureSampler

pytest_plugins = ["study_cases"]


def probability_of_odd(model: Any, tokenizer: Any, temperature: float) -> float:
    """The probability of an odd first token, averaged over the prompts, in float64."""
    odd = torch.arange(len(tokenizer)) % 2 == 1
    ids = tokenizer([row["prompt"] for row in ROWS], return_tensors="pt")
    with torch.no_grad():
        logits = model.double()(**ids).logits[:, -1]
    return (logits / temperature).softmax(-1)[:, odd].sum(-1).mean().item()


# ---- sampling


def test_sampling_from_the_command_line(here: Path) -> None:
    """pass@1 agrees with the model's own probabilities at each temperature, and JSON, CSV and output agree with each other."""
    from transformers import AutoModelForCausalLM

    rewards = ["--rewards", "study_rewards.py:odd_first", "format", "--correct", "study_rewards.py:odd_first"]
    out = sampled(*rewards, "--temperatures", "1.6", "0", "0.5", "--samples", "8", "--rounds", "24", "--seed", "3")
    found, raw = (json.loads(Path(name).read_text()) for name in ("found.json", "found.raw.json"))
    assert [row["temperature"] for row in found["rows"]] == [0.0, 0.5, 1.6]
    assert (found["prompts"], found["options"]["samples"], found["options"]["rounds"]) == (4, 8, 24)
    model, tokenizer = AutoModelForCausalLM.from_pretrained("model"), make_tokenizer()
    expected = {temperature: probability_of_odd(model, tokenizer, temperature) for temperature in (0.5, 1.6)}
    assert abs(expected[0.5] - expected[1.6]) > 0.1, "otherwise the temperature is not tested"
    greedy, *warm = found["rows"]
    for row in warm:
        at_1 = row["pass_at_1"]
        assert abs(at_1["mean"] - expected[row["temperature"]]) < 4 * at_1["sampling_error"] < 0.08
        assert row["sampler_gap"] < 1e-4 and row["distinct"]["mean"] > 0.25
        assert row["pass_at_k"]["mean"] >= at_1["mean"]
    assert greedy["sampler_gap"] is None and greedy["entropy"] == 0.0 and greedy["entropy_at_1"] > 0
    assert greedy["zero_std"]["mean"] == 1.0 and greedy["distinct"]["mean"] == 1 / 8 and greedy["pass_at_1"]["sampling_error"] == 0
    assert set(raw["drawn"][0]["per_prompt"]["right"]) <= {0.0, 1.0}
    for one, row in zip(raw["drawn"], found["rows"], strict=True):
        for name, of_prompt in (("pass_at_1", "right"), ("distinct", "distinct"), ("zero_std", "zero_std")):
            values = one["per_prompt"][of_prompt]
            error = statistics.stdev(values) / math.sqrt(len(values))
            assert row[name]["mean"] == pytest.approx(statistics.fmean(values)) and row[name]["error"] == pytest.approx(error), name
    pairs = [one for one in found["comparisons"] if one["measure"] == "pass_at_1"]
    assert [one["temperatures"] for one in pairs] == [[0.0, 0.5], [0.0, 1.6], [0.5, 1.6]]
    cold, hot = (one["per_prompt"]["right"] for one in raw["drawn"][1:])
    gaps = [a - b for a, b in zip(cold, hot, strict=True)]
    assert pairs[2]["mean"] == pytest.approx(statistics.fmean(gaps)) and pairs[2]["error"] == pytest.approx(statistics.stdev(gaps) / 2)

    lines = list(csv.DictReader(Path("found.csv").read_text().splitlines()))
    assert [float(line["pass_at_1"]) for line in lines] == [row["pass_at_1"]["mean"] for row in found["rows"]]
    assert [float(line["pass_at_1_error"]) for line in lines] == [row["pass_at_1"]["error"] for row in found["rows"]]
    assert [line["region"] for line in lines] == [one["region"] for one in found["advice"]["regions"]]
    assert Path("found.png").read_bytes().startswith(b"\x89PNG")
    for sentence in found["advice"]["sentences"]:
        assert sentence in out
    for line in (f"{row['pass_at_1']['mean']:.3f}±{row['pass_at_1']['error']:.3f}" for row in found["rows"]):
        assert line in out
    assert found["machine"]["torch"] == torch.__version__ and found["correct"] == "odd_first"


@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0, 1.7])
def test_entropies_against_the_reference_in_float64(here: Path, temperature: float) -> None:
    study = made("--samples", "3")
    model = sampling_setup.load_model(study)
    call = TemperatureSampler(study, model).call_sampler(range(1, 4), temperature, 0)
    copies = call.completions[::3] if temperature == 0 else call.completions
    prompts = [row["prompt"] for row in (call.rows[::3] if temperature == 0 else call.rows)]
    at_t, at_1, tokens = 0.0, 0.0, 0
    exact = model.double()
    for prompt, completion in zip(prompts, copies, strict=True):
        ids = study.tokenizer(prompt)["input_ids"]
        with torch.no_grad():
            logits = exact(torch.tensor([ids + completion.token_ids])).logits[:, len(ids) - 1 : -1]
        answer = torch.tensor([completion.token_ids])
        at_1 += reference.token_statistics(logits, answer)[1].sum().item()
        if temperature > 0:
            at_t += reference.token_statistics(logits, answer, temperature)[1].sum().item()
        tokens += len(completion.token_ids)
    assert call.sums.sum(0)[:3].tolist() == [pytest.approx(at_t, rel=1e-5), pytest.approx(at_1, rel=1e-5), tokens]
    assert call.sums.shape == (3, 5), "a line for each prompt"
    assert at_1 > 0.1 * tokens


@pytest.mark.parametrize("width", ["1", "4", "5", "64"])
def test_completions_are_ordered_by_prompt_and_round(here: Path, monkeypatch: pytest.MonkeyPatch, width: str) -> None:
    """Whatever the number of prompts in a call of the sampler."""
    sampler = Counting()
    monkeypatch.setattr(generate_completions, "make_sampler", lambda *args, **options: sampler)
    study = made("--samples", "2", "--rounds", "3", width=width)
    model = sampling_setup.load_model(study)
    told: list[tuple[int, int]] = []
    drawn = TemperatureSampler(study, model).generate(0.7, lambda temperature, done, total: told.append((done, total)))
    last = [row["prompt"][-2] for row in ROWS]  # the digit before "="
    numbers = [study.tokenizer.decode([7 + i]) for i in range(6)]
    assert drawn.texts == [f"{digit}{number}" for digit in last for number in numbers]
    at_once = max(int(width) // 2, 1)
    assert [done for done, _ in told] == list(range(3 * math.ceil(4 / at_once) + 1)) and {total for _, total in told} == {told[-1][0]}
    sampler.asked.clear()
    told.clear()
    greedy = TemperatureSampler(study, model).generate(0.0, lambda temperature, done, total: told.append((done, total)))
    assert told[-1][1] == math.ceil(4 / int(width)), "one completion replaces a group, so that a batch holds more prompts"
    assert greedy.texts == [f"{digit}{numbers[0]}" for digit in last for _ in range(6)]
    assert set(sampler.asked.values()) == {1}, "greedy decoding is not done twice"
    sampler.asked.clear()
    study.temperatures = [0.7]
    sampling.run(study, model)
    assert sampler.closed


def test_rounds_differ_and_the_seed_repeats_them(here: Path) -> None:
    def texts(seed: str) -> list[str]:
        study = made("--samples", "2", "--rounds", "2", "--seed", seed)
        drawn = TemperatureSampler(study, sampling_setup.load_model(study)).generate(1.5, lambda temperature, done, total: None)
        return drawn.texts

    first = texts("5")
    rounds = [first[start : start + 2] for start in range(0, len(first), 2)]
    assert rounds[0::2] != rounds[1::2] and len(first) == 4 * 4
    assert texts("5") == first != texts("6")


def test_a_sampler_at_another_temperature_is_detected(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Hotter(Counting):
        def generate(self, prompts: list[list[int]], params: Any) -> list[Completion]:
            return [Completion(c.token_ids, True, [-0.1] * 3) for c in super().generate(prompts, params)]

    monkeypatch.setattr(generate_completions, "make_sampler", lambda *args, **options: Hotter())
    study = made("--samples", "2", "--rounds", "1", "--temperatures", "1.0")
    sentences = sampling.run(study, sampling_setup.load_model(study))["advice"]["sentences"]
    assert any("The sampler's log-probabilities differ from the loss's by" in sentence for sentence in sentences)


def test_a_settings_file_of_a_training_is_accepted_and_overridden_by_the_command_line(here: Path) -> None:
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
    assert found["prompts"] == 8 and found["options"]["samples"] == 3, "an explicit setting has priority over --quick"
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
    "no reward says whether an answer is correct: rewards are format;": ["--rewards", "format"],
    "output is 'found.txt'; expected the name of a .json file": ["--output", "found.txt"],
    "reward 'accuracy_reward' needs 'answer'": ["--dataset", "no_answers.jsonl"],
    "there is no --tempratures. Did you mean temperatures": ["--tempratures", "1"],
    "'nowhere'": ["--model", "./nowhere"],
    "there is no such file": ["--dataset", "nowhere.jsonl"],
}


@pytest.mark.parametrize("message", WRONG)
def test_sampling_refuses_before_any_work(here: Path, monkeypatch: pytest.MonkeyPatch, message: str) -> None:
    def load_model(study: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(sampling_setup, "load_model", load_model)
    Path("no_answers.jsonl").write_text('{"prompt": "sort 1="}\n')
    out = sampled("--rewards", "accuracy", *WRONG[message], status=2)
    assert message.replace("'nowhere'", "./nowhere") in out
    assert not list(here.glob("found*"))


def test_missing_packages_and_missing_rewards_are_named(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "rewards is not set" in sampled(status=2)
    assert "model is not set" in run("sampling", "--dataset", "rows.jsonl", status=2)
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: None if name == "matplotlib" else find(name, *more))
    message = "the study needs matplotlib, which is not installed. Fix: pip install '.[{}]'"
    assert message.format("train,plot") in sampled("--rewards", "accuracy", status=2)
    assert message.format("demo,train") in run("training", status=2)
    assert message.format("train,plot") in run("sampling", "--help", status=2)


def test_prompts_that_cannot_be_scored_are_reported(here: Path) -> None:
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
