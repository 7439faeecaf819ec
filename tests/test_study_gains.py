"""Gains in held-out accuracy with their errors, `--require_gain`, and the study that `make real` runs."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path
from typing import Any

import pytest
from study_cases import run

pytest.importorskip("transformers")
pytest.importorskip("datasets")
pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")

from grpo_fast.study.training_gains import ALL, gain, gains, not_learned

pytest_plugins = ["study_cases"]

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--model", "./model", "--dataset", "rows.jsonl", "--eval_dataset", "rows.jsonl"]
TINY += ["--rewards", "study_rewards.py:even_first", "--correct", "even_first"]
TINY += ["--max_completion_length", "2", "--num_generations", "8", "--per_device_train_batch_size", "32", "--output", "found.json"]


def runs(*right: list[list[float]]) -> list[dict[str, Any]]:
    """Runs of one seed each, from the accuracy of each question at each temperature."""
    return [{"table": [{"right": of_place} for of_place in of_seed]} for of_seed in right]


def test_the_error_is_over_questions_and_seeds() -> None:
    before = [[0.0, 1.0, 0.0, 0.0], [0.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    after = [[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0]]
    found = gain(before, after)
    by_seed, by_question = (0.25, 0.5, 0.5), (1.0, 1 / 3, 0.0, 1 / 3)
    mean = 5 / 12
    errors = [math.sqrt(sum((each - mean) ** 2 for each in values) / (len(values) - 1) / len(values)) for values in (by_question, by_seed)]
    assert found["mean"] == pytest.approx(mean)
    assert [found["error_questions"], found["error_seeds"]] == pytest.approx(errors)
    assert found["error"] == pytest.approx(math.hypot(*errors))


def test_with_one_seed_or_one_question_the_other_error_is_left() -> None:
    one_seed = gain([[0.0, 0.0]], [[1.0, 0.0]])
    assert (one_seed["error_seeds"], one_seed["error"]) == (None, one_seed["error_questions"]) and one_seed["error"] == 0.5
    one_question = gain([[0.0], [0.0]], [[1.0], [0.0]])
    assert (one_question["error_questions"], one_question["error"]) == (None, one_question["error_seeds"])
    assert gain([[0.0]], [[1.0]])["error"] is None
    with pytest.raises(ValueError):
        gain([[0.0, 0.0]], [[1.0]])


def test_gains_of_each_temperature_and_of_all() -> None:
    before, after = runs([[0.0, 0.0], [0.0, 1.0]], [[0.0, 0.0], [0.0, 1.0]]), runs([[1.0, 1.0], [0.0, 0.5]], [[1.0, 1.0], [0.0, 0.5]])
    found = gains({"before": before, "1": after}, "before", ["0", "1.3"])
    assert {place: each["mean"] for place, each in found["1"].items()} == {"0": 1.0, "1.3": -0.25, ALL: 0.375}
    assert gains({"before": [{"table": [{"accuracy": 1.0}]}], "1": after}, "before", ["0"]) == {}, "the demonstration lists no questions"


@pytest.mark.parametrize(
    ("mean", "error", "learned"), [(0.21, 0.1, True), (0.2, 0.1, False), (-0.3, 0.1, False), (0.0, 0.0, False), (0.5, None, False)]
)
def test_learning_is_a_gain_of_more_than_twice_its_error(mean: float, error: float | None, learned: bool) -> None:
    found = {"training": {"1": {}}, "gains": {"1": {ALL: {"mean": mean, "error": error}}}}
    assert not_learned(found) == ([] if learned else ["1"])
    assert not_learned({"training": {"1": {}}}) == ["1"], "without gains nothing is known"


@pytest.mark.usefixtures("figures", "here")
@pytest.mark.parametrize(("rate", "steps", "status"), [("5e-3", "8", 0), ("1e-9", "1", 1)], ids=["learns", "does not learn"])
def test_make_real_fails_unless_the_model_learned(rate: str, steps: str, status: int) -> None:
    """The command of tools/real.sh with a tiny model, whose reward is that its first token is even."""
    (command,) = (line for line in (ROOT / "tools/real.sh").read_text().replace("\\\n", " ").splitlines() if "study training" in line)
    args = shlex.split(command)
    given = args[args.index("training") + 1 : args.index("$@")]
    assert given[0] == "examples/capitals/settings.yaml" and "--require_gain" in given
    text = run("training", *given[1:], *TINY, "--learning_rate", rate, "--max_steps", steps, status=status)
    found = json.loads(Path("found.json").read_text())
    assert found["seeds"] == 3 and list(found["gains"]["1"]) == ["0", "0.3", "0.6", "1", "1.3", ALL]
    assert (found["gains"]["1"][ALL]["mean"] > 0.3) == (status == 0)
    assert ("did not rise by more than twice its standard error when trained at 1" in text) == (status == 1)
    shown = found["completions"]["1"]["0.6"]
    assert len(shown) == 4 and set(shown[0]) == {"prompt", "completion", "right"}
    assert "Completions" in Path("found.html").read_text()
