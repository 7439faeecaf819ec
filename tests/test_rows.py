"""The arithmetic of the C++ row kernels, tested with rows in which one number decides the result: the error bounds of exp and tanh, and the
conversions of the half types."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from bfloat16_gradient import check_bfloat16_gradient

import grpo_fast

OPERATORS = torch.ops.grpo_fast


def gradient_of(logits: torch.Tensor, ids: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """d sum(logprob) / d logits, [N, V], temperature 1, in this dtype; the statistics are always those of the float32 logits."""
    call = (ids[None], torch.ones_like(ids[None], dtype=torch.bool), None, 1.0, 0.0, 1.0)
    statistics = OPERATORS.token_logprobs(logits[None].float(), *call)
    logits = logits.to(dtype)
    ones = torch.ones(1, len(ids))
    return OPERATORS.token_logprobs_backward(ones, 0 * ones, logits[None], *call, *statistics)[0]


def test_exp_keeps_its_bound() -> None:
    """p of a column x below the largest: the polynomial's 1.7e-7 and three roundings of float32; for each nat of x, that of x / ln 2."""
    x = torch.linspace(0, 86, 40001)
    logits = torch.stack(
        [torch.full_like(x, -300.0), torch.zeros_like(x), -x], dim=1
    )  # the target, which has no share; the largest; x below it
    gradient = gradient_of(logits, torch.zeros(len(x), dtype=torch.long))
    truth = -torch.exp(-x.double()) / (1 + torch.exp(-x.double()))
    error = (gradient[:, 2].double() / truth - 1).abs()
    assert (error <= 3.5e-7 + 8e-8 * x.double()).all(), f"largest excess at x = {x[(error - 8e-8 * x).argmax()].item()}"


def test_tanh_keeps_its_bound() -> None:
    """A soft cap of 1: f(z) = tanh(z) within 2 ulp of float32, seen in the log-probability of the other column."""
    z = torch.linspace(-12, 12, 40001)
    logits = torch.stack([torch.zeros_like(z), z], dim=1)[None]
    ids = torch.zeros(1, len(z), dtype=torch.long)
    logprobs, *_ = OPERATORS.token_logprobs(
        logits, ids, torch.ones_like(ids, dtype=torch.bool), None, 1 / 64, 1.0, 1.0
    )  # 64 times as visible
    f = torch.tanh(z.double())
    truth = -torch.nn.functional.softplus(64 * f, threshold=100)
    slope = 64 * torch.sigmoid(64 * f)
    visible = slope > 1
    error = ((logprobs[0].double() - truth).abs() - 2**-23 * truth.abs()).clamp(min=0) / slope
    assert visible.float().mean() > 0.4
    assert (error[visible] <= 2.5e-7 * f[visible].abs() + 1e-9).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_half_value_is_read_exactly(dtype: torch.dtype) -> None:
    """All 65,536 bit patterns as the only logit beside a 0: the log-probability tells what was read."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    values = values[values.float().isfinite() & (values.float().abs() < 80)]
    logits = torch.stack([values, torch.zeros_like(values)], dim=1)[None]
    ids = torch.ones(1, len(values), dtype=torch.long)
    logprobs, *_ = OPERATORS.token_logprobs(logits, ids, torch.ones_like(ids, dtype=torch.bool), None, 1.0, 0.0, 1.0)
    truth = -torch.nn.functional.softplus(values.double(), threshold=200)
    torch.testing.assert_close(logprobs[0].double(), truth, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_are_rounded_to_nearest_even(dtype: torch.dtype) -> None:
    """The half types' gradient is the float32 gradient of the same logits, rounded once: subnormal, tiny and large values included."""
    torch.manual_seed(0)
    logits = (torch.randn(400, 67) * 6).to(dtype)
    ids = torch.randint(67, (400,))
    exact = gradient_of(logits, ids)
    if dtype == torch.float16:
        assert exact.abs().min() < torch.finfo(dtype).tiny  # subnormal values are among them
    assert torch.equal(gradient_of(logits, ids, dtype), exact.to(dtype))


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_bfloat16_gradient_of_float32_logits(softcap: float) -> None:
    check_bfloat16_gradient("cpu", softcap)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_bfloat16_gradient_needs_float32_logits(dtype: torch.dtype) -> None:
    logits, ids = torch.randn(1, 2, 9).to(dtype), torch.ones(1, 2, dtype=torch.long)
    call = (ids, torch.ones_like(ids, dtype=torch.bool), None, 1.0, 0.0, 1.0)
    statistics = OPERATORS.token_logprobs(logits, *call)
    with pytest.raises(RuntimeError, match="bfloat16_gradient needs float32 logits"):
        OPERATORS.token_logprobs_backward_(torch.ones(1, 2), torch.zeros(1, 2), logits, *call, *statistics, True)


