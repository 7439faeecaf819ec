"""Extreme logits. A logit of -inf at the sampled token, a probability of 0: nothing may turn into NaN, and PyTorch in float64 gives what is
expected. A saturated soft cap: its derivative is small, and correct.

These tests are for the backend in force: test_extreme_cases.py runs them for the reference and the C++ kernels, triton_interpreter.py
for Triton.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import grpo_fast as gf

IDS = torch.tensor([[2, 5, 1], [4, 0, 3]])
ADVANTAGES = torch.tensor([[1.0, 0.0, -0.5], [-1.0, 0.7, 0.0]])
IMPOSSIBLE = ((0, 0), (0, 1), (1, 0))  # tokens whose own logit is -inf: advantage 1, 0 and -1


def batch(dtype: torch.dtype = torch.float32) -> Tensor:
    logits = torch.randn(2, 3, 37, generator=torch.Generator().manual_seed(0))
    for b, t in IMPOSSIBLE:
        logits[b, t, IDS[b, t]] = -math.inf
    logits[1, 2, 7] = -math.inf  # not a target: masked out by the model
    return logits.to(dtype)


def eager(logits: Tensor, temperature: float, config: gf.LossConfig, old: Tensor, ref: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The clipped loss with KL and entropy bonus, token mean, by torch.log_softmax: loss, log-probabilities, entropy."""
    log_p = (logits / temperature).log_softmax(-1)
    logprobs = log_p.gather(-1, IDS.unsqueeze(-1)).squeeze(-1)
    p = log_p.exp()
    entropy = -(p * log_p.masked_fill(p == 0, 0.0)).sum(-1)
    ratio = (logprobs - old).clamp(-20, 20).exp()
    loss = torch.maximum(-ratio * ADVANTAGES, -ratio.clamp(1 - config.epsilon_low, 1 + config.epsilon_high) * ADVANTAGES)
    log_ratio = (ref - logprobs).clamp(-20, 20)
    loss = loss + config.beta * (log_ratio.exp() - 1 - log_ratio) - config.entropy_coef * entropy
    return loss.mean(), logprobs.detach(), entropy.detach()


@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_clipped_loss_is_that_of_pytorch(dtype: torch.dtype, beta: float, entropy_coef: float) -> None:
    config = gf.LossConfig(loss_type="bnpo", beta=beta, entropy_coef=entropy_coef)
    old, ref = torch.full((2, 3), -3.0), torch.full((2, 3), -3.5)
    truth_logits = batch(dtype).double().requires_grad_()
    truth, logprobs, entropy = eager(truth_logits, 0.7, config, old.double(), ref.double())
    truth.backward()
    logits = batch(dtype).requires_grad_()
    given: dict[str, Any] = {"config": config, "old_logprobs": old, "temperature": 0.7} | ({"ref_logprobs": ref} if beta else {})
    out = gf.grpo_loss(logits, IDS, ADVANTAGES, **given)
    out.loss.backward()
    scale = max(1.0, truth.abs().item())  # exp(20) of the KL estimate is large
    assert abs(out.loss.item() - truth.item()) <= 1e-5 * scale
    torch.testing.assert_close(out.logprobs, logprobs.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.entropy, entropy.float(), rtol=1e-5, atol=1e-5)
    assert truth_logits.grad is not None and truth_logits.grad.abs().max() > 1e-3 and truth_logits.grad.isfinite().all()
    assert logits.grad is not None and truth_logits.grad is not None
    rounding = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8}[dtype]
    torch.testing.assert_close(logits.grad.double(), truth_logits.grad, rtol=0, atol=rounding * truth_logits.grad.abs().max().item())


@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("loss_type", [name for name in gf.LOSS_TYPES if name not in ("cispo", "reinforce", "vespo")])
def test_no_ratio_makes_a_nan(loss_type: str, on_policy: bool) -> None:
    """On-policy, and where the old log-probability is -inf too, the ratio is 1: not exp(inf - inf)."""
    length: dict[str, Any] = {"max_completion_length": 8} if loss_type == "dr_grpo" else {}
    config = gf.LossConfig(loss_type=loss_type, **length)
    old = None if on_policy else torch.tensor([[-math.inf, -2.0, -3.0], [-2.0, -3.0, -4.0]])
    results = []
    for exact in (False, True):
        logits = batch(torch.float64 if exact else torch.float32).requires_grad_()
        out = gf.grpo_loss(logits, IDS, ADVANTAGES, config=config, old_logprobs=old)
        out.loss.backward()
        assert out.loss.isfinite() and logits.grad is not None and logits.grad.isfinite().all()
        assert all(value.isfinite() for value in out.metrics.values()), out.metrics
        results.append((out.loss.detach().double(), logits.grad.double()))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss_type", ["cispo", "reinforce", "vespo"])
