"""Penalties and other options of the samplers: what they draw from, what the loss makes of it, and what is refused."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the samplers draw with a transformers model")

from test_generation import EOS, LOCAL, PAD, params, tiny
from trainer_cases import ROWS, Scripted, config, logs, trainer
from vllm_stand_in import StandIn, serving

from grpo_fast.generation import Completion, SamplerError, make_sampler
from grpo_fast.trainer.changed_settings import changes_since, recorded_settings

PROMPTS = [[5, 6, 7, 8, 9], [8], [9, PAD, 10], [5, 6, 5, 6]]
TEMPERATURES = [0.5, 1.0, 1.7, 0.8]


def penalised(logits: torch.Tensor, prompt: list[int], ids: list[int], penalty: float, options: dict[str, Any]) -> torch.Tensor:
    """The penalties by their definitions, one position at a time: float64 [T, V] of raw logits [T, V]."""
    found = logits.double().clone()
    for position, row in enumerate(found):
        before = prompt + ids[:position]
        for (token,), bias in options.get("sequence_bias", []):
            row[token] += bias
        for token in set(before):
            row[token] = row[token] / penalty if row[token] > 0 else row[token] * penalty
        row[options.get("suppress_tokens", [])] = -math.inf
        if position < options.get("min_new_tokens", 0):
            row[EOS] = -math.inf
        if options.get("no_repeat_ngram_size") == 2:
            row[[after for last, after in itertools.pairwise(before) if last == before[-1]]] = -math.inf
    return found


def truncated(scores: torch.Tensor, top_p: float, typical_p: float) -> torch.Tensor:
    for row in scores:
        if top_p < 1:
            order = row.argsort(descending=True)
            mass = row.softmax(-1)[order].cumsum(-1)
            row[order[1:][mass[:-1] >= top_p]] = -math.inf
        if typical_p < 1:
            logprobs = row.log_softmax(-1)
            entropy = -(logprobs.exp() * logprobs.clamp(min=-1e9)).sum()
            order = (logprobs + entropy).abs().argsort()
            mass = logprobs.exp()[order].cumsum(-1)
            row[order[1:][mass[:-1] >= typical_p]] = -math.inf
    return scores


CASES: list[tuple[float, dict[str, Any], float]] = [  # repetition_penalty, generation_kwargs, top_p
    (1.7, {}, 1.0),
    (0.6, {"suppress_tokens": [3, 11, 12], "min_new_tokens": 3, "no_repeat_ngram_size": 2, "sequence_bias": [[[7], 1.5]]}, 1.0),
    (1.3, {"typical_p": 0.7}, 0.8),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", LOCAL)
def test_the_reported_log_probabilities_are_those_of_the_penalised_distribution(
    name: str, case: tuple[float, dict[str, Any], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each row by itself: padding, which is the end token here, is no text."""
    monkeypatch.setattr("gc.collect", lambda *_: 0)
    (penalty, options, top_p), model = case, tiny().eval()
    settings: dict[str, Any] = {"repetition_penalty": penalty, "generation_kwargs": options, "top_p": top_p, "pad_token_id": EOS}
    found = make_sampler(name, model, None).generate(PROMPTS, params(TEMPERATURES, return_support=True, **settings))
    without = 0.0
    for prompt, temperature, completion in zip(PROMPTS, TEMPERATURES, found, strict=True):
        ids = completion.token_ids
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + ids]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        scores = penalised(logits, prompt, ids, penalty, options) / temperature
        kept = truncated(scores, top_p, options.get("typical_p", 1.0))
        expected = kept.log_softmax(-1)[range(len(ids)), ids]
        torch.testing.assert_close(torch.tensor(completion.logprobs).double(), expected, atol=1e-5, rtol=0)
        without = max(without, float((expected - (logits.double() / temperature).log_softmax(-1)[range(len(ids)), ids]).abs().max()))
        if top_p < 1:
            assert completion.support is not None
            sets = completion.support.token_ids.long().tensor_split(completion.support.offsets[1:-1].long())
            assert [sorted(each.tolist()) for each in sets] == [row.isfinite().nonzero().flatten().tolist() for row in kept]
    assert without > 0.3  # the case has a signal


