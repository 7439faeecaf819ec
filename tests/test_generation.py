"""Samplers over the model that is trained: their distribution, the log-probabilities they report, and the state they restore."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the samplers draw with a transformers model")

from grpo_fast.generation import SAMPLERS, Completion, Sampler, SamplerError, SamplingParams, make_sampler
from grpo_fast.generation.continuous_batching import ContinuousBatchingSampler
from grpo_fast.generation.transformers_sampler import RowSampler, TransformersSampler, truncate
from grpo_fast.models.unwrap import inner_model, is_sharded

EOS, PAD = 1, 0
LOCAL = ("transformers", "continuous_batching")


def tiny(seed: int = 0, *, dropout: float = 0.0, init: float = 0.3) -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=29,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=init,
        attention_dropout=dropout,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    return Qwen2ForCausalLM(config)


def params(temperatures: Sequence[float], **more: Any) -> SamplingParams:
    defaults: dict[str, Any] = {"max_new_tokens": 6, "seed": 5, "eos_token_id": EOS, "pad_token_id": PAD}
    return SamplingParams(temperatures=list(temperatures), **(defaults | more))


def scores_of(model: Any, prompt: list[int], ids: list[int], temperature: float, options: SamplingParams) -> torch.Tensor:
    """Log-probabilities [T, V] of the sampled distribution, from one forward pass without cache and padding."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + ids]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return truncate(logits / temperature, options).log_softmax(-1)


@pytest.fixture(autouse=True)
def no_garbage_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' continuous batching runs gc.collect twice after each rollout, which would take most of the time of these tests."""
    monkeypatch.setattr("gc.collect", lambda *_: 0)


PROMPTS = [[5, 6, 7, 8, 9], [8], [9, PAD, 10], [5, 6], [11, 12, 13, 14]]
TEMPERATURES = [0.5, 1.0, 1.7, 0.05, 0.0]


@pytest.mark.parametrize("truncation", [{}, {"top_k": 5}, {"top_p": 0.7}, {"top_k": 9, "top_p": 0.8}], ids=str)
@pytest.mark.parametrize("name", LOCAL)
def test_each_row_has_its_own_temperature_and_reports_what_it_drew_from(name: str, truncation: dict[str, Any]) -> None:
    model = tiny().eval()
    options = params(TEMPERATURES, **truncation)
    found = make_sampler(name, model, None).generate(PROMPTS, options)
    for prompt, temperature, completion in zip(PROMPTS, TEMPERATURES, found, strict=True):
        ids = completion.token_ids
        assert completion.finished == (ids[-1] == EOS) and EOS not in ids[:-1]
        assert completion.finished or len(ids) == 6
        if temperature == 0:
            assert completion.logprobs is None
            assert ids == scores_of(model, prompt, ids, 1.0, options).argmax(-1).tolist()
            continue
        expected = scores_of(model, prompt, ids, temperature, options).gather(-1, torch.tensor(ids)[:, None]).squeeze(-1)
        assert torch.isfinite(expected).all()  # no token was drawn that truncation leaves out
        # at T = 0.05 rounding of the logits, by another order of the same sums, is twenty times larger
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=3e-6 / temperature, rtol=0)


def test_min_p() -> None:
    model = tiny().eval()
    options = params([1.5] * 8, min_p=0.3)
    for completion in make_sampler("transformers", model, None).generate([[5, 6]] * 8, options):
        scores = scores_of(model, [5, 6], completion.token_ids, 1.5, options)
        assert torch.isfinite(scores.gather(-1, torch.tensor(completion.token_ids)[:, None])).all()
        assert torch.isinf(scores).any()
    with pytest.raises(ValueError, match="no min-p"):
        make_sampler("continuous_batching", model, None).generate([[5]], params([1.0], min_p=0.1))


def test_the_tokens_have_the_frequencies_of_the_softmax() -> None:
    """4,000 first tokens at T = 0.7 and 1.6 each; chi-squared over the tokens expected at least five times, at its 1e-4 quantile."""
    model = tiny(init=0.15).eval()
    count = 4000
    for temperature in (0.7, 1.6):
        found = TransformersSampler(model).generate([[5, 6, 7]] * count, params([temperature] * count, max_new_tokens=1))
        seen = torch.bincount(torch.tensor([completion.token_ids[0] for completion in found]), minlength=29).double()
        expected = scores_of(model, [5, 6, 7], [2], temperature, params([1.0])).exp()[0].double() * count
        kept = expected >= 5
        statistic = ((seen - expected).square() / expected)[kept].sum()
        degrees = int(kept.sum()) - 1
        quantile = degrees * (1 - 2 / (9 * degrees) + 3.72 * (2 / (9 * degrees)) ** 0.5) ** 3  # Wilson and Hilferty
        assert statistic < quantile
        wrong = scores_of(model, [5, 6, 7], [2], 1.0, params([1.0])).exp()[0].double() * count
        assert ((seen - wrong).square() / wrong)[kept].sum() > quantile  # the test can tell this temperature from 1


