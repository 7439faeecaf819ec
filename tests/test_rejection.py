"""Rejection of tokens and sequences by hand, in float64 and against verl's own function; and in the trainer, with bypass_mode too."""

from __future__ import annotations

import itertools
import math
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peers import peer_module
from torch import Tensor
from trainer_cases import Scripted, config, logs, model, trainer

import grpo_fast as gf
from grpo_fast.generation import Completion, SamplerError
from grpo_fast.generation.transformers_sampler import TransformersSampler
from grpo_fast.integrations.conventions import rejection_settings
from grpo_fast.loss.rejection import parse_rejections
from grpo_fast.models.batch import ForwardBatch
from grpo_fast.models.forward import ModelForward

NAN = math.nan
NAMES = [
    f"{level}_{k}" for level in ("token", "seq_sum", "seq_mean", "seq_max") for k in ("k1", "k2", "k3") if (level, k) != ("seq_max", "k1")
]


# ---- by hand


def test_bands_by_hand() -> None:
    ratios = torch.tensor([[2.0, 0.5, 1.0], [2.0, 2.0, 9.0], [0.25, 1.0, 9.0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 0]])
    old = ratios.log()
    zeros = torch.zeros(3, 3)

    def kept(**arguments: Any) -> list[Any]:
        return gf.rejection_mask(old, zeros, mask, estimator="k1", **arguments).tolist()

    assert kept(level="token", low=0.4, high=1.5) == [[0, 1, 1], [0, 0, 1], [0, 1, 1]]  # what is masked has no distance
    assert kept(level="sequence", high=3.0) == [[1], [0], [1]]  # products 1, 4, 1/4
    assert kept(level="sequence", low=0.3) == [[1], [1], [0]]
    assert kept(low=0.6, high=1.9) == [[1], [0], [0]]  # geometric means 1, 2, 1/2
    assert kept(low=0.4, high=2.1) == [[1], [1], [1]]
    assert kept(low=0.0, high=2.1) == [[1], [1], [1]]


def test_divergences_by_hand() -> None:
    """k2 of a log-ratio of 2 is 2, k3 is e^2 - 3 = 4.39; of -2, k3 is e^-2 + 1 = 1.14."""
    old, mask = torch.tensor([[2.0, -2.0], [0.0, -2.0]]), torch.ones(2, 2)

    def kept(estimator: str, level: str, high: float) -> list[Any]:
        return gf.rejection_mask(old, torch.zeros(2, 2), mask, estimator=estimator, level=level, high=high).tolist()

    assert kept("k3", "token", 1.2) == [[0, 1], [1, 1]]
    assert kept("k2", "token", 1.9) == [[0, 0], [1, 0]]
    assert kept("k2", "token", 2.0) == [[1, 1], [1, 1]]  # the bound is kept
    assert kept("k2", "sequence", 2.1) == [[0], [1]]  # sums 4 and 2
    assert kept("k2", "sequence_mean", 1.5) == [[0], [1]]  # means 2 and 1
    assert kept("k3", "sequence_max", 1.2) == [[0], [1]]


# ---- the formula in float64, and verl's own function


def in_float64(log_ratio: Tensor, mask: Tensor, name: str, threshold: str) -> Tensor:
    """Whether each token is kept, one token after the other."""
    level, _, estimator = name.rpartition("_")
    numbers = [float(number) for number in threshold.split("_")]
    estimate = {"k1": lambda d: -d, "k2": lambda d: d * d / 2, "k3": lambda d: math.exp(d) - 1 - d}[estimator]
    lower, upper = -math.inf, numbers[0]
    if estimator == "k1":
        lower, upper = math.log(numbers[0] if len(numbers) == 2 else 1 / numbers[0]), math.log(numbers[-1])
    kept = torch.ones(log_ratio.shape)
    for row, (values, counts) in enumerate(zip(log_ratio.tolist(), mask.bool().tolist(), strict=True)):
        distances = [estimate(max(-20.0, min(20.0, d))) if counted else 0.0 for d, counted in zip(values, counts, strict=True)]
        total, length = sum(distances), max(sum(counts), 1)
        one = {"seq_sum": total, "seq_mean": total / length, "seq_max": max(distances), "token": None}[level]
        for t, distance in enumerate(distances):
            kept[row, t] = float(lower <= (distance if one is None else one) <= upper)
    return kept


