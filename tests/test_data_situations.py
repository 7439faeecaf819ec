"""Data that fails in the middle of a training, if nothing is checked before: one sentence each, with the row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from grpo_fast.data.prompts import check_evaluation, check_rows

GOOD = {"prompt": "2 + 2?"}


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", "rows: the prompt of row 1 has no tokens: it is empty"),
        ("a\ud83d b", r"rows: the prompt of row 1 has '\\ud83d' at character 1, half of a surrogate pair"),
    ],
)
def test_a_prompt_that_no_tokenizer_takes(prompt: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_rows([GOOD, {"prompt": prompt}], "rows")
    chat = [{"prompt": [{"role": "user", "content": text}]} for text in ("2 + 2?", prompt)]
    with pytest.raises(ValueError, match=words):
        check_rows(chat, "rows")


def test_other_prompts_are_taken() -> None:
    assert check_rows([GOOD, {"prompt": "é 😀"}], "rows") is False
    parts = [{"role": "user", "content": [{"type": "text", "text": "2 + 2?"}]}]
    assert check_rows([{"prompt": parts}, {"prompt": [{"role": "system", "content": ""}, *parts]}], "rows") is True


def test_evaluation_data_without_a_length() -> None:
    for data, name in ((iter([GOOD]), "eval_dataset"), ({"sums": (row for row in [GOOD])}, r"eval_dataset\['sums'\]")):
        with pytest.raises(TypeError, match=rf"^{name} is a \w+ without a length; expected a Dataset or a list"):
            check_evaluation(data, "steps")


def test_a_data_frame() -> None:
    frame: Any = pytest.importorskip("pandas", reason="DataFrames are pandas'").DataFrame([GOOD] * 4)
    with pytest.raises(TypeError, match=r"eval_dataset is a DataFrame; .* Fix: Dataset\.from_pandas"):
        check_evaluation(frame, "steps")
    pytest.importorskip("transformers", reason="the trainer is transformers'")
    from grpo_fast.trainer.prompt_source import PromptSource

    with pytest.raises(TypeError, match=r"train_dataset is a DataFrame; .* Fix: Dataset\.from_pandas"):
        PromptSource(frame, 2, seed=0, shuffle=True)


@pytest.mark.parametrize("name", ["pad_token_id", "eos_token_id"])
def test_a_token_outside_of_the_embedding(name: str) -> None:
    pytest.importorskip("transformers", reason="the model is transformers'")
    import copy

    import trainer_cases as cases

    from grpo_fast.models.loading import load_policy

    tokenizer = copy.deepcopy(cases.TOKENIZER)
    model = cases.model()
    tokenizer.add_special_tokens({name.removesuffix("_id"): "<one more>"})
    size = model.get_input_embeddings().num_embeddings
    with pytest.raises(ValueError, match=rf"{name} = {size}, and the model's embedding has {size} rows.*resize_token_embeddings"):
        load_policy(model, tokenizer)
    model.resize_token_embeddings(len(tokenizer))
    assert load_policy(model, tokenizer)[1] is tokenizer


def test_tags_that_are_special_tokens(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Without them a format reward is always 0: refused, or, for other rewards, said; `skip_special_tokens=False` keeps them."""
    pytest.importorskip("transformers", reason="the model is transformers'")
    import copy

    import trainer_cases as cases

    from grpo_fast.generation import Completion
    from grpo_fast.rewards import FormatReward
    from grpo_fast.trainer import GRPOTrainer

    tokenizer, read = copy.deepcopy(cases.TOKENIZER), []
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>", "<answer>", "</answer>"]})
    think, closed, answer, end = tokenizer.convert_tokens_to_ids(["<think>", "</think>", "<answer>", "</answer>"])

    class Tagged(cases.Scripted):
        def generate(self, prompts: Any, params: Any) -> list[Completion]:
            ids = [think, *tokenizer("1")["input_ids"], closed, answer, *tokenizer("2")["input_ids"], end, tokenizer.eos_token_id]
            return [Completion(ids, True), Completion(ids[1:], True)] * (len(prompts) // 2)

    def mine(completions: Any, **columns: Any) -> list[float]:
        read.extend(completions)
        return [float("<think>" in text) for text in completions]

    def run(reward: Any, **settings: Any) -> GRPOTrainer:
        args = cases.config(tmp_path, report_to=[], **settings)
        return GRPOTrainer(cases.model(), reward, args, train_dataset=cases.ROWS, processing_class=tokenizer, sampler=Tagged())

    with pytest.raises(ValueError, match=r"'format_reward' reads <think>, .*, special tokens .* Fix: skip_special_tokens=False"):
        run(FormatReward())
    assert "names" not in caplog.text
    run(mine).train()
    assert "The code of reward 'mine' names <think>, special tokens" in caplog.text
    assert not any("<" in text for text in read)
    read.clear()
    kept = run([mine, FormatReward()], skip_special_tokens=False)
    kept.train()
    assert set(read) == {"<think>1</think><answer>2</answer>", "1</think><answer>2</answer>"}
    assert cases.logs(kept)[0]["rewards/format_reward/mean"] == 0.5


def test_chats_without_a_chat_template_are_found_before_training(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="the trainer is transformers'")
    import copy

    import trainer_cases as cases

    from grpo_fast.trainer import GRPOTrainer

    chats = [{"prompt": [{"role": "user", "content": "sort 12="}]}] * 4
    for data in ({"rows": chats}, {"rows": cases.ROWS, "eval_dataset": {"a": chats}}):
        with pytest.raises(ValueError, match="tokenizer has no chat template, and prompt is a list of messages"):
            cases.trainer(tmp_path, **data)
    tokenizer = copy.deepcopy(cases.TOKENIZER)
    tokenizer.chat_template = "{{ raise_exception('no users here') }}"
    with pytest.raises(ValueError, match=r"does not take the prompt \[\{'role': 'user'.*no users here. Fix: change or leave out"):
        GRPOTrainer(cases.model(), cases.short, cases.config(tmp_path), train_dataset=chats, processing_class=tokenizer)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"prompt": ["a", "b"]}, "rows is a dict of the columns prompt; .* Fix: datasets.Dataset.from_dict"),
        ("rows.jsonl", "rows is the text 'rows.jsonl'; .* Fix: grpo_fast.data.load_prompts"),
        ([{"prompt": "2 + 2?", 3: 4}], "the column 3 has a int as its name; expected a text"),
        ([{"prompt": [{"role": "user", "content": [{"type": "image"}]}]}], "row 0 has a part of the type 'image'; expected texts"),
        ([{"prompt": [{"role": "user", "content": 5}]}], "row 0 has a content that is a int; expected a text"),
    ],
)
def test_data_of_another_kind(data: Any, words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        check_rows(data, "rows")


def test_splits_and_formats_of_datasets() -> None:
    datasets: Any = pytest.importorskip("datasets", reason="the data is of that library")
    rows = datasets.Dataset.from_list([GOOD] * 4)
    with pytest.raises(TypeError, match=r"rows is a DatasetDict of the splits train, test; .* Fix: data\[SPLIT\]"):
        check_rows(datasets.DatasetDict(train=rows, test=rows), "rows")
    with pytest.raises(TypeError, match=r"rows has the format 'arrow'; .* Fix: rows\.with_format\(None\)"):
        check_rows(rows.with_format("arrow"), "rows")
    called = [{"role": "assistant", "content": None, "tool_calls": [{"type": "function"}]}]
    assert check_rows([{"prompt": called}], "rows") is True