def test_a_zero_advantage_takes_the_token_out_of_losses_of_the_log_probability(loss_type: str) -> None:
    """-A log p is 0 for A = 0, and infinite only where the advantage is not 0."""
    config = gf.LossConfig(loss_type=loss_type, epsilon_high=5.0)
    old = torch.full((2, 3), -3.0)
    mask = torch.tensor([[False, True, True], [False, True, True]])  # of the impossible tokens, the one with advantage 0 is left
    logits = batch().requires_grad_()
    out = gf.grpo_loss(logits, IDS, ADVANTAGES, config=config, old_logprobs=old, mask=mask)
    out.loss.backward()
    assert out.loss.isfinite() and logits.grad is not None and logits.grad.isfinite().all() and logits.grad.abs().max() > 0
    if loss_type != "vespo":  # its weight is the whole sequence's
        assert (logits.grad[0, 1] == 0).all()


def test_weights_of_zero_take_the_token_out() -> None:
    weights = torch.ones(2, 3)
    for b, t in IMPOSSIBLE:
        weights[b, t] = 0.0
    logits = batch().requires_grad_()
    config = gf.LossConfig(loss_type="reinforce")
    out = gf.grpo_loss(logits, IDS, ADVANTAGES, config=config, rollout_weights=weights)
    out.loss.backward()
    assert out.loss.isfinite() and logits.grad is not None and logits.grad.isfinite().all()
    assert all((logits.grad[b, t] == 0).all() for b, t in IMPOSSIBLE)


def test_log_probability_and_entropy_and_their_gradient() -> None:
    logits = batch().requires_grad_()
    out = gf.token_logprobs(logits, IDS, temperature=0.7)
    assert [out.logprobs[b, t].item() for b, t in IMPOSSIBLE] == [-math.inf] * 3
    (out.entropy.sum() + torch.where(out.logprobs.isfinite(), out.logprobs, 0).sum()).backward()
    assert out.entropy.isfinite().all() and logits.grad is not None and logits.grad.isfinite().all()
    exact = batch(torch.float64).requires_grad_()
    log_p = (exact / 0.7).log_softmax(-1)
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -math.inf, 0.0)).sum(-1)
    logprobs = log_p.gather(-1, IDS.unsqueeze(-1)).squeeze(-1)
    (entropy.sum() + torch.where(logprobs.isfinite(), logprobs, 0).sum()).backward()
    torch.testing.assert_close(out.entropy.detach().double(), entropy.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 30.0])
def test_the_derivative_of_a_saturated_soft_cap_keeps_its_digits(temperature: float) -> None:
    """Each element of the gradient relative to itself: with 1 - tanh^2 those of saturated logits are wrong by any factor."""
    generator, cap = torch.Generator().manual_seed(0), 30.0
    z = torch.cat([torch.linspace(-600, 600, 64), torch.randn(30, generator=generator) * 50]).repeat(2, 3, 1)
    ids = torch.randint(94, (2, 3), generator=generator)
    x = z.double() / cap
    p = (cap * torch.tanh(x) / temperature).softmax(-1)
    c = 2 * torch.exp(-2 * x.abs()) / (1 + torch.exp(-2 * x.abs()))
    truth = (torch.zeros_like(p).scatter(-1, ids.unsqueeze(-1), 1.0) - p) * c * (2 - c) / temperature
    logits = z.requires_grad_()
    gf.token_logprobs(logits, ids, softcap=cap, temperature=temperature).logprobs.sum().backward()
    assert logits.grad is not None
    large = truth.abs() > 1e-30  # the others are at the end of float32's range
    saturated = large & (x.abs() > 9)  # where float32's 1 - tanh^2 is 0
    assert saturated.sum() > 20
    error = (logits.grad.double() - truth).abs()[large] / truth.abs()[large]
    assert error.max() < 2e-5  # e^-2|x| in float32 at |x| = 20: 40 * 2^-24, and the roundings of p