@pytest.fixture(scope="module")
def verl() -> types.ModuleType:
    stand_ins = (
        "omegaconf",
        "tensordict",
        "verl.protocol",
        "verl.trainer.config",
        "verl.trainer.config.algorithm",
        "verl.workers.config",
        "verl.workers.config.actor",
    )
    return peer_module("verl", "0.9.1", "trainer.ppo.rollout_corr_helper", stand_ins)


THRESHOLDS = {"k1": ("1.3", "0.9_1.05"), "k2": ("0.02", "0.3"), "k3": ("0.02", "0.3")}
CASES = [(name, threshold) for name in NAMES for threshold in THRESHOLDS[name[-2:]]]


@pytest.mark.parametrize(("name", "threshold"), [*CASES, ("token_k3,seq_mean_k1", "0.2,0.9_1.1"), ("token_k2,seq_max_k3,token_k2", "0.3")])
def test_parity_with_verl(verl: types.ModuleType, name: str, threshold: str, generator: torch.Generator) -> None:
    """Every criterion of verl's, with packed input too; sequences of all lengths, of which one is masked."""
    scale = torch.tensor([0.01, 0.1, 0.3, 1.0, 30.0, 0.05])[:, None]
    old, sampled = (torch.randn(6, 9, generator=generator).double() for _ in range(2))
    old = sampled + scale * old
    mask = (torch.arange(9) < torch.tensor([9, 7, 5, 3, 1, 0])[:, None]).long()
    expected, _ = verl.compute_rollout_rejection_mask(old - sampled, mask, name, threshold)
    arguments = rejection_settings("verl", name, threshold)
    ours, cu_seqlens = torch.ones(6, 9), torch.arange(0, 55, 9).int()
    for each in arguments:
        found = gf.rejection_mask(old, sampled, mask, **each)  # type: ignore[arg-type]
        packed = gf.rejection_mask(old.flatten(), sampled.flatten(), mask.flatten(), cu_seqlens=cu_seqlens, **each)  # type: ignore[arg-type]
        assert torch.equal(packed.view(6, 9), found.expand(6, 9))
        ours = ours * found
    assert torch.equal(ours * mask, expected.float())
    if "," not in name:
        assert torch.equal(ours * mask, in_float64(old - sampled, mask, name, threshold) * mask)
    if name.startswith("token"):
        assert 0 < expected.sum() < mask.sum()


def test_a_log_probability_that_is_not_scored_is_kept() -> None:
    old, sampled = torch.tensor([[-1.0, -1.0, NAN]]), torch.tensor([[NAN, -1.0, 0.0]])
    mask = torch.tensor([[1, 1, 0]])
    for name in NAMES:
        (arguments,) = rejection_settings("verl", name, "1.001" if name.endswith("k1") else "1e-6")
        assert gf.rejection_mask(old, sampled, mask, **arguments).all()  # type: ignore[arg-type]


