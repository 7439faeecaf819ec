"""Weights and masks on the surrogate: by hand, and against TRL's own functions."""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

import grpo_fast as gf

NAN = float("nan")


def untyped(value: object) -> Any:
    """An argument of a wrong type, which the type checker does not see."""
    return value


def test_rollout_weights_by_hand() -> None:
    old = torch.tensor([[math.log(0.5), math.log(0.5), NAN], [math.log(0.9), math.log(0.1), math.log(0.2)]])
    sampler = torch.tensor([[math.log(0.25), math.log(0.1), NAN], [math.log(0.9), NAN, math.log(0.4)]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    token = gf.rollout_weights(old, sampler, mask, high=3.0)
    torch.testing.assert_close(token, torch.tensor([[2.0, 3.0, 1.0], [1.0, 1.0, 0.5]]))  # 5 is clamped; NaN and masked count as 1
    masked = gf.rollout_weights(old, sampler, mask, mode="mask", low=0.6, high=3.0)
    torch.testing.assert_close(masked, torch.tensor([[2.0, 0.0, 1.0], [1.0, 1.0, 0.0]]))
    product = gf.rollout_weights(old, sampler, mask, level="sequence", high=None)
    torch.testing.assert_close(product, torch.tensor([[10.0], [0.5]]))
    mean = gf.rollout_weights(old, sampler, mask, level="sequence_mean", high=None)
    torch.testing.assert_close(mean, torch.tensor([[10**0.5], [0.5 ** (1 / 3)]]))


def test_both_bounds_belong_to_the_weights_that_are_kept() -> None:
    """Weights of exactly 1 are at both bounds: IcePop keeps [low, high] (arXiv:2510.18855)."""
    zeros, mask = torch.zeros(1, 2), torch.ones(1, 2)
    for low, high in ((1.0, None), (None, 1.0), (1.0, 1.0)):
        assert gf.rollout_weights(zeros, zeros, mask, mode="mask", low=low, high=high).tolist() == [[1.0, 1.0]]


def test_packed_equals_padded() -> None:
    old, sampler, mask = torch.randn(2, 3), torch.randn(2, 3), torch.rand(2, 3) > 0.3
    cu_seqlens = torch.tensor([0, 3, 6], dtype=torch.int32)
    for level in ("sequence", "sequence_mean"):
        padded = gf.rollout_weights(old, sampler, mask, level=level)
        packed = gf.rollout_weights(old.flatten(), sampler.flatten(), mask.flatten(), level=level, cu_seqlens=cu_seqlens)
        torch.testing.assert_close(packed, padded.expand(2, 3).flatten())


def test_the_factors_reach_the_surrogate_and_not_the_kl() -> None:
    logits, ids, advantages, mask = torch.randn(2, 3, 9), torch.randint(9, (2, 3)), torch.tensor([1.0, -1.0]), torch.ones(2, 3)
    ref = torch.randn(2, 3) - 2
    config = gf.LossConfig(beta=0.1)
    keep = gf.off_policy_sequence_mask(torch.full((2, 3), -3.0), torch.full((2, 3), -1.0), advantages, mask, threshold=0.5)
    assert keep.tolist() == [[1.0], [0.0]]
    both = gf.grpo_loss(logits, ids, advantages, config=config, ref_logprobs=ref, rollout_weights=keep)
    alone = gf.grpo_loss(logits, ids, torch.tensor([1.0, 0.0]), config=config, ref_logprobs=ref)
    torch.testing.assert_close(both.loss, alone.loss)


def test_parity_with_trl() -> None:
    trainer = pytest.importorskip("trl.trainer.grpo_trainer", reason="TRL is not installed").GRPOTrainer
    logprobs, sampler, mask = torch.randn(4, 6), torch.randn(4, 6), (torch.rand(4, 6) > 0.3).long()
    sampler[1, 2] = NAN
    advantages = torch.tensor([1.0, -1.0, -2.0, 0.0])
    for threshold in (-0.5, 0.0, 0.5):
        theirs = trainer.get_off_policy_mask(advantages[:, None], logprobs, sampler, mask, threshold)
        ours = gf.off_policy_sequence_mask(logprobs, sampler, advantages, mask, threshold=threshold)
        assert torch.equal(ours, theirs.float())
    accelerator = types.SimpleNamespace(pad_across_processes=lambda x, dim, pad_index: x, gather=lambda x: x)
    entropy = torch.rand(4, 6)
    for quantile in (0.2, 0.5, 1.0):
        theirs = trainer.get_high_entropy_mask(types.SimpleNamespace(accelerator=accelerator), entropy, mask, 1 - quantile)
        assert torch.equal(gf.top_entropy_mask(entropy, mask, quantile=quantile), theirs.float())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, m: gf.rollout_weights(x, x, m, mode="clip"), "mode is 'clip'; expected 'truncate' or 'mask'"),
        (lambda x, m: gf.rollout_weights(x, x, m, level="batch"), "level is 'batch'; expected one of token"),
        (lambda x, m: gf.rollout_weights(x, x, m, low=2.0, high=1.0), "low is 2.0, high is 1.0; expected low <= high"),
        (lambda x, m: gf.rollout_weights(x, x[:1], m), r"rollout_logprobs has shape \[1, 3\]; expected"),
        (lambda x, m: gf.rollout_weights(x.flatten(), x.flatten(), m.flatten(), level="sequence"), "cu_seqlens is None with packed input"),
        (lambda x, m: gf.top_entropy_mask(x, m, quantile=0.0), "quantile is 0.0; expected a finite number > 0"),
        (lambda x, m: gf.top_entropy_mask(x, m, quantile=1.5), "quantile is 1.5; expected at most 1"),
        (lambda x, m: gf.top_entropy_mask(x, m[:1], quantile=0.5), r"mask has shape \[1, 3\]; expected .*sizes follow from entropy\)"),
        (lambda x, m: gf.rollout_weights(x, x, 2 * m), r"mask\[0, 0\] is 2.0; expected bool, or numbers 0 and 1"),
        (lambda x, m: gf.rollout_weights(x[None], x[None], m[None]), r"old_logprobs has shape \[1, 2, 3\]; expected \[B, T\] or packed"),
        (lambda x, m: gf.rollout_weights(x, x.to("meta"), m), r"rollout_logprobs is on meta, old_logprobs is on cpu; .*to\(old_logprobs"),
        (lambda x, m: gf.rollout_weights(x, x, m, high=NAN), "high is nan; expected a finite number >= 0"),
        (lambda x, m: gf.rollout_weights(x, x, m, high=-1.0), "high is -1.0; expected a finite number >= 0.*Pass None for no bound"),
        (lambda x, m: gf.rollout_weights(x, x, m, low=-0.5), "low is -0.5; expected a finite number >= 0"),
        (lambda x, m: gf.rollout_weights(x, x, m, log_ratio_clamp=-1.0), "log_ratio_clamp is -1.0; expected a finite number > 0"),
        (lambda x, m: gf.rollout_weights(x, x, m, log_ratio_clamp=100), "log_ratio_clamp is 100; expected at most 80"),
        (lambda x, m: gf.rollout_weights(x, x, m, cu_seqlens=torch.tensor([0, 2])), "cu_seqlens was given with old_logprobs of shape"),
        (lambda x, m: packed(x, m, torch.tensor([0, 5])), r"cu_seqlens is \[0, 5\]; expected to begin with 0, .* end with N = 6"),
        (lambda x, m: packed(x, m, torch.zeros(1, 2).int()), r"cu_seqlens has shape \[1, 2\]; expected \[S \+ 1\]"),
        (lambda x, m: gf.off_policy_sequence_mask(x, x, torch.ones(3), m, threshold=0.5), r"advantages has shape \[3\]; .*\[B\] = \[2\]"),
        (lambda x, m: gf.off_policy_sequence_mask(x, x, torch.ones(1, 3), m, threshold=0.5), r"advantages has shape \[1, 3\]; expected"),
        (lambda x, m: gf.off_policy_sequence_mask(x, x, torch.ones(2), m, threshold=NAN), "threshold is nan; expected a finite number"),
        (
            lambda x, m: gf.off_policy_sequence_mask(
                x[0], x[0], torch.ones(1), m[0], threshold=0.5, cu_seqlens=torch.tensor([0, 3], dtype=torch.int32)
            ),
            r"advantages has shape \[1\]; expected \[N\] = \[3\]",
        ),
    ],
)
def test_bad_input(call: Callable[[torch.Tensor, torch.Tensor], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.randn(2, 3), torch.ones(2, 3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, m: gf.rollout_weights(x, x, m, low=untyped("a")), r"low is 'a' \(str\); expected a number >= 0"),
        (lambda x, m: gf.rollout_weights(x, x, m, log_ratio_clamp=untyped("x")), r"log_ratio_clamp is 'x' \(str\); expected a number > 0"),
        (lambda x, m: gf.rollout_weights(x.tolist(), x, m), r"old_logprobs is a list; .*Wrap it: torch.as_tensor\(old_logprobs\)"),
        (lambda x, m: gf.rollout_weights(x, x.tolist(), m), r"rollout_logprobs is a list; .*device=old_logprobs.device"),
        (lambda x, m: gf.rollout_weights(x.long(), x, m), r"old_logprobs has dtype torch.int64; .*old_logprobs.float\(\)"),
        (lambda x, m: packed(x, m, [0, 6]), "cu_seqlens is a list; expected a torch.Tensor"),
        (lambda x, m: packed(x, m, torch.tensor([0.0, 6.0])), "cu_seqlens has dtype torch.float32; expected torch.int32"),
        (
            lambda x, m: gf.off_policy_sequence_mask(x, x, untyped([1.0, 1.0]), m, threshold=0.5),
            "advantages is a list; expected a torch.Tensor",
        ),
        (
            lambda x, m: gf.off_policy_sequence_mask(x, x, torch.ones(2), m, threshold=untyped("x")),
            r"threshold is 'x' \(str\); expected a number",
        ),
        (lambda x, m: gf.top_entropy_mask(x, m, quantile=True), r"quantile is True \(bool\); expected a number > 0"),
    ],
)
def test_bad_types(call: Callable[[torch.Tensor, torch.Tensor], object], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call(torch.randn(2, 3), torch.ones(2, 3))


def packed(x: torch.Tensor, mask: torch.Tensor, cu_seqlens: Any) -> torch.Tensor:
    flat = x.flatten()
    return gf.rollout_weights(flat, flat, mask.flatten(), level="sequence", cu_seqlens=cu_seqlens)


def test_ties_of_entropy_are_kept_and_nan_is_not() -> None:
    assert torch.equal(gf.top_entropy_mask(torch.full((2, 5), 0.5), torch.ones(2, 5), quantile=0.2), torch.ones(2, 5))
    entropy = torch.arange(12.0).view(2, 6)
    entropy[0, 0] = NAN
    kept = gf.top_entropy_mask(entropy, torch.ones(2, 6), quantile=0.25)
    assert kept.sum() == 3
    assert kept[1, 3:].all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 2, 7, 1000])
def test_the_threshold_is_the_quantile(count: int, dtype: torch.dtype) -> None:
    entropy = torch.rand(count, dtype=torch.float64).to(dtype)
    for quantile in (0.1, 0.2, 0.3, 0.5, 0.7, 0.999, 1.0):
        expected = entropy.double() >= torch.quantile(entropy.double(), 1 - quantile) - 1e-12
        assert torch.equal(gf.top_entropy_mask(entropy, torch.ones(count), quantile=quantile), expected.float()), quantile


def test_more_tokens_than_torch_quantile_takes() -> None:
    kept = gf.top_entropy_mask(torch.rand(17_000_000), torch.ones(17_000_000, dtype=torch.bool), quantile=0.2)
    assert kept.sum() == pytest.approx(3_400_000, abs=100)


def test_nothing_counts() -> None:
    empty = gf.top_entropy_mask(torch.full((2, 3), NAN), torch.zeros(2, 3), quantile=0.2)
    assert torch.equal(empty, torch.zeros(2, 3))
