"""A custom surrogate in the trainer that takes columns of the dataset, and the aggregation as a setting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from trainer_cases import ROWS, config, logs, trainer

from grpo_fast.trainer.rollout import Rollout


def weighted(ratio: Tensor, advantages: Tensor, difficulty: Tensor) -> Tensor:
    return -ratio * advantages * difficulty


CUSTOM: dict[str, Any] = {"loss_type": "custom", "surrogate": weighted, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}


def rows(difficulty: Any) -> list[dict[str, Any]]:
    return [{**row, "difficulty": difficulty(i) if callable(difficulty) else difficulty} for i, row in enumerate(ROWS)]


def run(folder: Path, difficulty: Any, **settings: Any) -> Any:
    found = trainer(folder, rows=rows(difficulty), **CUSTOM, shuffle_dataset=False, **settings)
    found.train()
    return found


def test_a_column_reaches_each_token_of_its_row(tmp_path: Path) -> None:
    """Twice the difficulty is twice the gradient; with a difficulty of 0 for all but the first prompt, that prompt alone trains."""
    norms = {}
    for name, difficulty in {"one": 1, "two": 2.0, "first": lambda i: float(i == 0)}.items():
        found = run(tmp_path / name, difficulty, max_grad_norm=1e9)
        norms[name] = logs(found)[0]["grad_norm"]
        assert found.rollout is not None
        column = found.rollout.tokens["column.difficulty"]
        expected = [float(1 if name == "one" else 2 if name == "two" else i == 0) for i in range(4) for _ in range(4)]
        assert column.tolist() == [value for value, length in zip(expected, found.rollout.lengths, strict=True) for _ in range(length)]
    assert norms["one"] > 1e-3
    assert norms["two"] == pytest.approx(2 * norms["one"], rel=1e-4)
    assert norms["first"] not in (pytest.approx(norms["one"], rel=1e-2), pytest.approx(0, abs=1e-6))


def test_columns_are_saved_with_a_rollout_and_used_in_evaluations(tmp_path: Path) -> None:
    found = run(tmp_path, lambda i: 0.5 + i % 3, num_iterations=2, eval_dataset=rows(1.0)[:4], eval_rounds=2)
    assert "eval_loss" in found.evaluate()
    assert found.rollout is not None
    found.rollout.save(tmp_path / "rollout.safetensors")
    again = Rollout.load(tmp_path / "rollout.safetensors", found.rollout.tokens["column.difficulty"].device)
    assert again.tokens["column.difficulty"].tolist() == found.rollout.tokens["column.difficulty"].tolist()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (ROWS, "the dataset has no column 'difficulty', only 'prompt'"),
        (rows("hard"), "column 'difficulty' of the dataset is 'hard' in a row; expected a finite number"),
        (rows(float("nan")), "column 'difficulty' of the dataset is nan in a row"),
        (rows(None), "column 'difficulty' of the dataset is None in a row"),
    ],
    ids=["missing", "text", "nan", "none"],
)
def test_a_wrong_column_is_named_before_training(given: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        trainer(tmp_path, rows=given, **CUSTOM).train()
    assert message in str(caught.value) and "weighted" in str(caught.value)


def test_the_aggregation_is_a_setting(tmp_path: Path) -> None:
    """DAPO's surrogate with the mean over sequences is GRPO."""
    same = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "shuffle_dataset": False}
    norms = []
    for name, settings in {"grpo": {"loss_type": "grpo"}, "mean": {"aggregation": "sequence_mean"}, "dapo": {}}.items():
        found = trainer(tmp_path / name, **same, **settings)
        found.train()
        norms.append(logs(found)[0]["grad_norm"])
    assert norms[1] == pytest.approx(norms[0], rel=1e-5) and norms[2] != pytest.approx(norms[0], rel=1e-3)
    assert config(tmp_path, aggregation="token_mean").loss_config().resolved_aggregation == "global_token_mean"
    with pytest.raises(ValueError, match=r"aggregation is 'nonempty_sequence_mean'; expected one whose denominator .* Fix: sequence_mean"):
        config(tmp_path, aggregation="nonempty_sequence_mean")