def test_empty_and_masked_sequences() -> None:
    cu_seqlens = torch.tensor([0, 0, 2, 2], dtype=torch.int32)
    for level in ("token", "sequence", "sequence_mean", "sequence_max"):
        arguments: dict[str, Any] = {"estimator": "k3", "level": level, "high": 0.1}
        kept = gf.rejection_mask(torch.zeros(2), torch.tensor([-3.0, 0.0]), torch.tensor([1, 1]), cu_seqlens=cu_seqlens, **arguments)
        assert kept.tolist() == ([0, 1] if level == "token" else [0, 0])
        assert gf.rejection_mask(torch.zeros(2, 0), torch.zeros(2, 0), torch.zeros(2, 0), **arguments).numel() in (0, 2)
        assert gf.rejection_mask(torch.zeros(1, 2), torch.full((1, 2), -9.0), torch.zeros(1, 2), **arguments).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"estimator": "k4", "high": 1.0}, "estimator is 'k4'; expected one of k1, k2, k3"),
        ({"level": "batch", "high": 1.0}, "level is 'batch'; expected one of token, sequence, sequence_mean, sequence_max"),
        ({"level": "sequence_max", "high": 2.0}, "level is 'sequence_max' with estimator 'k1'.*Fix: estimator='k3'"),
        ({}, "low and high are None; expected a bound"),
        ({"estimator": "k2", "low": 0.1, "high": 1.0}, r"low is 0\.1 with estimator 'k2'.*expected None. Fix: bound it by high"),
        ({"high": 0.0}, "high is 0; expected a number above 0"),
        ({"low": 2.0, "high": 1.0}, r"low is 2\.0, high is 1\.0; expected low <= high"),
        ({"high": -1.0}, r"high is -1\.0; expected a finite number >= 0. It bounds a ratio"),
        ({"estimator": "k3", "high": NAN}, r"high is nan; expected a finite number >= 0. It bounds a divergence"),
        ({"high": 2.0, "log_ratio_clamp": 100}, "log_ratio_clamp is 100; expected at most 80"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=message):
        gf.rejection_mask(x, x, torch.ones(2, 3), **arguments)


