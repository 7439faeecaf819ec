"""The prompt of a group that is computed once in sampling: same completions, fewer tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from decoder_models import SIZES, gpt2, llama, qwen3
from transformers import Phi3Config, Phi3ForCausalLM, PreTrainedModel

from grpo_fast.generation.protocol import Completion, SamplingParams
from grpo_fast.generation.transformers_sampler import TransformersSampler

TOKENS: dict[str, Any] = {"eos_token_id": 1, "bos_token_id": None}
WINDOW = {"sliding_window": 6, "use_sliding_window": True, "max_window_layers": 1}
LONG = [5, 9, 2, 40, 33, 8, 17, 21, 13]
PROMPTS = [LONG, [7, 7, 3], LONG, LONG, [4], [7, 7, 3], LONG]


def make(kind: str) -> PreTrainedModel:
    if kind == "gpt2":
        return gpt2().double()
    if kind == "window":
        return qwen3(**TOKENS, **WINDOW).double()
    if kind == "longrope":  # other frequencies from nine tokens on, where LONG without its last token has eight
        factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
        rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 8, **factors}
        more: dict[str, Any] = {"original_max_position_embeddings": 8, "rope_parameters": rope, "pad_token_id": 0}
        torch.manual_seed(0)
        return Phi3ForCausalLM(Phi3Config(**SIZES, **TOKENS, **more)).double()
    if kind == "dynamic":
        rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
        return llama(**TOKENS, max_position_embeddings=4, rope_parameters=rope).double()
    return llama(**TOKENS).double()


@pytest.fixture
def widths(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shape of the token ids of every forward pass."""
    seen: list[tuple[int, ...]] = []
    original = nn.Module.__call__

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self, PreTrainedModel) and hasattr(self, "lm_head"):
            seen.append(tuple(kwargs["input_ids"].shape))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "__call__", call)
    return seen


def draw(model: PreTrainedModel, share: bool, prompts: list[list[int]] = PROMPTS, **options: Any) -> list[Completion]:
    temperatures = [1.0, 0.7, 0.0, 1.3, 1.0, 1.0, 1.0][: len(prompts)]
    params = SamplingParams(temperatures=temperatures, max_new_tokens=7, eos_token_id=1, pad_token_id=0, seed=3, **options)
    return TransformersSampler(model, share_prompts=share).generate(prompts, params)


@pytest.mark.parametrize("options", [{}, {"top_p": 0.9, "return_support": True}, {"repetition_penalty": 1.3}])
@pytest.mark.parametrize("kind", ["llama", "window", "gpt2"])
def test_completions_are_those_of_prompts_computed_each(kind: str, options: dict[str, Any], widths: list[tuple[int, ...]]) -> None:
    model = make(kind)
    expected = draw(model, False, **options)
    assert widths[0] == (7, 9)
    widths.clear()
    found = draw(model, True, **options)
    assert widths[:3] == [(3, 8), (7, 1), (7, 1)]
    for a, b in zip(found, expected, strict=True):
        assert a.token_ids == b.token_ids and a.finished == b.finished
        assert (a.support is None) == (b.support is None) and (a.logprobs is None) == (b.logprobs is None)
        if a.support is not None and b.support is not None:
            assert a.support.token_ids.tolist() == b.support.token_ids.tolist()
            assert a.support.offsets.tolist() == b.support.offsets.tolist()
        if a.logprobs is not None:
            assert a.logprobs == pytest.approx(b.logprobs, rel=1e-5, abs=1e-5)
    assert len({tuple(each.token_ids) for each in found}) > 4


def test_other_caches_and_different_prompts_are_left_alone(widths: list[tuple[int, ...]]) -> None:
    model = make("llama")
    draw(model, True, [LONG, LONG[1:], LONG[2:]])
    draw(model, True, [[4], [4], [4]])
    draw(model, True, generation_kwargs={"use_cache": False})
    assert [shape for shape in widths if shape[0] != 3 and shape[0] != 7] == [] and (3, 8) not in widths
    TransformersSampler(model, cache_implementation="static").generate(
        PROMPTS, SamplingParams(temperatures=[1.0] * 7, max_new_tokens=2, eos_token_id=1, pad_token_id=0, seed=3)
    )
    assert (3, 8) not in widths


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_rotary_embeddings_that_depend_on_the_length_are_left_alone(kind: str, widths: list[tuple[int, ...]]) -> None:
    expected, found = draw(make(kind), False), draw(make(kind), True)  # a model each, because a dynamic embedding remembers lengths
    assert [each.token_ids for each in found] == [each.token_ids for each in expected]
    assert [each.logprobs for each in found] == [each.logprobs for each in expected]
    assert (3, 8) not in widths
