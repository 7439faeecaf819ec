"""Truncated sampling in the trainer: the policy that is trained is the one over the kept sets that sampled."""

from __future__ import annotations

import dataclasses
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from trainer_cases import TOKENIZER, Scripted, logs, model, trainer

import grpo_fast as gf
from grpo_fast.generation import SamplerError, SamplingParams
from grpo_fast.generation.continuous_batching import ContinuousBatchingSampler
from grpo_fast.generation.transformers_sampler import TransformersSampler
from grpo_fast.head import kept
from grpo_fast.loss import reference
from grpo_fast.trainer.checkpoint_files import CheckpointError
from grpo_fast.trainer.rollout import Rollout

CUTS: list[dict[str, Any]] = [{"top_p": 0.8}, {"top_k": 5}, {"min_p": 0.3}, {"top_p": 0.9, "top_k": 8, "min_p": 0.05}]


def exact_logprobs(rollout: Rollout, over_sets: bool) -> torch.Tensor:
    """In float64, by the model's logits one sequence at a time: of the model before its first step."""
    policy, found, first = model().double().eval(), [], 0
    assert rollout.support is not None
    for prompt, completion, temperature in zip(rollout.prompt_ids, rollout.completion_ids, rollout.temperature.tolist(), strict=True):
        with torch.no_grad():
            logits = policy(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        sets = rollout.support.take(torch.arange(first, first + len(completion)))
        first += len(completion)
        masks = reference.kept_sets(sets.token_ids, sets.offsets, logits.shape[-1]) if over_sets else None
        found.append(reference.token_statistics(logits, torch.tensor(completion), temperature, kept=masks)[0])
    return torch.cat(found)


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_every_log_probability_is_over_the_sets(tmp_path: Path, cut: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        kept.LARGEST_SHARES, torch.float32, 2
    )  # so that some sets are scored by themselves, and some over the whole vocabulary
    settings = {"temperature": 1.3, "num_iterations": 2, "beta": 0.1, "max_steps": 1, "vllm_importance_sampling_correction": True}
    run = trainer(tmp_path, **settings, **cut)
    run.train()
    rollout = run.rollout
    assert rollout is not None and rollout.support is not None and len(rollout.support) == sum(rollout.lengths)
    truth = exact_logprobs(rollout, over_sets=True)
    assert (exact_logprobs(rollout, over_sets=False) - truth).abs().mean() > 0.02  # the case has a signal
    for name in ("sampler", "old", "ref"):
        assert (rollout.tokens[name] - truth).abs().max() < 1e-5, name
    assert (rollout.tokens["weights"] - 1).abs().max() < 1e-4
    (record,) = logs(run)[:1]
    assert record["sampling/sampling_logp_difference/mean"] < 1e-5 and record["ratio/mean"] == pytest.approx(1, abs=1e-5)
    mass = float((exact_logprobs(rollout, over_sets=False) - truth).exp().mean())
    assert record["sampling/kept_mass"] == pytest.approx(mass, abs=1e-4) and 0.2 < mass < 0.99
    sizes = rollout.support.sizes
    assert record["sampling/set_size"] == pytest.approx(float(sizes[sizes > 0].float().mean()), abs=1e-4)
    assert sizes[sizes > 0].min() >= 1 and sizes.max() <= cut.get("top_k", len(TOKENIZER))


@pytest.mark.parametrize("packing", [True, False])
def test_the_loss_and_its_gradient_are_of_the_sets(tmp_path: Path, packing: bool) -> None:
    run = trainer(tmp_path, top_p=0.8, max_steps=1, packing=packing, num_iterations=2, metrics_on="all")
    run.train()
    assert run.rollout is not None
    rollout = dataclasses.replace(run.rollout, advantages=torch.linspace(-1, 1, len(run.rollout)))
    gradients = []
    for rows in (rollout, dataclasses.replace(rollout, support=None)):
        policy = model()
        out = run.model_forward.loss(policy, rows, config=gf.LossConfig())
        out.loss.backward()
        gradients.append(policy.lm_head.weight.grad.double())
        if rows.support is not None:
            assert (out.metrics["ratio_max"] - 1).abs() < 1e-4
        else:
            assert out.metrics["ratio_mean"] < 0.95
    exact = model().double()
    loss, first = torch.zeros((), dtype=torch.float64), 0
    for row, (prompt, completion) in enumerate(zip(rollout.prompt_ids, rollout.completion_ids, strict=True)):
        logits = exact(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        assert rollout.support is not None
        sets = rollout.support.take(torch.arange(first, first + len(completion)))
        first += len(completion)
        masks = reference.kept_sets(sets.token_ids, sets.offsets, logits.shape[-1])
        logprobs = reference.token_statistics(logits, torch.tensor(completion), float(rollout.temperature[row]), kept=masks)[0]
        loss = loss - (rollout.advantages[row] * (logprobs - logprobs.detach()).exp()).sum()
    (loss / first).backward()
    truth = exact.lm_head.weight.grad
    assert (gradients[0] - truth).norm() < 1e-5 * truth.norm() < 1e-4 * (gradients[1] - truth).norm()


def test_without_replay_the_loss_is_of_the_whole_distribution(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="grpo_fast"):
        run = trainer(tmp_path, top_p=0.8, max_steps=1, replay_support=False)
    run.train()
    assert run.rollout is not None and run.rollout.support is None
    assert logs(run)[0]["sampling/sampling_logp_difference/mean"] > 0.02
    assert "replay_support is False. The loss is that of the whole softmax, so its gradient is biased" in caplog.text


def test_without_truncation_there_are_no_sets(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=1)
    run.train()
    assert run.rollout is not None and run.rollout.support is None and "sampling/set_size" not in logs(run)[0]


def test_a_sampler_without_sets(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(SamplerError, match=r"replay_support is True\. Sampling is truncated \(top_p = 0\.8.*Scripted does not return"):
        trainer(tmp_path, top_p=0.8, sampler=Scripted(), replay_support=True)
    with caplog.at_level(logging.WARNING, logger="grpo_fast"):
        trainer(tmp_path, top_p=0.8, sampler=Scripted())
    assert "Scripted does not return the sets of kept tokens. The loss is that of the whole softmax" in caplog.text

    class Promising(Scripted):
        returns_support = True

    with pytest.raises(SamplerError, match="returned 16 of 16 completions without the sets"):
        trainer(tmp_path, top_p=0.8, sampler=Promising()).train()


@pytest.mark.parametrize("value", ["yes", None, 2])
def test_a_wrong_setting(tmp_path: Path, value: Any) -> None:
    with pytest.raises(ValueError, match=r"replay_support is .*; expected one of 'auto', True, False"):
        trainer(tmp_path, replay_support=value)


def test_a_rollout_is_saved_with_its_sets(tmp_path: Path) -> None:
    support = gf.Support.from_lists([[1, 2], [], [7, 5, 3]])
    rollout = Rollout([[1]], [[2, 3, 5]], torch.ones(1), torch.ones(1), torch.tensor([True]), {}, support)
    rollout.save(tmp_path / "rollout.safetensors")
    loaded = Rollout.load(tmp_path / "rollout.safetensors", torch.device("cpu")).support
    assert loaded is not None
    assert torch.equal(loaded.token_ids, support.token_ids) and torch.equal(loaded.offsets, support.offsets)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"support_offsets": None}, "only one of support_token_ids and support_offsets"),
        ({"support_offsets": torch.tensor([0, 3, 2, 5])}, "never to decrease"),
        ({"support_offsets": torch.tensor([0, 2, 5])}, "kept sets of 2 tokens"),
        ({"support_token_ids": torch.tensor([1, 2, 7, 5, 99]).int()}, "ids up to 99"),
        ({"support_token_ids": torch.tensor([1, 2, 7, 5, 3])}, "dtype torch.int64"),
    ],
)
def test_damaged_sets_are_not_loaded(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path, support = tmp_path / "rollout.safetensors", gf.Support.from_lists([[1, 2], [], [7, 5, 3]])
    Rollout([[1]], [[2, 3, 5]], torch.ones(1), torch.ones(1), torch.tensor([True]), {}, support).save(path)
    table = {name: column for name, column in (load_file(path) | change).items() if column is not None}
    save_file(table, path)
    with pytest.raises(CheckpointError, match=f"is not a rollout: .*{message}"):
        Rollout.load(path, torch.device("cpu"), vocab_size=50)


@pytest.mark.parametrize("sampler", [TransformersSampler, ContinuousBatchingSampler])
def test_the_sampler_returns_the_sets_it_drew_from(sampler: Any) -> None:
    policy = model(attn_implementation="sdpa").eval()
    params = SamplingParams(8, [0.7, 1.3, 0.0], top_p=0.9, seed=1, eos_token_id=TOKENIZER.eos_token_id, pad_token_id=0, return_support=True)
    prompts = [[5, 6, 7], [4], [8, 9]]
    found = sampler(policy).generate(prompts, params)
    assert found[2].support is None and found[2].logprobs is None  # greedy
    for prompt, temperature, each in zip(prompts[:2], params.temperatures, found, strict=False):
        assert each.support is not None and each.kept_mass is not None and len(each.support) == len(each.token_ids)
        with torch.no_grad():
            logits = policy(torch.tensor([prompt + each.token_ids])).logits[0, len(prompt) - 1 : -1]
        expected = gf.Support.from_logits(logits, temperature=temperature, top_p=0.9)
        assert torch.equal(each.support.dense(len(TOKENIZER)), expected.dense(len(TOKENIZER)))
        kept_mass = (logits / temperature).softmax(-1).masked_fill(~expected.dense(len(TOKENIZER)), 0).sum(-1)
        assert torch.allclose(torch.tensor(each.kept_mass), kept_mass, atol=1e-5)
        assert all(token in ids for token, ids in zip(each.token_ids, lists(each.support), strict=True))
    without = sampler(policy).generate(prompts, dataclasses.replace(params, return_support=False))
    assert [each.token_ids for each in without] == [each.token_ids for each in found] and without[0].support is None
    assert all(math.isclose(a, b) for a, b in zip(without[0].logprobs or (), found[0].logprobs or (), strict=True))


def lists(support: gf.Support) -> list[list[int]]:
    return [support.take(torch.tensor([n])).token_ids.tolist() for n in range(len(support))]