@pytest.mark.parametrize("name", LOCAL)
def test_same_seed_same_tokens_and_torchs_generator_is_unchanged(name: str) -> None:
    model = tiny()
    sampler = make_sampler(name, model, None)
    before = torch.get_rng_state()
    first = sampler.generate(PROMPTS, params(TEMPERATURES))
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(7)
    assert sampler.generate(PROMPTS, params(TEMPERATURES)) == first
    assert sampler.generate(PROMPTS, params(TEMPERATURES, seed=6)) != first
    torch.manual_seed(3)
    unseeded = sampler.generate(PROMPTS, params(TEMPERATURES, seed=None))
    assert sampler.generate(PROMPTS, params(TEMPERATURES, seed=None)) != unseeded
    torch.manual_seed(3)
    assert sampler.generate(PROMPTS, params(TEMPERATURES, seed=None)) == unseeded


@pytest.mark.parametrize("name", LOCAL)
def test_new_weights_are_used_at_once(name: str) -> None:
    model, other = tiny(0).eval(), tiny(1).eval()
    sampler = make_sampler(name, model, None)
    first = sampler.generate(PROMPTS, params(TEMPERATURES))
    model.load_state_dict(other.state_dict())
    sampler.update_weights(model, 1)
    second = sampler.generate(PROMPTS, params(TEMPERATURES))
    assert second != first
    assert second == make_sampler(name, other, None).generate(PROMPTS, params(TEMPERATURES))
    sampler.close()
    sampler.close()


@pytest.mark.parametrize("name", LOCAL)
def test_the_models_generation_config_is_not_used_and_restored(name: str) -> None:
    from transformers import GenerationConfig

    model = tiny().eval()
    plain = make_sampler(name, model, None).generate(PROMPTS, params(TEMPERATURES))
    model.generation_config = GenerationConfig(
        do_sample=False,
        temperature=0.1,
        top_k=1,
        top_p=0.1,
        repetition_penalty=9.0,
        num_beams=1,
        max_length=3,
        eos_token_id=7,
        min_new_tokens=4,
    )
    before = copy.deepcopy(model.generation_config.to_dict())
    assert make_sampler(name, model, None).generate(PROMPTS, params(TEMPERATURES)) == plain
    assert model.generation_config.to_dict() == before


@pytest.mark.parametrize("name", LOCAL)
def test_dropout_and_gradient_checkpointing_are_off_and_every_module_keeps_its_mode(name: str) -> None:
    model = tiny(dropout=0.9)
    model.train()
    model.gradient_checkpointing_enable()
    model.lm_head.eval()
    modes = [module.training for module in model.modules()]
    found = make_sampler(name, model, None).generate(PROMPTS, params(TEMPERATURES))
    assert [module.training for module in model.modules()] == modes
    assert found == make_sampler(name, tiny(dropout=0.9).eval(), None).generate(PROMPTS, params(TEMPERATURES))
    model.eval()
    with pytest.raises(ValueError, match="temperatures has 1 entries"):
        make_sampler(name, model, None).generate(PROMPTS, params([1.0]))


def test_small_batches_keep_the_order() -> None:
    """Greedy rows do not depend on their batch, so batches of 1, 2 and all give the same completions in the order of the prompts."""
    model = tiny().eval()
    greedy = [0.0] * len(PROMPTS)
    whole = TransformersSampler(model).generate(PROMPTS, params(greedy))
    for size in (1, 2):
        assert TransformersSampler(model, batch_size=size).generate(PROMPTS, params(greedy)) == whole
    sampled = TransformersSampler(model, batch_size=2).generate(PROMPTS, params(TEMPERATURES))
    for prompt, temperature, completion in zip(PROMPTS[:4], TEMPERATURES, sampled, strict=False):
        scores = scores_of(model, prompt, completion.token_ids, temperature, params([1.0]))
        expected = scores.gather(-1, torch.tensor(completion.token_ids)[:, None]).squeeze(-1)
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=3e-6 / temperature, rtol=0)


@pytest.mark.parametrize("name", LOCAL)
def test_edges(name: str) -> None:
    sampler = make_sampler(name, tiny().eval(), None)
    assert sampler.generate([], params([])) == []
    assert isinstance(sampler, Sampler)
    with pytest.raises(ValueError, match=r"prompts\[1\] is empty"):
        sampler.generate([[1], []], params([1.0, 1.0]))
    one = sampler.generate([[5]], params([1.0], max_new_tokens=1))[0]
    assert len(one.token_ids) == 1 and one.logprobs is not None
    every = sampler.generate([[5]], params([1.0], eos_token_id=list(range(1, 29))))[
        0
    ]  # every token except the pad token ends the completion
    assert every.finished and every.token_ids[-1] != PAD


