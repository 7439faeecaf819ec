"""Prompts and completions that do not fit into the model's positions are named before training."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_cases import ROWS, TOKENIZER, model, trainer

from grpo_fast.trainer.length_check import check_lengths, position_limit

LONG = {**ROWS[0], "prompt": ROWS[0]["prompt"] * 12}


def learned(positions: int = 64) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=len(TOKENIZER), n_positions=positions, n_embd=16, n_layer=1, n_head=2))


def test_a_prompt_beyond_learned_positions_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"train_dataset: the prompt of row 2 has \d+ tokens, and max_completion_length is 8; the model has 64"
    ):
        trainer(tmp_path, of=learned(), rows=[ROWS[0], ROWS[1], LONG, *ROWS[2:20]])
    with pytest.raises(ValueError, match=r"^max_completion_length is 64; the model has 64 positions"):
        trainer(tmp_path, of=learned(), max_completion_length=64)
    trainer(tmp_path, of=learned())
    trainer(tmp_path, of=learned(256), rows=[*ROWS[:20], LONG])


def test_a_prompt_beyond_rotary_positions_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "grpo_fast"):
        check_lengths(model(), TOKENIZER, [ROWS[0]], 8)
        check_lengths(model(max_position_embeddings=4096), TOKENIZER, [LONG], 8)
        check_lengths(model(use_sliding_window=True, sliding_window=4), TOKENIZER, [ROWS[0]], 8)
        assert not caplog.records
        check_lengths(model(), TOKENIZER, [ROWS[0], LONG], 8)
    assert "the prompt of row 1 has" in caplog.text and "64 positions" in caplog.text


def test_only_prompts_that_may_be_too_long_are_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A character that is not ASCII may be written as many, and a chat template adds tokens."""
    encoded: list[Any] = []

    def encode(prompt: Any, *_: Any, **__: Any) -> list[int]:
        encoded.append(prompt)
        return [1]

    monkeypatch.setattr("grpo_fast.trainer.length_check.encode_prompt", encode)
    of, short, exotic = model(max_position_embeddings=64), "a" * 40, "\ufdfa"
    check_lengths(of, TOKENIZER, [{"prompt": short}, {"prompt": "a" * 41}, {"prompt": exotic}], 8)
    assert encoded == ["a" * 41, exotic]
    check_lengths(of, TOKENIZER, [{"prompt": short}, {"prompt": [{"role": "user", "content": "a"}]}], 8, as_chat=True)
    assert encoded[2:] == [short, [{"role": "user", "content": "a"}]]


@pytest.mark.parametrize(
    ("scaling", "limit"),
    [
        ({"rope_type": "default", "rope_theta": 1e4}, 64),
        ({"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}, 128),
        ({"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}, 64),
        ({"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}, 256),
    ],
)
def test_scaled_rotary_positions_count(scaling: dict[str, Any], limit: int) -> None:
    assert position_limit(model(rope_parameters=scaling)) == (limit, False)
    assert position_limit(learned()) == (64, True)