def test_a_server_is_asked_for_them() -> None:
    """And reports the log-probabilities of the penalised distribution, as real servers do with processed_logprobs."""
    model = tiny().eval()
    stand_in = StandIn(model)
    with serving(stand_in) as url:
        sampler = make_sampler("vllm", model, None, url=url, weight_sync="none")
        options: dict[str, Any] = {"presence_penalty": 0.5, "logit_bias": {"7": -1.0}, "bad_words": ["no"], "priority": 3}
        (completion,) = sampler.generate([[5, 6]], params([1.0], repetition_penalty=1.8, generation_kwargs=options))
        with pytest.raises(ValueError, match=r"generation_kwargs: stop is 'x', which sampler 'vllm' does not take: .*Fix: "):
            sampler.generate([[5]], params([1.0], generation_kwargs={"stop": "x"}))
        sampler.close()
    *checks, sent = stand_in.requests
    assert sent["repetition_penalty"] == 1.8 and {name: sent[name] for name in options} == options
    assert sent["frequency_penalty"] == 0.0
    assert checks and all(each["repetition_penalty"] == 1.0 and each["presence_penalty"] == 0.0 for each in checks)
    ids = completion.token_ids
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[5, 6, *ids]])).logits[0, 1:-1]
    expected = penalised(logits, [5, 6], ids, 1.8, {}).log_softmax(-1)[range(len(ids)), ids]
    torch.testing.assert_close(torch.tensor(completion.logprobs).double(), expected, atol=1e-5, rtol=0)


REFUSED: list[tuple[str, str, object, str]] = [
    ("transformers", "temperature", 0.5, "it is a setting of its own. Fix: temperature"),
    ("transformers", "top_p", 0.5, "it is a setting of its own. Fix: top_p"),
    ("transformers", "max_new_tokens", 5, "it is a setting of its own. Fix: max_completion_length"),
    ("transformers", "num_return_sequences", 2, "it is a setting of its own. Fix: num_generations"),
    ("transformers", "num_beams", 2, "beam search does not sample"),
    ("transformers", "do_sample", False, "drawn from the policy"),
    ("transformers", "penalty_alpha", 0.6, "does not sample from the policy"),
    ("transformers", "prompt_lookup_num_tokens", 3, "assisted decoding"),
    ("transformers", "stop_strings", ["x"], "a completion ends at an end token"),
    ("continuous_batching", "use_cache", False, "a cache of its own"),
    ("vllm", "max_tokens", 5, "it is a setting of its own. Fix: max_completion_length"),
    ("vllm", "n", 2, "it is a setting of its own. Fix: num_generations"),
    ("vllm", "use_beam_search", True, "beam search does not sample"),
]


