"""Streams of rows: what is one, the order of its rows, passes and positions, and whole runs on one."""

from __future__ import annotations

import doctest
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="the trainer is transformers'")

import torch
import trainer_cases as cases
from datasets import Dataset

import grpo_fast.data.streams
from grpo_fast.data.streams import check_evaluation, is_stream, read_all
from grpo_fast.trainer.prompt_stream import PromptStream

ROWS = [{"prompt": f"sort {i:04d}=", "answer": str(i)} for i in range(23)]


class Torchs(torch.utils.data.IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return iter(ROWS)


class Counting:
    """A stream that can be read again, and counts what is read."""

    def __init__(self) -> None:
        self.read = 0

    def __iter__(self) -> Iterator[Any]:
        for row in ROWS:
            self.read += 1
            yield row


KINDS: dict[str, Callable[[], Any]] = {
    "function": lambda: lambda: iter(ROWS),
    "datasets": lambda: Dataset.from_list(ROWS).to_iterable_dataset(),
    "torch": Torchs,
    "iterable": Counting,
}


def stream(data: Any, count: int = 4, shuffle: bool = True, buffer_size: int = 10, seed: int = 0) -> PromptStream:
    return PromptStream(data, count, seed=seed, shuffle=shuffle, buffer_size=buffer_size)


def answers(prompts: PromptStream, rollouts: range) -> list[list[int]]:
    return [[int(row["answer"]) for row in prompts.rows(i)] for i in rollouts]


@pytest.mark.parametrize("kind", KINDS)
def test_the_rows_of_a_rollout_follow_from_its_number(kind: str) -> None:
    """23 rows, 4 prompts per rollout, blocks of 8: five rollouts in a pass."""
    in_order = answers(stream(KINDS[kind](), shuffle=False), range(10))
    assert in_order == [list(range(4 * (i % 5), 4 * (i % 5) + 4)) for i in range(10)]
    whole = answers(stream(KINDS[kind]()), range(13))
    for begin, end, rows in ((0, 2, range(8)), (2, 4, range(8, 16)), (4, 5, range(16, 23))):
        assert set(chain(*whole[begin:end])) <= set(rows)
    first, second = [*chain(*whole[:5])], [*chain(*whole[5:10])]
    assert len(set(first)) == len(set(second)) == 20 and first != second
    assert [row - 8 for row in first[8:16]] != first[:8], "each block has an order of its own"
    assert whole != answers(stream(KINDS[kind](), seed=1), range(13))
    for start in (1, 3, 4, 6, 11):  # as a run does that is resumed there
        assert answers(stream(KINDS[kind]()), range(start, 13)) == whole[start:]


def test_blocks_are_read_when_they_are_needed() -> None:
    data = Counting()
    prompts = stream(data)
    assert data.read == 1  # the first row is checked before training
    prompts.rows(0)
    prompts.rows(1)
    assert data.read == 1 + 8
    prompts.rows(2)
    assert data.read == 1 + 16 and prompts.epoch(3) == 0.0
    answers(prompts, range(3, 6))
    assert prompts.epoch(6) == 1.2


def test_a_stream_without_an_end_and_replacements() -> None:
    def endless() -> Iterator[Any]:
        number = 0
        while True:
            yield {"prompt": str(number), "answer": number}
            number += 1

    prompts = stream(endless)
    assert answers(prompts, range(100))[99][0] // 8 == 99 // 2
    found = [row["answer"] for row in prompts.replacements(99, 1, 3)]
    assert all(392 <= answer < 400 for answer in found)
    assert found == [row["answer"] for row in prompts.replacements(99, 1, 3)] != [row["answer"] for row in prompts.replacements(99, 2, 3)]


def test_an_iterator_can_be_read_once() -> None:
    prompts = stream(iter(ROWS), shuffle=False)
    assert answers(prompts, range(5)) == [list(range(4 * i, 4 * i + 4)) for i in range(5)]
    with pytest.raises(ValueError, match=r"train_dataset is a list_iterator, which can be read once, .* pass the function that makes it"):
        prompts.rows(5)
    assert answers(stream(iter(ROWS), shuffle=False), range(2, 3)) == [[8, 9, 10, 11]]  # resumed
    used = (row for row in ROWS)
    list(used)
    with pytest.raises(ValueError, match=r"train_dataset is a generator without a row; .* it has been read to its end before"):
        stream(used)


def test_streams_that_are_wrong_are_named() -> None:
    broken = [*ROWS[:12], {"prompt": "", "answer": "0"}, *ROWS]
    prompts = stream(lambda: iter(broken))
    prompts.rows(0)
    with pytest.raises(ValueError, match="train_dataset: the prompt of row 12 has no tokens"):
        prompts.rows(2)
    ragged = stream(lambda: iter([*ROWS[:9], {"prompt": "2 + 2?"}]))
    with pytest.raises(ValueError, match="row 9 has the columns prompt, and row 0 prompt, answer"):
        ragged.rows(2)
    with pytest.raises(ValueError, match="train_dataset is a stream of 3 rows; expected at least 4, the prompts of one rollout"):
        stream(lambda: iter(ROWS[:3])).rows(0)
    lengths = iter([23, 23, 10])  # the first is that of the check of the first row
    shrinking = stream(lambda: iter(ROWS[: next(lengths)]))
    answers(shrinking, range(7))
    with pytest.raises(ValueError, match="fewer rows in its pass 2 than in the first, in which it had at least 20"):
        shrinking.rows(7)
    for data, error, words in (
        (lambda: None, TypeError, "train_dataset is a function that returned a NoneType; expected an iterable of rows"),
        (lambda: iter([]), ValueError, "train_dataset is a function without a row; .* it is empty"),
        (iter(["2 + 2?"]), TypeError, "train_dataset: row 0 is a str; expected a dictionary"),
    ):
        with pytest.raises(error, match=words):
            stream(data)


def test_evaluation_data() -> None:
    assert check_evaluation({"a": ROWS, "b": lambda: iter(ROWS)}, "steps") == {
        "eval_dataset['a']": ["prompt", "answer"],
        "eval_dataset['b']": ["prompt", "answer"],
    }
    assert read_all(lambda: iter(ROWS), "eval_dataset") == ROWS
    with pytest.raises(ValueError, match=r"eval_dataset is a stream of more than 100000 rows; expected fewer. Fix: \.take\(n\)"):
        read_all(lambda: iter(ROWS * 5000), "eval_dataset")
    assert not any(map(is_stream, (ROWS, tuple(ROWS), Dataset.from_list(ROWS), {"a": 1}, "rows.jsonl", None)))


def test_a_run_on_a_stream_and_its_resumption(tmp_path: Path) -> None:
    """As on the rows themselves, over the end of a pass (5 rollouts); evaluated on a stream."""
    settings: dict[str, Any] = {"max_steps": 6, "shuffle_dataset": False, "save_strategy": "steps", "save_steps": 4, "report_to": []}
    sampler, resumed_sampler = cases.Scripted(), cases.Scripted()
    whole = cases.trainer(tmp_path, rows=lambda: iter(ROWS), sampler=sampler, **settings, shuffle_buffer_size=8)
    whole.train()
    assert [log["epoch"] for log in cases.logs(whole)] == [0, 0, 0, 0, 0, 1.2]
    assert [call[0][0] for call in sampler.calls] == [cases.TOKENIZER(ROWS[4 * (i % 5)]["prompt"])["input_ids"] for i in range(6)]
    resumed = cases.trainer(tmp_path, rows=lambda: iter(ROWS), sampler=resumed_sampler, **settings, shuffle_buffer_size=8)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert [log["loss"] for log in cases.logs(resumed)] == [log["loss"] for log in cases.logs(whole)]
    assert [call[0] for call in resumed_sampler.calls] == [call[0] for call in sampler.calls[4:]]
    found, expected = (whole.evaluate(data) for data in (Dataset.from_list(ROWS[:3]).to_iterable_dataset(), ROWS[:3]))
    assert {key: value for key, value in found.items() if "runtime" not in key} == {
        key: value for key, value in expected.items() if "runtime" not in key
    }


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_steps": -1}, "max_steps is -1; expected a number of optimizer steps .*: train_dataset is a function without a length"),
        ({"eval_strategy": "epoch", "eval_dataset": ROWS}, "eval_strategy is 'epoch'; expected 'steps' or 'no'"),
        ({"save_strategy": "epoch"}, "save_strategy is 'epoch'; expected 'steps' or 'no'"),
        ({"shuffle_buffer_size": 0}, "shuffle_buffer_size is 0; expected a whole number of at least 1"),
    ],
)
def test_settings_that_do_not_fit_a_stream(settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        cases.trainer(tmp_path, rows=lambda: iter(ROWS), **settings)


def test_the_columns_of_evaluation_data_are_checked_before_training(tmp_path: Path) -> None:
    def judge(completions: Any, answer: Any) -> list[float]:
        return [0.0] * len(completions)

    with pytest.raises(ValueError, match=r"'judge' needs 'answer', neither a column of eval_dataset\['b'\] nor known"):
        cases.trainer(tmp_path, rewards=judge, rows=ROWS, eval_dataset={"a": ROWS, "b": lambda: iter([{"prompt": "2 + 2?"}])})


def test_examples_in_docstrings() -> None:
    found = doctest.testmod(grpo_fast.data.streams)
    assert found.attempted > 0 and found.failed == 0
