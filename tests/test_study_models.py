"""``grpo-fast study training`` with a model of one's own: truncated sampling with and without replay, continuation, refused settings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from study_cases import run

pytest.importorskip("transformers")
pytest.importorskip("datasets")
pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")

from grpo_fast.study import training
from grpo_fast.study.training_study import BEFORE
from grpo_fast.study.truncations import training_variants
from grpo_fast.utils.errors import SettingsError

pytest_plugins = ["study_cases"]
pytestmark = pytest.mark.usefixtures("figures", "here")

CAPITALS = Path(__file__).resolve().parent.parent / "examples" / "capitals"
OWN = ["--model", "./model", "--dataset", "rows.jsonl", "--eval_dataset", "rows.jsonl", "--rewards", "study_rewards.py:odd_first"]
OWN += ["--correct", "odd_first", "--use_cpu", "--max_completion_length", "4", "--num_generations", "4"]
OWN += ["--per_device_train_batch_size", "8", "--max_steps", "2", "--learning_rate", "1e-3", "--eval_rounds", "2"]
VARIANTS = ["--temperatures", "1.0", "--truncations", "none", "top_k=3", "top_k=3,replay_support=false", "--eval_temperatures", "0", "1.0"]


def study(*arguments: str, status: int = 0) -> str:
    return run("training", *OWN, *VARIANTS, "--output", "found.json", *arguments, status=status)


def test_truncated_sampling_with_and_without_replay(figures: list[Callable[[], None]], monkeypatch: pytest.MonkeyPatch) -> None:
    text = study("--seeds", "1")
    found: dict[str, Any] = json.loads(Path("found.json").read_text())
    whole, replayed, ignored = "1", "1, top_k=3", "1, top_k=3, replay_support=false"
    assert found["trained_at"] == [BEFORE, whole, replayed, ignored]
    ratios = {label: found["first_step"][label]["ratio_mean"]["mean"] for label in found["trained_at"][1:]}
    assert ratios[whole] == pytest.approx(1, abs=1e-4) and ratios[replayed] == pytest.approx(1, abs=1e-4)
    assert ratios[ignored] < 0.99, "the whole distribution gives less probability to a token than the kept set does"
    curves = found["learning_curves"]
    assert max(curves[replayed]["set_size"]["mean"]) <= 3 and "set_size" not in curves[whole] and "set_size" not in curves[ignored]
    assert all({"accuracy", "entropy", "zero_std", "distinct", "grad_norm"} <= set(of_label) for of_label in curves.values())
    assert all(len(curve["mean"]) == 2 for of_label in curves.values() for curve in of_label.values())
    assert f"{ratios[ignored]:.4f}" in text and "Probability ratios of the first step" in text
    assert found["evaluation"][BEFORE]["1"]["accuracy"]["mean"] > 0, "some completion is correct, or every number would be 0"
    figures[0]()
    assert Path("found.png").read_bytes().startswith(b"\x89PNG")

    # Started again with one more seed, finished runs are kept and only the new seed is run.
    made: list[tuple[int, str]] = []
    model_run = training.model_run

    def counted(of: Any, seed: int, label: str, on_step: Any) -> Any:
        made.append((seed, label))
        return model_run(of, seed, label, on_step)

    monkeypatch.setattr(training, "model_run", counted)
    study("--seeds", "2")
    assert made == [(1, label) for label in found["trained_at"]]
    again = json.loads(Path("found.json").read_text())
    assert again["evaluation"][replayed]["0"]["accuracy"]["by_seed"][0] == found["evaluation"][replayed]["0"]["accuracy"]["by_seed"][0]
    assert "now learning_rate is 0.5" in study("--learning_rate", "0.5", status=2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--top_p", "0.9"], "top_p is set; the study compares several values. Fix: --truncations"),
        (["--temperature", "0.9"], "temperature is set; the study compares several values. Fix: --temperatures"),
        (["--max_steps", "0"], "max_steps is 0; expected the number of steps of each training"),
        (["--seeds", "0"], "seeds is 0"),
        (["--correct", "none"], "correct is 'none'; expected one of the rewards"),
    ],
)
def test_wrong_settings_are_refused_before_any_model_is_loaded(given: list[str], message: str) -> None:
    assert message in study(*given, status=2)
    assert not Path("found.json").exists()


def test_a_study_needs_held_out_questions() -> None:
    assert "eval_dataset is not set; expected the held-out questions" in run("training", *OWN[:4], *OWN[6:], "--output", "x.json", status=2)


@pytest.mark.parametrize(
    ("truncations", "message"),
    [
        ([], "truncations is empty"),
        (["none", "none"], "truncations has 'none' twice"),
        (["top_p=0.9", " top_p = 0.9 "], "truncations has 'top_p=0.9' twice"),
        (["top_q=0.9"], "truncations has 'top_q=0.9'; expected 'none', or some of top_p, top_k, min_p, replay_support"),
        (["top_p=high"], "top_p is 'high'; expected a number"),
        (["top_p"], "truncations has 'top_p'; expected"),
        (["top_k=3,top_k=4"], "truncations has 'top_k=3,top_k=4'; expected"),
    ],
)
def test_wrong_truncations_are_named(truncations: list[str], message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        training_variants(["1.0"], truncations, 4)
    assert message in str(caught.value)


def test_each_temperature_is_combined_with_each_truncation() -> None:
    found = training_variants(["0.6", "0.6->1.4"], ["none", "top_p=0.95,replay_support=false"], 4)
    assert list(found) == ["0.6", "0.6, top_p=0.95, replay_support=false", "0.6->1.4", "0.6->1.4, top_p=0.95, replay_support=false"]
    assert found["0.6"].truncation == {} and found["0.6->1.4, top_p=0.95, replay_support=false"].truncation == {
        "top_p": 0.95,
        "replay_support": "false",
    }


def test_the_example_of_the_capitals() -> None:
    """Its settings are valid, its questions differ, and each answer earns its reward."""
    from grpo_fast.data.loading import load_rewards
    from grpo_fast.trainer.config import GRPOConfig
    from grpo_fast.trainer.run_settings import TrainOptions, parse

    options, config, _ = parse([str(CAPITALS / "settings.yaml"), "--model", "m", "--use_cpu"], GRPOConfig, TrainOptions)
    assert options.rewards == ["examples/capitals/reward.py:names_capital"] and options.dataset == "examples/capitals/questions.jsonl"
    assert config.max_steps == 16 and config.num_generations == 8
    rows = [json.loads(line) for line in (CAPITALS / "questions.jsonl").read_text().splitlines()]
    assert len({row["prompt"] for row in rows}) == len(rows) == 151
    (reward,) = load_rewards([f"{CAPITALS / 'reward.py'}:names_capital"], None)
    answers = [row["answer"] for row in rows]
    named = [f"It is {answer.split('|')[-1].upper()}." for answer in answers]
    arguments: dict[str, Any] = {"prompts": [row["prompt"] for row in rows], "answer": answers}
    assert reward(completions=named, **arguments) == [1.0] * len(rows)
    others: Any = reward(completions=[*named[1:], named[0]], **arguments)
    assert sum(others) <= 1, "the capital of another country"
