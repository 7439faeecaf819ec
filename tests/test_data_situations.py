"""Data that fails in the middle of a training, if nothing is checked before: one sentence each, with the row."""

from __future__ import annotations

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