@pytest.mark.parametrize(
    ("names", "threshold", "message"),
    [
        ("seq_max_k1", "2", "rollout_rs is 'seq_max_k1'; expected one of token_k1"),
        ("", "2", "rollout_rs is ''; expected one of token_k1"),
        ("token_k3", None, "rollout_rs_threshold is None; expected one for 'token_k3'. Fix: '0.999_1.001'"),
        ("token_k3,token_k2", "1,2,3", "rollout_rs_threshold is '1,2,3'; expected one for all, or 2 separated by commas"),
        ("token_k3", "0.1_0.2", "rollout_rs_threshold of token_k3 is '0.1_0.2'; expected a number above 0."),
        ("token_k1", "2_0.5", "rollout_rs_threshold of token_k1 is '2_0.5'; expected a number above 0, or 'lower_upper'"),
        ("token_k1", "0.5", "rollout_rs_threshold of token_k1 is '0.5'; expected at least 1: the lower bound is its reciprocal"),
        ("token_k2", -1, "rollout_rs_threshold of token_k2 is '-1'; expected a number above 0"),
    ],
)
def test_bad_criteria(names: str, threshold: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        parse_rejections(names, threshold)
    with pytest.raises(ValueError, match=f"GRPOConfig: {message}"):
        config(tmp_path, rollout_rs=names, rollout_rs_threshold=threshold)
    with pytest.raises(ValueError, match="library is 'trl'; expected 'verl'"):
        rejection_settings("trl", names, threshold)


# ---- in the trainer


class Shifted:
    """The trainer's model, whose k-th completion of a call has log-probabilities that differ by the k-th shift, and so on cyclically."""

    def __init__(self, *shifts: float) -> None:
        self.shifts = shifts
        self.inner: Any = None

    def generate(self, prompts: Any, params: Any) -> Any:
        found = zip(self.inner.generate(prompts, params), itertools.cycle(self.shifts), strict=False)
        return [Completion(each.token_ids, each.finished, [value + shift for value in each.logprobs]) for each, shift in found]

    def update_weights(self, model: Any, step: int) -> None:
        self.inner = TransformersSampler(model)

    def close(self) -> None:
        pass


def per_row(run: Any, name: str) -> list[list[float]]:
    return [values.tolist() for values in run.rollout.tokens[name].split(run.rollout.lengths)]


@pytest.mark.parametrize("corrects", [False, True])
def test_a_band_of_the_geometric_mean_leaves_the_weights_of_tokens_alone(corrects: bool, tmp_path: Path) -> None:
    """Every third completion of four is rejected; the weights of the others are what they are without."""
    settings: dict[str, Any] = {
        "vllm_importance_sampling_correction": corrects,
        "vllm_importance_sampling_mode": "token_truncate",
        "rollout_rs": "seq_mean_k1",
        "rollout_rs_threshold": "0.8_1.25",
    }
    run = trainer(tmp_path, sampler=Shifted(0.1, -0.1, 0.5, 0.0), sampler_tolerance=9.0, metrics_on="all", **settings)
    run.train()
    weights = [math.exp(-0.1), math.exp(0.1), 0.0, 1.0] if corrects else [1.0, 1.0, 0.0, 1.0]
    assert run.rollout is not None
    for row, found in enumerate(per_row(run, "weights")):
        assert found == pytest.approx([weights[row % 4]] * len(found), rel=1e-4)
    log = logs(run)[0]
    tokens = sum(run.rollout.lengths)
    assert log["sampling/rejected_sequences"] == 0.25
    assert log["sampling/rejected_tokens"] == pytest.approx(sum(run.rollout.lengths[2::4]) / tokens)


def test_the_sampler_as_the_old_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one ratio is that of the current policy to the sampler, and no pass computes the old policy; later rollouts are not compared."""
    monkeypatch.setattr(ModelForward, "logprobs", lambda *_, **__: pytest.fail("the old policy is computed"))
    run = trainer(tmp_path, sampler=Shifted(0.15), sampler_tolerance=0.2, bypass_mode=True, num_iterations=2, max_steps=2, epsilon=0.1)
    run.train()
    assert run.rollout is not None
    assert torch.equal(run.rollout.tokens["old"], run.rollout.tokens["sampler"]) and "weights" not in run.rollout.tokens
    first, second = logs(run)
    assert first["ratio/mean"] == pytest.approx(math.exp(-0.15), rel=1e-5) and second["ratio/mean"] != first["ratio/mean"]
    assert first["clip_ratio/low_mean"] > 0  # exp(-0.15) is below 1 - 0.1
    assert "sampling/importance_sampling_ratio/mean" not in first


def test_a_sampler_that_is_behind_does_not_stop_the_run(tmp_path: Path) -> None:
    """Only the first rollout is of the same weights."""

    class Behind(Shifted):
        def update_weights(self, model: Any, step: int) -> None:
            self.shifts = (0.0,) if step == 0 else (0.5,)
            super().update_weights(model, step)

    settings: dict[str, Any] = {"sampler_tolerance_patience": 1, "max_steps": 2}
    trainer(tmp_path, sampler=Behind(0.0), bypass_mode=True, **settings).train()
    with pytest.raises(SamplerError, match="Step 2: "):
        trainer(tmp_path, sampler=Behind(0.0), **settings).train()
    with pytest.raises(SamplerError, match="Nothing was trained"):
        trainer(tmp_path, sampler=Shifted(0.5), bypass_mode=True, **settings).train()


@pytest.mark.parametrize("fused", [True, False])
def test_rejection_by_the_current_policy(fused: bool) -> None:
    """As with bypass_mode: beside the weights, and with the off-policy sequence mask."""
    advantages = torch.tensor([-1.0, 1.0, -1.0, -0.5])
    batch = ForwardBatch([[5], [6], [7], [8]], [[9, 10], [11], [12, 13], [3]], torch.full((4,), 0.7), advantages, torch.ones(4).bool())
    of = model().train()
    current = ModelForward(Accelerator(cpu=True), 0, fused_head=fused).logprobs(of, batch, batch_size=4).logprobs
    drift = torch.tensor([0.9, 0.2, 0.1, 0.1, -0.2, -3.0])  # the geometric means of sampler / trainer: e^0.55, e^0.1, e^-0.05, e^-3
    batch.tokens |= {"old": current.clone(), "sampler": current + drift, "weights": torch.full((6,), 0.5)}

    def loss(name: str, threshold: str, **options: Any) -> gf.GRPOOutput:
        made = ModelForward(Accelerator(cpu=True), 0, fused_head=fused, rejections=parse_rejections(name, threshold), **options)
        return made.loss(of, batch, config=gf.LossConfig(), num_items=6)

    terms = -0.5 * torch.tensor([-1.0, -1.0, 1.0, -1.0, -1.0, -0.5])
    out = loss("seq_mean_k1", "0.9_2.0")
    assert out.loss.item() == pytest.approx(terms[:5].sum().item() / 6, abs=1e-6)
    assert out.metrics["rejected_tokens"].item() == pytest.approx(1 / 6) and out.metrics["rejected_sequences"].item() == 0.25
    out = loss("token_k1", "0.9_2.0")  # 0.9 is at most e^0.69, and e^-0.2 is below 0.9
    assert out.loss.item() == pytest.approx(terms[[2, 3]].sum().item() / 6 + terms[1].item() / 6, abs=1e-6)
    assert (out.metrics["rejected_tokens"].item(), out.metrics["rejected_sequences"].item()) == (0.5, 0.75)
    out = loss("seq_mean_k1", "0.9_2.0", off_policy_mask_threshold=0.5)
    assert out.loss.item() == pytest.approx(terms[2:5].sum().item() / 6, abs=1e-6)
    assert out.metrics["off_policy_masked"].item() == 0.25
    del batch.tokens["sampler"], batch.tokens["old"]
    assert loss("token_k1", "1.1").loss.item() == pytest.approx(terms.sum().item() / 6, abs=1e-6)  # still the policy that sampled


@pytest.mark.parametrize("settings", [{"rollout_rs": "token_k3", "rollout_rs_threshold": 0.1}, {"bypass_mode": True}])
def test_a_sampler_without_log_probabilities(settings: dict[str, Any], tmp_path: Path) -> None:
    name = next(iter(settings))
    with pytest.raises(
        ValueError, match=f"{name} is .*; expected Scripted to return the log-probabilities of its tokens .*Fix: None or False"
    ):
        trainer(tmp_path, sampler=Scripted(), **settings).train()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rollout_rs_threshold": "2"}, "rollout_rs_threshold is '2'; expected None without rollout_rs"),
        (
            {"bypass_mode": True, "vllm_importance_sampling_correction": True},
            "importance_sampling_correction is True; .*applied twice",
        ),
        (
            {"rollout_rs": "token_k3, seq_sum_k1", "rollout_rs_threshold": 2, "top_p": 0.9, "replay_support": False},
            "no sum .*Fix: 'seq_mean_k1'",
        ),
        ({"rollout_rs": "seq_sum_k3", "rollout_rs_threshold": 2, "repetition_penalty": 1.1}, "no sum over a sequence with penalties"),
        ({"bypass_mode": True, "loss_type": "reinforce"}, "loss_type is 'reinforce'; expected a loss with a ratio.*Fix: 'cispo'"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"GRPOConfig: .*{message}"):
        config(tmp_path, **settings)


def test_sums_are_allowed_where_the_sets_are_replayed(tmp_path: Path) -> None:
    config(tmp_path, rollout_rs="seq_sum_k1", rollout_rs_threshold=2, top_p=0.9)  # by the trainer's own sampler
    with pytest.raises(ValueError, match="rollout_rs is 'seq_sum_k1'; expected no sum"):
        trainer(tmp_path, sampler=Scripted(), rollout_rs="seq_sum_k1", rollout_rs_threshold=2, top_p=0.9)


def test_the_criteria_are_read_from_a_command_line_and_a_number(tmp_path: Path) -> None:
    (expected,) = parse_rejections("token_k3", "0.25")
    for threshold in ("0.25", 0.25):
        args = config(tmp_path, rollout_rs="token_k3", rollout_rs_threshold=threshold, bypass_mode=True)
        assert args.forward_options()["rejections"] == (expected,)