@pytest.mark.parametrize(("sampler", "name", "value", "reason"), REFUSED, ids=lambda value: str(value)[:30])
def test_an_option_is_refused_by_name(sampler: str, name: str, value: object, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        config(tmp_path, sampler=sampler, generation_kwargs={name: value})
    message = str(error.value)
    assert message.startswith(f"GRPOConfig: generation_kwargs: {name} is {value!r}, which sampler {sampler!r} does not take: ")
    assert reason in message and "Fix: " in message


def test_unknown_options_and_wrong_values(tmp_path: Path) -> None:
    for sampler, name, hint in (("vllm", "presence_penality", "presence_penalty"), ("transformers", "supress_tokens", "suppress_tokens")):
        with pytest.raises(ValueError, match=f"{name} is 1; sampler '{sampler}' has no such option. Did you mean {hint}"):
            config(tmp_path, sampler=sampler, generation_kwargs={name: 1})
    with pytest.raises(ValueError, match=r"generation_kwargs is \{'min_new_tokens': 'a'\}, which transformers does not take: .*Fix: "):
        config(tmp_path, generation_kwargs={"min_new_tokens": "a"})
    for wrong in (0.0, -1.0, math.inf):
        with pytest.raises(ValueError, match=f"repetition_penalty is {wrong}; expected a finite number above 0"):
            config(tmp_path, repetition_penalty=wrong)
    neutral = config(tmp_path, generation_kwargs='{"do_sample": true, "num_beams": 1, "use_cache": true, "no_repeat_ngram_size": 0}')
    assert not neutral.penalises and not neutral.truncates and neutral.vllm_importance_sampling_mode == "sequence_mask"
    typical = config(tmp_path, generation_kwargs={"typical_p": 0.9})
    assert typical.truncates and not typical.penalises and typical.max_truncation_gain == math.inf


def test_every_option_of_transformers_has_a_class() -> None:
    """None that the installed transformers knows is refused as unknown."""
    from transformers import GenerationConfig

    from grpo_fast.generation.generation_options import check_generation_options

    names = {name for name in vars(GenerationConfig()) if not name.startswith("_")} - {"transformers_version"}
    assert len(names) > 50
    for name in sorted(names):
        try:
            check_generation_options("transformers", {name: None})
        except ValueError as error:
            assert "no such option" not in str(error), name


def test_the_weights_of_a_penalised_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each token is weighted by its probability without the penalty over that with it; the log says so once."""
    with caplog.at_level(logging.WARNING, logger="grpo_fast"):
        run = trainer(tmp_path, repetition_penalty=1.5, vllm_importance_sampling_clip_max=2.0, max_steps=2, num_iterations=2)
        run.train()
    assert run.rollout is not None
    tokens = run.rollout.tokens
    weights = (tokens["old"] - tokens["sampler"]).exp()
    expected = torch.where(weights > 2.0, 0.0, weights)
    live = tokens["weights"] != 0
    torch.testing.assert_close(tokens["weights"][live], expected[live])
    assert live.float().mean() > 0.3 and (expected[live] - 1).abs().max() > 0.1
    assert logs(run)[0]["sampling/sampling_logp_difference/mean"] > 0.02 and logs(run)[0]["ratio/mean"] == pytest.approx(1, abs=1e-5)
    (message,) = [record.getMessage() for record in caplog.records if "penalised" in record.getMessage()]
    assert "repetition_penalty = 1.5" in message and "at most 2: a weight above it is 0" in message
    assert run.sampler_check.done and run.sampler_check.gap < 1e-5  # compared without the penalty


def test_without_weights_the_gradient_is_biased(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="grpo_fast"):
        run = trainer(tmp_path, generation_kwargs={"suppress_tokens": [5]}, vllm_importance_sampling_correction=False)
        run.train()
    assert run.rollout is not None and "weights" not in run.rollout.tokens
    assert not any(5 in ids for ids in run.rollout.completion_ids)
    assert "so the gradient is biased" in caplog.text and "suppress_tokens = [5]" in caplog.text
    with pytest.raises(ValueError, match=r"a mode per token with a penalised distribution \(suppress_tokens = \[5\]\).*Fix: 'token_mask'"):
        config(tmp_path, generation_kwargs={"suppress_tokens": [5]}, vllm_importance_sampling_mode="sequence_mask")
    with pytest.raises(SamplerError, match=r"Scripted returned completions without log-probabilities.*repetition_penalty = 1\.2\. Fix: "):
        trainer(tmp_path, repetition_penalty=1.2, sampler=Scripted()).train()


def test_a_wrong_temperature_is_found_under_a_penalty(tmp_path: Path) -> None:
    run = trainer(tmp_path, repetition_penalty=1.5)
    sampler: Any = run.sampler
    generate = sampler.generate

    def colder(prompts: Any, options: Any) -> list[Completion]:
        return generate(prompts, dataclasses.replace(options, temperatures=[0.5] * len(prompts)))

    sampler.generate = colder
    with pytest.raises(SamplerError, match=r"T = 0\.5.*Nothing was trained") as error:
        run.train()
    assert re.search(r"sampler_tolerance = 0\.02", str(error.value))


def test_evaluations_and_checkpoints_know_them(tmp_path: Path) -> None:
    run = trainer(tmp_path, repetition_penalty=1.4, generation_kwargs={"min_new_tokens": 2}, eval_dataset=ROWS[:2], eval_rounds=1)
    asked = []
    sampler: Any = run.sampler
    generate = sampler.generate

    def recorded(prompts: Any, options: Any) -> list[Completion]:
        asked.append((options.repetition_penalty, dict(options.generation_kwargs), options.top_p))
        return generate(prompts, options)

    sampler.generate = recorded
    run.evaluate()
    assert asked == [(1.4, {"min_new_tokens": 2}, 0.95)]
    before, now = (recorded_settings(args, []) for args in (run.args, config(tmp_path, generation_kwargs={"min_new_tokens": 3})))
    changes = [str(change) for change in changes_since(before, now)]
    assert "repetition_penalty: 1.4 -> 1.0" in changes and "generation_kwargs: {'min_new_tokens': 2} -> {'min_new_tokens': 3}" in changes
