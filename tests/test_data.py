"""Prompts: their sources, their encoding, which are filtered out, and the errors for an invalid data set."""

from __future__ import annotations

import builtins
import csv
import doctest
import json
import logging
from typing import Any

import pytest

import grpo_fast.data.prompts
from grpo_fast.data.prompts import encode_prompt, load_prompts
from grpo_fast.data.tasks.sorting import make_tokenizer

TEMPLATE = (
    "{% for m in messages %}{{ '<think>' if m['role'] == 'user' else '<answer>' }}{{ m['content'] }}"
    "{% if not (loop.last and m['role'] == 'assistant') %}<eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<answer>{{ extra }}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = make_tokenizer()  # one token per character
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def rows(*prompts, **columns):
    return [{"prompt": prompt, **{name: values[i] for name, values in columns.items()}} for i, prompt in enumerate(prompts)]


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_the_examples_of_the_docstrings():
    assert doctest.testmod(grpo_fast.data.prompts).failed == 0


def test_too_long_prompts_are_left_out_and_counted(tokenizer, caplog):
    data = rows("12", "1234", "123", "12345", answer=["a", "b", "c", "d"])
    with caplog.at_level(logging.WARNING, "grpo_fast"):
        prompts = load_prompts(data, tokenizer, max_prompt_length=3)
    assert prompts.rows == [data[0], data[2]]
    assert (prompts.total, prompts.dropped, prompts.longest, prompts.conversational) == (4, 2, 3, False)
    assert str(prompts) == "2 prompts (texts), of up to 3 tokens; 2 of 4 were too long and left out"
    assert "2 of 4 prompts are longer than 3 tokens and left out" in caplog.text
    assert len(load_prompts(data, tokenizer).rows) == 4
    assert [row["prompt"] for row in load_prompts(data, tokenizer, max_prompt_length=4, limit=2).rows] == ["12", "1234"]


def test_conversations_are_measured_with_their_template(tokenizer):
    data = rows(user("12"), user("1"))
    prompts = load_prompts(data, tokenizer, max_prompt_length=4)  # <think> 1 <eos> <answer>
    assert prompts.conversational and prompts.rows == [data[1]] and prompts.longest == 4
    assert load_prompts(data, tokenizer, max_prompt_length=6, chat_template_kwargs={"extra": "5"}).longest == 6


def test_encode_prompt(tokenizer):
    def decoded(prompt, **options):
        return tokenizer.decode(encode_prompt(prompt, tokenizer, options))

    assert decoded("12") == "12"
    assert decoded(user("12")) == "<think>12<eos><answer>"
    assert (
        decoded([*user("12"), {"role": "assistant", "content": "4"}]) == "<think>12<eos><answer>4"
    )  # the prompt begins the answer, and the model continues it
    assert decoded(user("12"), extra="7") == "<think>12<eos><answer>7"


def test_no_second_begin_of_sequence_token():
    """A template that writes it and a tokenizer that adds it: only one of them may."""
    from tokenizers import processors

    tokenizer = make_tokenizer()
    begin = tokenizer.convert_tokens_to_ids("<unk>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<unk> $A", special_tokens=[("<unk>", begin)])
    tokenizer.chat_template = "<unk>{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert encode_prompt("12", tokenizer).count(begin) == 1
    assert encode_prompt(user("12"), tokenizer).count(begin) == 1


def test_a_template_is_needed_for_conversations():
    with pytest.raises(ValueError, match=r"tokenizer has no chat template, and prompt is a list of messages; .* Fix: set"):
        load_prompts(rows(user("1")), make_tokenizer())


def test_files_and_datasets(tokenizer, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="needs the datasets package: pip install '.[train]'")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    data = [{"question": "12", "answer": "x"}, {"question": "12345", "answer": "y"}]
    expected = [{"prompt": "12", "answer": "x"}]
    lines, table, saved, split = tmp_path / "a.jsonl", tmp_path / "b.csv", tmp_path / "saved", tmp_path / "split"
    lines.write_text("".join(json.dumps(row) + "\n" for row in data))
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["question", "answer"])
        writer.writeheader()
        writer.writerows([{"question": "s 12", "answer": "x"}, {"question": "s 12345", "answer": "y"}])  # csv reads 12 as a number
    dataset = datasets.Dataset.from_list(data)
    dataset.save_to_disk(str(saved))
    datasets.DatasetDict(test=dataset).save_to_disk(str(split))

    options: dict[str, Any] = {"rename": {"question": "prompt"}, "max_prompt_length": 4}
    for source in (lines, str(lines), dataset, saved):
        prompts = load_prompts(source, tokenizer, **options)
        assert list(prompts.rows) == expected and prompts.dropped == 1
        assert isinstance(prompts.rows, datasets.Dataset)
    assert list(load_prompts(table, tokenizer, **options).rows) == [{"prompt": "s 12", "answer": "x"}]
    for source in (split, datasets.DatasetDict(test=dataset)):
        assert list(load_prompts(source, tokenizer, split="test", **options).rows) == expected
        with pytest.raises(ValueError, match=r"data has the splits test; expected 'train' among them. Fix: split="):
            load_prompts(source, tokenizer, **options)
    with pytest.raises(TypeError, match=r"data is a IterableDataset; expected .* Fix for a stream"):
        load_prompts(dataset.to_iterable_dataset(), tokenizer)
    conversations = datasets.Dataset.from_list(rows(user("12"), user("1")))
    assert load_prompts(conversations, tokenizer, max_prompt_length=4).rows[0]["prompt"] == user("1")