def test_a_row_whose_other_logits_are_all_minus_infinity() -> None:
    logits = torch.full((1, 3, 40), -math.inf)
    ids = torch.tensor([[5, 0, 39]])
    logits.scatter_(-1, ids.unsqueeze(-1), 2.0)
    mask = torch.ones_like(ids, dtype=torch.bool)
    logprobs, entropy, lse = OPERATORS.token_logprobs(logits, ids, mask, None, 1.0, 0.0, 1.0)
    assert (logprobs == 0).all() and (entropy == 0).all() and (lse == 2).all()
    gradient = OPERATORS.token_logprobs_backward(
        torch.ones(1, 3), torch.zeros(1, 3), logits, ids, mask, None, 1.0, 0.0, 1.0, logprobs, entropy, lse
    )
    assert gradient.abs().max() < 1e-37


def truth_at(temperature: float, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """T * d sum(logprob) / d logits in float64; differences first, which a low temperature makes huge."""
    margins = (logits.double() - logits.double().gather(-1, ids[..., None])) / temperature
    return torch.nn.functional.one_hot(ids, logits.shape[-1]) - margins.softmax(-1)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("temperature", [0.1, 3e-3, 1e-4, 1e-8, 1e-18, 1e-30])
@pytest.mark.parametrize("how", ["token_logprobs", "dapo", "gspo", "linear_token_logprobs"])
def test_a_temperature_however_low_has_its_gradient(how: str, temperature: float, softcap: float | None) -> None:
    """log-probabilities of -1e18 have no digit left in which two tokens differ. Half of the targets are the likeliest token."""
    logits, ids = 3 * torch.randn(6, 8, 50), torch.randint(50, (6, 8))
    ids[:, ::2] = logits[:, ::2].argmax(-1)
    capped = logits.double() if softcap is None else softcap * torch.tanh(logits.double() / softcap)
    expected = truth_at(temperature, capped, ids)
    if softcap is not None:
        expected = expected * (1 - (capped / softcap).square())
    logits.requires_grad_()
    scoring: dict[str, Any] = {"temperature": temperature, "softcap": softcap}
    if how == "token_logprobs":
        loss = grpo_fast.token_logprobs(logits, ids, **scoring).logprobs.sum() * temperature
    elif how == "linear_token_logprobs":
        head = torch.eye(50, requires_grad=True)
        loss = grpo_fast.linear_token_logprobs(logits, head, ids, **scoring).logprobs.sum() * temperature
    else:
        old = grpo_fast.token_logprobs(logits.detach(), ids, **scoring).logprobs if how == "gspo" else None
        config = grpo_fast.LossConfig(how, aggregation="sequence_sum" if how == "dapo" else "sequence_mean")
        scale = -temperature * 6 * (1 if how == "dapo" else 8)
        loss = grpo_fast.grpo_loss(logits, ids, torch.ones(6), config=config, old_logprobs=old, loss_scale=scale, **scoring).loss
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.isfinite().all()
    if softcap is None:
        torch.testing.assert_close(gradient.double(), expected, rtol=0, atol=5e-6)
    elif temperature == 0.1:  # below it, roundings of tanh in float32 outweigh the differences of logits
        torch.testing.assert_close(gradient.double(), expected, rtol=0, atol=1e-4)
