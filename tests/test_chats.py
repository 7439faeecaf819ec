"""Prompts that are texts and reach a chat model as chats: those of our own tasks, and others where the setting says so."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="the tokenizer is one of transformers")
pytest.importorskip("datasets", reason="the rows of a task are also a datasets.Dataset")

import trainer_cases
from datasets import Dataset
from trainer_cases import ROWS, Scripted, trainer

from grpo_fast.data import loading
from grpo_fast.data.chats import sends_as_chat
from grpo_fast.data.prompts import encode_prompt, load_prompts
from grpo_fast.data.tasks import sorting_task
from grpo_fast.data.tasks.common import as_dataset, is_generated
from grpo_fast.data.tasks.sorting import make_tokenizer
from grpo_fast.rewards import RewardRunner, accuracy_reward
from grpo_fast.study.sampling_setup import CONFIG_SETTINGS
from grpo_fast.trainer.run_settings import TrainOptions

TEMPLATE = "{% for m in messages %}<think>{{ m.content }}<eos>{% endfor %}{% if add_generation_prompt %}<answer>{% endif %}"
PLAIN = make_tokenizer()
CHAT = make_tokenizer()
CHAT.chat_template = TEMPLATE


def as_messages(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.fixture
def chat_tokenizer(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The trainers of a test have a tokenizer with a chat template."""
    monkeypatch.setattr(trainer_cases, "TOKENIZER", CHAT)
    yield


def test_rows_of_tasks_are_known_however_they_are_cut() -> None:
    rows = sorting_task(12).rows
    generated = as_dataset(rows)
    long = CHAT.encode(rows[0]["prompt"])
    for part in (
        *(rows, rows[:3], copy.copy(rows), load_prompts(rows, CHAT, limit=4, max_prompt_length=len(long)).rows),
        *(generated, generated.select(range(3)), generated.shuffle(seed=1), generated.map(lambda row: {"more": 1})),
        generated.train_test_split(0.5, seed=0)["test"],
    ):
        assert is_generated(part)
    assert isinstance(rows[0], dict) and rows == list(rows)
    for own in (list(rows), Dataset.from_list(list(rows)), ROWS):
        assert not is_generated(own)


def test_what_the_setting_means(caplog: pytest.LogCaptureFixture) -> None:
    rows, own = sorting_task(4).rows, list(sorting_task(4).rows)
    chats = [{"prompt": as_messages("sort 12=")}]
    assert sends_as_chat("auto", rows, CHAT, "train_dataset") is True
    assert caplog.messages == [
        "train_dataset: the task's prompts are sent as chats, in the tokenizer's chat template (chat=False: as plain texts)."
    ]
    caplog.clear()
    assert sends_as_chat("auto", own, CHAT, "mine") is False
    assert len(caplog.messages) == 1 and caplog.messages[0].startswith("mine: the prompts are plain texts and are sent as they are")
    caplog.clear()
    assert sends_as_chat("auto", [{"prompt": "<eos>sort 12="}], CHAT, "mine") is False  # it holds tokens of a template already
    assert sends_as_chat("auto", iter(own), CHAT, "mine") is False  # a stream cannot be read twice
    assert [sends_as_chat("auto", each, PLAIN, "mine") for each in (rows, own, chats)] == [False] * 3
    assert sends_as_chat("auto", chats, CHAT, "mine") is False
    assert [sends_as_chat(setting, each, CHAT, "mine") for setting in (True, False) for each in (rows, own)] == [True, True, False, False]
    assert sends_as_chat("auto", rows, CHAT, "mine", tell=False) is True
    assert caplog.messages == []
    with pytest.raises(ValueError, match="chat is True, and the tokenizer has no chat template"):
        sends_as_chat(True, own, PLAIN, "mine")


def test_a_text_as_chat_has_the_tokens_of_that_chat() -> None:
    text = "sort 4321="
    assert encode_prompt(text, CHAT, as_chat=True) == encode_prompt(as_messages(text), CHAT) != encode_prompt(text, CHAT)
    assert load_prompts([{"prompt": text}], CHAT, as_chat=True).longest == len(encode_prompt(as_messages(text), CHAT))


@pytest.mark.parametrize("chat", ["auto", "false"])
def test_a_trainer_sends_the_prompts_of_a_task_as_chats(
    tmp_path: Path, chat_tokenizer: None, chat: str, caplog: pytest.LogCaptureFixture
) -> None:
    """In training and evaluation; the rewards get texts all the same. The rows to evaluate on are the user's own."""
    seen: dict[str, Any] = {}

    def reward(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        seen.update(prompts=prompts, completions=completions)
        return [float(len(completion)) for completion in completions]

    sampler, rows = Scripted(), sorting_task(8).rows
    with caplog.at_level(logging.WARNING, "grpo_fast"):
        run = trainer(tmp_path, rows=rows, rewards=reward, sampler=sampler, chat=chat, eval_dataset=ROWS[:2], eval_rounds=2)
        run.train()
        trained = sampler.calls[-1][0]
        assert isinstance(seen["prompts"][0], str) and isinstance(seen["completions"][0], str)
        run.evaluate()
    texts = [row["prompt"] for row in rows]
    expected = [encode_prompt(text, CHAT, as_chat=chat == "auto") for text in texts]
    assert all(prompt in expected for prompt in trained)
    assert sampler.calls[-1][0] == [encode_prompt(row["prompt"], CHAT) for row in ROWS[:2]]
    told = [message.partition(":")[0] for message in caplog.messages]
    assert told == (["train_dataset", "eval_dataset"] if chat == "auto" else [])


def test_prompts_of_the_command_line_and_the_study() -> None:
    """The length limit counts the chat's tokens. A template of the user's own makes the prompts the user's own."""
    runner, task = RewardRunner([accuracy_reward]), sorting_task(4)
    tokens = len(encode_prompt(as_messages("sort 1234="), CHAT))
    options = TrainOptions(dataset="sorting", max_prompt_length=tokens)
    rows = loading.prompt_rows("sorting", "train", task, options, CHAT, runner, chat="auto")
    assert is_generated(rows) and len(rows) == 4
    options.max_prompt_length = tokens - 1
    with pytest.raises(ValueError, match="every one of the 4 prompts is longer"):
        loading.prompt_rows("sorting", "train", task, options, CHAT, runner, chat="auto")
    assert len(loading.prompt_rows("sorting", "train", task, options, CHAT, runner, chat=False)) == 4
    own = loading.prompt_rows("sorting", "train", task, TrainOptions(prompt_template="{prompt}"), CHAT, runner, chat="auto")
    assert not is_generated(own) and is_generated(as_dataset(task.rows))
    assert "chat" in CONFIG_SETTINGS


@pytest.mark.parametrize("value", ["auto", True, False, "true", "False"])
def test_the_setting_is_read_from_python_and_from_text(tmp_path: Path, value: Any) -> None:
    assert trainer_cases.config(tmp_path, chat=value).chat == {"true": True, "False": False}.get(value, value)


def test_another_value_of_the_setting_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="chat is 'always'; expected"):
        trainer_cases.config(tmp_path, chat="always")