def test_near_certain_tokens_have_exact_logprobs() -> None:
    """At margins of 12 and 30 nats, compared with float64; the tolerance is the resolution of float32 just above 1."""
    options = params([1.0, 1.0])
    sampler = RowSampler([1.0, 1.0], options, torch.Generator().manual_seed(0))
    logits = torch.full((2, 50), -8.0)
    logits[:, 3] = torch.tensor([4.0, 22.0])
    drawn = sampler(torch.zeros(2, 1, dtype=torch.long), logits).argmax(-1, keepdim=True)
    expected = logits.double().log_softmax(-1).gather(-1, drawn)
    torch.testing.assert_close(sampler.logprobs(drawn).double(), expected, atol=3e-7, rtol=0)


def test_diverged_weights_are_named() -> None:
    model = tiny().eval()
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    with pytest.raises(FloatingPointError, match="The weights have diverged"):
        TransformersSampler(model).generate([[5]], params([1.0]))


# --- wrapped models --------------------------------------------------------------------------------------------------------------


class Wrapper(torch.nn.Module):
    """Wraps a model as DDP does: the model is the attribute ``module``, and there is no `generate`."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def test_wrapped_models_are_unwrapped() -> None:
    model = tiny().eval()
    plain = TransformersSampler(model).generate(PROMPTS, params(TEMPERATURES))
    assert TransformersSampler(Wrapper(model)).generate(PROMPTS, params(TEMPERATURES)) == plain
    assert inner_model(Wrapper(Wrapper(model))) is model
    compiled: Any = torch.compile(Wrapper(model), backend="eager")
    assert inner_model(compiled) is model
    assert not is_sharded(Wrapper(model))


def test_lora_layers_stay_in_force() -> None:
    peft = pytest.importorskip("peft", reason="an adapter needs peft")
    base = tiny().eval()
    plain = TransformersSampler(base).generate(PROMPTS, params(TEMPERATURES))
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")).eval()
    sampler = TransformersSampler(Wrapper(model))
    unchanged = sampler.generate(PROMPTS, params(TEMPERATURES))  # B is still zero, so the results are the same up to rounding
    assert [completion.token_ids for completion in unchanged] == [completion.token_ids for completion in plain]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    adapted = sampler.generate(PROMPTS, params(TEMPERATURES))
    assert [completion.token_ids for completion in adapted] != [completion.token_ids for completion in plain]
    scores = scores_of(model, PROMPTS[1], adapted[1].token_ids, 1.0, params([1.0]))
    expected = scores.gather(-1, torch.tensor(adapted[1].token_ids)[:, None]).squeeze(-1)
    torch.testing.assert_close(torch.tensor(adapted[1].logprobs), expected, atol=5e-6, rtol=0)
    prompt_tuned = peft.get_peft_model(tiny(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="prompt learning"):
        inner_model(prompt_tuned)


# --- making one ------------------------------------------------------------------------------------------------------------------


class OwnSampler:
    """The smallest possible sampler."""

    def generate(self, prompts: Sequence[list[int]], params: SamplingParams) -> list[Completion]:
        return [Completion([EOS], True) for _ in prompts]

    def update_weights(self, model: Any, step: int) -> None: ...

    def close(self) -> None: ...


def test_make_sampler() -> None:
    own = OwnSampler()
    assert make_sampler(own, None, None) is own
    assert isinstance(make_sampler("transformers", tiny(), None, batch_size=3), TransformersSampler)
    assert set(SAMPLERS) == {"transformers", "continuous_batching", "vllm"}
    with pytest.raises(ValueError, match="sampler is 'telepathy'; expected one of transformers"):
        make_sampler("telepathy", tiny(), None)
    with pytest.raises(ValueError, match="no option speed; it has batch_size, cache_implementation"):
        make_sampler("transformers", tiny(), None, speed=1)
    with pytest.raises(TypeError, match="without generate, update_weights, close"):
        make_sampler(object(), tiny(), None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="beside a ready sampler"):
        make_sampler(own, None, None, batch_size=3)
    with pytest.raises(ValueError, match="batch_size is 0"):
        make_sampler("transformers", tiny(), None, batch_size=0)
    with pytest.raises(TypeError, match="with a method generate"):
        make_sampler("transformers", torch.nn.Linear(2, 2), None)


def test_continuous_batching_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.generation

    monkeypatch.setattr(transformers.generation, "ContinuousBatchingConfig", object, raising=False)
    with pytest.raises(SamplerError, match=r"expected 5\.17 or newer"):
        ContinuousBatchingSampler(tiny())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperatures": [1.0, -1.0]}, r"temperatures\[1\] is -1.0"),
        ({"temperatures": [float("nan")]}, r"temperatures\[0\] is nan"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"eos_token_id": []}, "eos_token_id is an empty list"),
    ],
)
def test_bad_params(change: dict[str, Any], words: str) -> None:
    options: dict[str, Any] = {"max_new_tokens": 3, "temperatures": [1.0], "eos_token_id": EOS, "pad_token_id": PAD} | change
    with pytest.raises(ValueError, match=words):
        SamplingParams(**options)


def test_a_completion_has_one_logprob_for_each_token() -> None:
    with pytest.raises(ValueError, match="logprobs has 1 entries; expected 2"):
        Completion([3, 4], False, [0.0])
