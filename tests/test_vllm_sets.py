"""The sets of tokens that truncation keeps, from a vLLM server: as sampling masks, or by log-probabilities after truncation."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the stand-in server is backed by a transformers model")

from test_vllm import connect, logprobs_of, params, tiny
from vllm_stand_in import StandIn, serving

from grpo_fast.generation import Completion, SamplerError
from grpo_fast.generation.transformers_sampler import TransformersSampler
from grpo_fast.generation.vllm_requests import NO_TOP_K
from grpo_fast.generation.vllm_sets import TIES, IncompleteSupportError

V = 29
PROMPTS = [[5, 6, 7], [8], [9, 10], [4]]
TEMPERATURES = [0.7, 1.0, 1.5, 0.0]
CUTS: list[dict[str, Any]] = [{"top_k": 6, "top_p": 0.9}, {"top_p": 0.8}, {"min_p": 0.2}]
MASKS: dict[str, Any] = {"scale_out": True, "return_sampling_mask": True}
LOGPROBS: dict[str, Any] = {"max_logprobs": V}


@pytest.fixture(params=["masks", "logprobs"])
def stand_in(request: pytest.FixtureRequest) -> StandIn:
    return StandIn(tiny(), **(MASKS if request.param == "masks" else LOGPROBS))


@pytest.fixture
def url(stand_in: StandIn) -> Iterator[str]:
    with serving(stand_in) as address:
        yield address


def lists(completion: Completion) -> list[list[int]]:
    assert completion.support is not None
    bounds, ids = completion.support.offsets.tolist(), completion.support.token_ids.tolist()
    return [sorted(ids[begin:end]) for begin, end in itertools.pairwise(bounds)]


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_the_sets_that_each_token_was_drawn_from(stand_in: StandIn, url: str, cut: dict[str, Any]) -> None:
    sampler = connect(url)
    assert sampler.returns_support
    wanted = params(TEMPERATURES, return_support=True, seed=None, **cut)
    for completion, prompt, temperature in zip(sampler.generate(PROMPTS, wanted), PROMPTS, TEMPERATURES, strict=True):
        if temperature == 0:
            assert completion.support is None and completion.logprobs is None
            continue
        with torch.no_grad():
            logits = stand_in.model(input_ids=torch.tensor([prompt + completion.token_ids])).logits[0, len(prompt) - 1 : -1]
        sets, scores = lists(completion), logits / temperature
        assert completion.logprobs is not None and len(sets) == len(completion.token_ids) and any(1 < len(ids) < V for ids in sets)
        for row, ids, token, logprob in zip(scores, sets, completion.token_ids, completion.logprobs, strict=True):
            kept = ids or list(range(V))
            assert token in kept and row[token] - row[kept].logsumexp(0) == pytest.approx(logprob, abs=1e-5)
    greedy = TransformersSampler(stand_in.model).generate([PROMPTS[3]], params([0.0]))[0]
    assert sampler.generate([PROMPTS[3]], wanted_for(0.0, **cut))[0].token_ids == greedy.token_ids
    assert len(stand_in.generated) == (4 if stand_in.return_sampling_mask else 1)  # asked once whether it has masks
    sampler.close()


def wanted_for(temperature: float, **cut: Any) -> Any:
    return params([temperature], return_support=True, **cut)


def test_both_ways_and_transformers_return_the_same_sets() -> None:
    found, wanted = [], params(TEMPERATURES[:3], return_support=True, top_k=6, top_p=0.9)
    for options in (MASKS, LOGPROBS):
        with serving(StandIn(tiny(), **options)) as address:
            sampler = connect(address)
            found.append([(each.token_ids, lists(each), each.logprobs) for each in sampler.generate(PROMPTS[:3], wanted)])
            sampler.close()
    assert found[0] == found[1] and max(len(ids) for _, sets, _ in found[0] for ids in sets) == 6


def test_what_is_requested() -> None:
    """The two routes take the same settings; a server with masks refuses greedy decoding and top_k = 0, which are written otherwise."""
    for options, top_k in ((MASKS, 5), (LOGPROBS, 5), (MASKS, 0), (LOGPROBS, 0)):
        stand_in = StandIn(tiny(), **options)
        with serving(stand_in) as address:
            sampler = connect(address)
            more = {"generation_kwargs": {"frequency_penalty": 0.1, "priority": 3, "user": "a"}, "repetition_penalty": 1.1}
            sampler.generate([[5], [6]], params([0.8, 0.0], top_p=0.9, top_k=top_k, min_p=0.01, return_support=True, **more))
            sampler.close()
        sent = {body["prompt"][0]: body for body in stand_in.requests if body["max_tokens"] == 6}
        if options is MASKS:
            body = stand_in.generated[-1]
            assert body["token_ids"] == [5] and body["output_mode"] == "tokens" and body["return_token_ids"]
            assert body["priority"] == 3
            sent[5], greedy = body["sampling_params"], sent[6]
            assert (greedy["temperature"], greedy["top_p"], greedy["top_k"], greedy["min_p"]) == (1.0, 1.0, 1, 0.0)
        else:
            assert sent[6]["temperature"] == 0.0 and sent[6]["logprobs"] == 0
        requested = 0 if options is MASKS else min(top_k + TIES, V) if top_k else V
        expected_top_k = NO_TOP_K if options is MASKS and top_k == 0 else top_k
        settings = [sent[5][name] for name in ("temperature", "top_p", "top_k", "min_p", "max_tokens", "logprobs")]
        assert settings == [0.8, 0.9, expected_top_k, 0.01, 6, requested]
        assert sent[5]["frequency_penalty"] == 0.1 and sent[5]["presence_penalty"] == 0.0
        assert sent[5]["ignore_eos"] and sent[5]["stop_token_ids"] == [1] and sent[5]["repetition_penalty"] == 1.1 and "seed" in sent[5]


def test_sets_are_returned_only_where_they_are_wanted(stand_in: StandIn, url: str, caplog: pytest.LogCaptureFixture) -> None:
    sampler = connect(url)
    for more in ({"top_k": 5}, {"return_support": True}):
        (found,) = sampler.generate([[5]], params([1.3], **more))
        assert found.support is None and found.logprobs is not None
    cold = sampler.generate([[5]], params([1.3]))[0]  # the whole distribution
    bound = logprobs_of(stand_in.model, [5], cold.token_ids, 1.3)
    torch.testing.assert_close(torch.tensor(cold.logprobs), bound, atol=1e-5, rtol=0)
    assert all(body["logprobs"] == 0 for body in stand_in.requests if body["max_tokens"] == 6)
    told = [record for record in caplog.records if "lists the whole vocabulary for each token" in record.getMessage()]
    assert len(told) == stand_in.return_sampling_mask  # once
    sampler.close()


@pytest.mark.parametrize("options", [{"scale_out": True, "max_logprobs": V}, {"return_sampling_mask": False, "max_logprobs": V}], ids=str)
def test_a_server_without_masks(options: dict[str, Any]) -> None:
    """One that has the route, but was started without --return-sampling-mask; and one without the route."""
    stand_in = StandIn(tiny(), **options)
    with serving(stand_in) as address:
        sampler = connect(address)
        assert lists(sampler.generate([[5]], wanted_for(1.0, top_k=4))[0])
        sampler.close()
    assert len(stand_in.generated) == 1


def test_a_server_that_reports_too_few_logprobs() -> None:
    stand_in = StandIn(tiny(), max_logprobs=6)
    with serving(stand_in) as address:
        sampler = connect(address)
        sampler.generate([[5]], params([1.0], max_new_tokens=1))
        before = len(stand_in.requests)
        with pytest.raises(
            IncompleteSupportError, match=r"top_k is 6, and the server reports at most 6 .*vllm serve --max-logprobs 29;"
        ) as caught:
            sampler.generate([[5]], wanted_for(1.0, top_k=6))
        assert "a top_k of less than 6" in str(caught.value) and "replay_support=False" in str(caught.value)
        assert len(stand_in.requests) == before + 1  # one to ask for the limit, none to draw
        assert all(1 <= len(ids) <= 5 for ids in lists(sampler.generate([[5]], wanted_for(1.0, top_k=5))[0]))
        with pytest.raises(
            IncompleteSupportError, match=rf"{address}/v1/completions, prompt 0: top_logprobs\[\d\] has . tokens, 6 were"
        ) as caught:
            sampler.generate([[5]], wanted_for(1.5, top_p=0.99))
        assert "the set may have more" in str(caught.value) and "vllm serve --max-logprobs 29" in str(caught.value)
        sampler.close()


def test_tied_tokens_are_part_of_the_set() -> None:
    """top_k keeps all tokens that are equal to the last one: more log-probabilities than top_k + 1 are needed to see that no more are."""
    model = tiny()
    with torch.no_grad():
        model.lm_head.weight[10:20] = model.lm_head.weight[10]
    with serving(StandIn(model, **LOGPROBS)) as address:
        sampler = connect(address)
        sizes = [len(ids) for seed in range(4) for ids in lists(sampler.generate([[5]], wanted_for(1.0, top_k=3, seed=seed))[0])]
        sampler.close()
    assert min(sizes) == 3 and max(sizes) > 10


def test_a_server_that_loses_its_masks(stand_in: StandIn, url: str) -> None:
    if not stand_in.return_sampling_mask:
        return
    sampler = connect(url)
    sampler.generate([[5]], wanted_for(1.0, top_k=4))
    stand_in.return_sampling_mask = False  # restarted with other options
    with pytest.raises(SamplerError, match=r"/inference/v1/generate, prompt 0: .* has no sampling_mask.*Fix: --return-sampling-mask"):
        sampler.generate([[5]], wanted_for(1.0, top_k=4))
    sampler.close()


# --- answers that are wrong --------------------------------------------------------------------------------------------------------------


def _mask(change: Any) -> Any:
    """Change the last set of an answer of /inference/v1/generate, given the last token."""

    def changed(content: dict[str, Any]) -> dict[str, Any]:
        choice = content["choices"][0]
        choice["sampling_mask"][-1] = change(choice["sampling_mask"][-1], choice["token_ids"][-1])
        return content

    return changed


def _field(**changes: Any) -> Any:
    def changed(content: dict[str, Any]) -> dict[str, Any]:
        content["choices"][0].update(changes)
        return content

    return changed


def _longer(content: dict[str, Any]) -> dict[str, Any]:
    content["choices"][0]["sampling_mask"].append([1])
    return content


def _other_tokens(content: dict[str, Any]) -> dict[str, Any]:
    content["choices"][0]["logprobs"]["content"][0]["token_id"] += 1
    return content


HOSTILE_MASKS: dict[str, tuple[Any, str]] = {
    "id beyond the vocabulary": (_mask(lambda ids, _: [*ids, V]), r"sampling_mask\[\d\] holds id 29; expected 0 <= id < 29"),
    "negative id": (_mask(lambda ids, _: [*ids, -1]), r"holds id -1; expected 0 <= id < 29"),
    "id beyond 64 bits": (_mask(lambda ids, _: [*ids, 1 << 70]), "expected 0 <= id < 29"),
    "fractional id": (_mask(lambda ids, _: [*ids, 7.0]), r"holds 7\.0; expected integer"),
    "boolean id": (_mask(lambda ids, _: [*ids, True]), "holds True; expected integer"),
    "id twice": (_mask(lambda ids, token: [*ids, token]), "of which . are different; expected each id once"),
    "sampled token absent": (_mask(lambda ids, token: [(token + 1) % V]), "the sampled token .* is not among them"),
    "empty set": (_mask(lambda *_: []), "is empty; expected at least the sampled token"),
    "set as text": (_mask(lambda *_: "1"), "is '1'; expected a list"),
    "null set": (_mask(lambda *_: None), "is None; expected a list"),
    "longer mask": (_longer, r"sampling_mask has \d entries for \d sampled tokens"),
    "shorter mask": (_field(sampling_mask=[]), r"sampling_mask has 0 entries"),
    "mask as object": (_field(sampling_mask={"0": [1]}), "sampling_mask is .*expected a list"),
    "no log-probabilities": (_field(logprobs=None), "not one log-probability"),
    "log-probabilities of numbers": (_field(logprobs={"content": [1, 2, 3, 4, 5, 6]}), "log-probability of token 0 is None"),
    "log-probabilities of other tokens": (_other_tokens, "belong to other tokens"),
    "no tokens": (_field(token_ids=None), "no token_ids"),
    "negative token": (_field(token_ids=[-1]), r"token_ids\[0\] is -1"),
    "no choice": (lambda _: {"choices": []}, "has 0 choices"),
    "other prompt": (lambda content: content | {"prompt_token_ids": [6]}, "belongs to another prompt"),
    "no prompt": (lambda content: content | {"prompt_token_ids": None}, "no token_ids"),
}


@pytest.mark.parametrize("case", HOSTILE_MASKS)
def test_no_mask_is_believed(case: str) -> None:
    stand_in = StandIn(tiny(), **MASKS)
    with serving(stand_in) as address:
        sampler = connect(address)
        sampler._logprobs_checked = True
        stand_in.change, words = HOSTILE_MASKS[case]
        with pytest.raises(SamplerError, match=words) as caught:
            sampler.generate([[5]], wanted_for(1.0, top_k=4))
        assert f"{address}/inference/v1/generate, prompt 0" in str(caught.value)
        assert len(stand_in.generated) == 2  # the question for masks, and one request: it is not repeated
        sampler.close()


def _tops(change: Any) -> Any:
    """Change the log-probabilities of the last token, given its name."""

    def changed(content: dict[str, Any]) -> dict[str, Any]:
        choice = content["choices"][0]
        tops = choice["logprobs"]["top_logprobs"]
        tops[-1] = change(tops[-1], f"token_id:{choice['token_ids'][-1]}")
        return content

    return changed


HOSTILE_TOPS: dict[str, tuple[Any, str]] = {
    "incomplete": (
        _tops(lambda tops, _: {key: value for key, value in tops.items() if value > -9999} | more(tops)),
        "the set may have more",
    ),
    "id beyond the vocabulary": (_tops(lambda tops, name: {"token_id:29": tops[name], **others(tops, name)}), "holds id 29; expected"),
    "negative id": (_tops(lambda tops, name: {"token_id:-1": tops[name], **others(tops, name)}), "has the token 'token_id:-1'"),
    "other digits": (_tops(lambda tops, name: {"token_id:٣": tops[name], **others(tops, name)}), "expected names such as"),
    "underscore": (_tops(lambda tops, name: {"token_id:1_0": tops[name], **others(tops, name)}), "expected names such as"),
    "very long id": (_tops(lambda tops, name: {f"token_id:{'9' * 5000}": tops[name]}), "expected names such as"),
    "text": (_tops(lambda tops, name: {" the": tops[name], **others(tops, name)}), "has the token ' the'; expected names such as"),
    "id twice": (_tops(lambda tops, name: tops | {name.replace(":", ":0"): tops[name]}), "has a token twice"),
    "sampled token absent": (_tops(lambda tops, name: {"token_id:28": tops[name], **others(tops, name, "token_id:28")}), "not among them"),
    "not normalised": (_tops(lambda tops, _: {key: value - 1 for key, value in tops.items()}), r"sum to 0\.367879; expected 1"),
    "NaN": (_tops(lambda tops, name: tops | {name: math.nan}), "has the log-probability nan"),
    "positive": (_tops(lambda tops, name: tops | {name: 1.0}), r"has the log-probability 1\.0"),
    "text as log-probability": (_tops(lambda tops, name: tops | {name: "-1"}), "has the log-probability '-1'"),
    "null": (_tops(lambda *_: None), r"top_logprobs\[\d\] is None; expected log-probabilities by token"),
    "list": (_tops(lambda *_: [1]), r"top_logprobs\[\d\] is \[1\]; expected log-probabilities by token"),
    "empty": (_tops(lambda *_: {}), "sum to 0; expected 1"),
}


def others(tops: dict[str, float], *names: str) -> dict[str, float]:
    return {key: value for key, value in tops.items() if key not in names}


def more(tops: dict[str, float]) -> dict[str, float]:
    """Tokens of hardly any probability in place of those outside of the set."""
    return {key: -30.0 for key, value in tops.items() if value <= -9999}


@pytest.mark.parametrize("case", HOSTILE_TOPS)
def test_no_logprobs_are_believed(case: str) -> None:
    stand_in = StandIn(tiny(), max_logprobs=20)
    with serving(stand_in) as address:
        sampler = connect(address)
        sampler.generate([[5]], wanted_for(1.0, top_k=4, max_new_tokens=1))  # asks what the server can
        stand_in.change, words = HOSTILE_TOPS[case]
        with pytest.raises(SamplerError, match=words) as caught:
            sampler.generate([[5]], wanted_for(1.0, top_k=4))
        assert f"{address}/v1/completions, prompt 0" in str(caught.value)
        assert isinstance(caught.value, IncompleteSupportError) == (case == "incomplete")
        sampler.close()


# --- the trainer ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["masks", "logprobs"])
def test_the_trainer_replays_the_sets(tmp_path: Path, way: str, caplog: pytest.LogCaptureFixture) -> None:
    """The policy of the loss is the one that sampled: no warning, no refused weights per sequence, and a check without allowance."""
    from trainer_cases import TOKENIZER, logs, model, trainer

    options = MASKS if way == "masks" else {"max_logprobs": len(TOKENIZER)}
    with serving(StandIn(model().eval(), **options)) as address, caplog.at_level(logging.WARNING, logger="grpo_fast"):
        settings = {"use_vllm": True, "vllm_server_base_url": address, "sampler_options": {"weight_sync": "disk", "concurrency": 4}}
        settings |= {"vllm_importance_sampling_mode": "sequence_mask", "sampler_tolerance": 1e-4, "max_steps": 1, "learning_rate": 0.0}
        run = trainer(tmp_path, top_p=0.7, top_k=9, temperature=1.2, num_iterations=2, **settings)
        run.train()
    assert run.rollout is not None and run.rollout.support is not None and "whole softmax" not in caplog.text
    assert (run.rollout.tokens["old"] - run.rollout.tokens["sampler"]).abs().max() < 1e-4
    assert (run.rollout.tokens["weights"] - 1).abs().max() < 1e-3
    sizes = run.rollout.support.sizes
    assert sizes.min() >= 1 and 2 < logs(run)[0]["sampling/set_size"] <= 9
    run.sampler.close()