def test_a_list_needs_no_package(tokenizer, monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **options):
        if name.partition(".")[0] == "datasets":
            raise ImportError("hidden")
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    assert len(load_prompts(rows("12"), tokenizer).rows) == 1
    with pytest.raises(ImportError, match=r"needs the datasets package for 'name', .* Fix: pip install '\.\[train\]'"):
        load_prompts("name", tokenizer)


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ([], {}, "there are no rows"),
        ([{"question": "1"}], {}, r"there is no column 'prompt'; the columns are: question. Fix: rename .*rename=\{'...': 'prompt'\}"),
        (rows("1"), {"rename": {"question": "prompt"}}, "rename has 'question', which is no column; the columns are: prompt"),
        (rows("1", q=["2"]), {"rename": {"q": "prompt"}}, "rename makes 'q' into 'prompt', which is a column already"),
        (rows("1", completions=["2"]), {}, "the column 'completions' has a name that rewards know for something else"),
        (rows("1", None), {}, "the prompt of row 1 is None; expected a text, or a list of messages"),
        (rows("1", ""), {}, "the prompt of row 1 has no tokens"),
        (rows("1", 7), {}, "the prompt of row 1 is 7; expected a text"),
        (rows([]), {}, r"the prompt of row 0 is \[\]; expected"),
        (rows([{"role": "user"}]), {}, "the prompt of row 0 is .*; expected a text, or a list of messages"),
        (rows("1", user("1")), {}, "the prompt of row 1 is a list of messages, and that of row 0 a text"),
        (rows("12", "123"), {"max_prompt_length": 1}, r"every one of the 2 prompts is longer; expected at least 2, .*the longest has 3"),
        ([{"prompt": "1"}, {"prompt": "2", "answer": "3"}], {}, "row 1 has the columns prompt, answer, and row 0 prompt"),
        (rows("1"), {"max_prompt_length": 0}, "max_prompt_length is 0; expected an integer of at least 1"),
        (rows("1"), {"limit": True}, "limit is True; expected an integer"),
    ],
)
def test_what_is_wrong_is_said(data, options, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        load_prompts(data, tokenizer, **options)


def test_what_is_no_data_set_is_said(tokenizer, tmp_path):
    with pytest.raises(TypeError, match=r"data is a int; expected a datasets.Dataset, a list of dictionaries"):
        load_prompts(3, tokenizer)
    with pytest.raises(TypeError, match="row 0 is a str; expected a dictionary with a 'prompt'"):
        load_prompts(["sort 1="], tokenizer)
    pytest.importorskip("datasets", reason="needs the datasets package: pip install '.[train]'")
    with pytest.raises(ValueError, match=r"data set '.*nothing.jsonl': there is no such file or folder"):
        load_prompts(tmp_path / "nothing.jsonl", tokenizer)
    (tmp_path / "a.txt").write_text("12")
    with pytest.raises(ValueError, match=r"files that end in '.txt' are not read; expected .json, .jsonl, .ndjson, .csv, .parquet"):
        load_prompts(tmp_path / "a.txt", tokenizer)
