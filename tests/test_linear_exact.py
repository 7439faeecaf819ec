"""The head with 16-bit operands against float64 of the same operands."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from linear_cases import operands, random_linear_case
from torch import Tensor

import grpo_fast as gf
from grpo_fast.head.precision import Precision
from grpo_fast.head.products import Products
from grpo_fast.ops.rounding import rounded_

HALF = [torch.bfloat16, torch.float16]


def check_logprobs(hidden: Tensor, weight: Tensor, ids: Tensor, **options: Any) -> None:
    found, gaps = gf.linear_token_logprobs(hidden, weight, ids, **options), []
    for rows in torch.arange(len(ids)).split(32):
        expected = torch.cat([hidden[rows].double() @ part.double().T for part in weight.split(16384)], 1).log_softmax(-1)
        of_logprobs = found.logprobs[rows] - expected.gather(1, ids[rows, None]).squeeze(1)
        gaps.append(torch.stack([of_logprobs, found.entropy[rows] + (expected.exp() * expected).sum(1)]).abs())
    gap = torch.cat(gaps, 1)
    assert gap.max() < 1e-5 and (gap.mean(1) < 1e-6).all(), (gap.max(), gap.mean(1))


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_logprobs_are_those_of_float64(dtype: torch.dtype) -> None:
    check_logprobs(*operands(48, 128, 4003, dtype))


@pytest.mark.sweep
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_logprobs_of_a_large_vocabulary_are_those_of_float64(dtype: torch.dtype) -> None:
    check_logprobs(*operands(256, 896, 151_936, dtype, std=4.0))


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_without_the_extension_logits_are_float32_too(dtype: torch.dtype) -> None:
    hidden, weight, _ = operands(7, 40, 301, dtype)
    bias, exact = torch.randn(301), hidden.double() @ weight.double().T
    out, adapted = torch.empty(7, 304)[:, :301], exact + bias
    Products().logits(out, hidden, weight, bias)
    torch.testing.assert_close(out.double(), adapted, rtol=1e-5, atol=1e-5)
    Products().add_logits(out, hidden, weight)
    torch.testing.assert_close(out.double(), adapted + exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_the_gradient_has_the_error_of_one_rounding(dtype: torch.dtype) -> None:
    """Of every element: at most the sum of the magnitudes in its product times the rounding of one factor, and of the result."""
    hidden, weight, ids = operands(64, 96, 2001, dtype)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    g = torch.randn(64)
    (gf.linear_token_logprobs(hidden, weight, ids, keep_bytes=0).logprobs * g).sum().backward()
    h, w = (x.detach().double() for x in (hidden, weight))
    d = g.double()[:, None] * (torch.nn.functional.one_hot(ids, 2001) - (h @ w.T).softmax(-1))
    unit = torch.finfo(dtype).eps / 2
    subnormal = torch.finfo(dtype).smallest_normal * unit * 2  # spacing of the smallest numbers
    for found, expected, magnitudes in ((hidden.grad, d @ w, d.abs() @ w.abs()), (weight.grad, d.T @ h, d.abs().T @ h.abs())):
        assert found is not None
        bound = (unit * 1.01 + 1e-5) * magnitudes + unit * 1.01 * expected.abs() + subnormal * 64
        assert ((found.double() - expected).abs() <= bound).all()


def test_input_rounds_the_logits_as_the_model_does() -> None:
    hidden, weight, ids = operands(9, 64, 300, torch.bfloat16)
    found = gf.linear_token_logprobs(hidden, weight, ids, logits_dtype="input")
    expected = gf.token_logprobs((hidden @ weight.T).unsqueeze(0), ids.unsqueeze(0))
    assert torch.equal(found.logprobs, expected.logprobs[0])
    assert not torch.equal(found.logprobs, gf.linear_token_logprobs(hidden, weight, ids).logprobs)
    with pytest.raises(ValueError, match=r"logits_dtype is 'bfloat16'; expected 'float32', or 'input'.*Fix"):
        gf.linear_token_logprobs(hidden, weight, ids, logits_dtype="bfloat16")
    with pytest.raises(ValueError, match="logits_dtype is 32"):
        gf.LinearGRPOLoss(logits_dtype=32)  # type: ignore[arg-type]
    advantages = torch.ones(9)
    as_input = gf.LinearGRPOLoss(logits_dtype="input")(hidden, weight, ids, advantages)
    assert torch.equal(as_input.logprobs, found.logprobs)


def test_a_callables_logits_are_converted_once() -> None:
    hidden, weight, ids = operands(9, 64, 300, torch.bfloat16)
    hidden.requires_grad_()
    found = gf.linear_token_logprobs(hidden, lambda x: x @ weight.T, ids)
    logits = (hidden.detach() @ weight.T).float()
    assert torch.equal(found.logprobs, gf.token_logprobs(logits.unsqueeze(0), ids.unsqueeze(0)).logprobs[0])
    found.logprobs.sum().backward()
    assert hidden.grad is not None and hidden.grad.isfinite().all()


def test_rounding_in_place() -> None:
    rows = torch.randn(5, 1004)[:, :1001]
    expected = rows.to(torch.bfloat16)
    found = rounded_(rows, torch.bfloat16)
    assert torch.equal(found, expected) and found.data_ptr() == rows.data_ptr() and found.stride(0) % 8 == 0


class Errors(NamedTuple):
    """Of random calls against float64, relative to the norm of the gradients."""

    errors: list[float]
    of_coarse_gradients: list[float]  # of calls whose gradients float16 cannot hold to 5e-3, beyond the error of the nearest numbers
    near_clip: int  # calls that are not compared, since a ratio within 1e-4 of a bound of the clip may lie on either side


def errors_of_gradients(seeds: range) -> Errors:
    found = Errors([], [], 0)
    for seed in seeds:
        case = random_linear_case(seed, HALF[seed % 2])
        with gf.use_backend("reference"):
            exact, expected = case.run(torch.float64)
        old, config = case.options.get("old_logprobs"), case.options.get("config", gf.LossConfig())
        if old is not None:
            ratio = (exact.logprobs.double() - old).exp()
            bounds = [1 - (config.epsilon_low or 0), 1 + (config.epsilon_high or config.epsilon_low or 0)]
            if any(((ratio - bound).abs() < 1e-4).any() for bound in bounds):
                found = found._replace(near_clip=found.near_clip + 1)
                continue
        _, gradients = case.run()
        # What is returned has 16 bits. ``nearest`` is the least error that any such result has: of bfloat16 at most 2^-9 of the norm, of
        # float16 at most 2^-11 of it, and half of the distance of its smallest numbers, 2^-25, for each element.
        pairs = [(x.double().flatten(), gradients[name].double().flatten(), gradients[name].dtype) for name, x in expected.items()]
        norm = torch.cat([x for x, _, _ in pairs]).norm()
        gap = torch.cat([y - x for x, y, _ in pairs]).norm()
        nearest = torch.cat([x.to(dtype).double() - x for x, _, dtype in pairs]).norm()
        assert nearest <= sum((torch.finfo(dtype).eps / 2 * x.norm() + 2.0**-25 * x.numel() ** 0.5) for x, _, dtype in pairs)
        if norm == 0:
            assert gap == 0
        elif nearest < 5e-3 * norm:
            found.errors.append(float(gap / norm))
        else:
            found.of_coarse_gradients.append(float((gap - nearest) / norm))
    return found


def check_errors(seeds: range) -> None:
    errors, of_coarse_gradients, near_clip = errors_of_gradients(seeds)
    assert max(errors) < 2e-2, max(errors)
    assert sorted(errors)[int(0.95 * len(errors))] < 5e-3
    assert max(of_coarse_gradients, default=0.0) < 2e-2
    assert len(of_coarse_gradients) <= max(1, len(seeds) // 100) and near_clip <= max(1, len(seeds) // 100), (
        of_coarse_gradients,
        near_clip,
    )


def test_random_calls_against_float64() -> None:
    check_errors(range(40))


@pytest.mark.sweep
def test_many_random_calls_against_float64() -> None:
    check_errors(range(1000))


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_rows_of_an_odd_vocabulary_are_aligned(dtype: torch.dtype) -> None:
    for name in ("float32", "input"):
        precision = Precision.of(dtype, name, False)
        device = torch.device("meta")  # as on a GPU
        logits = precision.new_logits(3, 1001, device)
        assert logits.shape == (3, 1001) and logits.stride(0) * logits.element_size() % 16 == 0
        assert precision.row_bytes(1001, device) == logits.stride(0) * logits.element_size() > 1001 * logits.element_size()
        assert precision.rows_per_chunk(10 * precision.row_bytes(1001, device), 1001, device) == 10
        assert precision.new_logits(3, 1001, torch.device("cpu")).is_contiguous()


def test_row_operators_take_padded_rows() -> None:
    logits, ids = torch.randn(1, 5, 1004), torch.randint(1001, (1, 5))
    padded = logits.clone()
    padded[..., 1001:] = torch.nan
    scored = [gf.token_logprobs(x, ids).logprobs for x in (padded[..., :1001], logits[..., :1001].contiguous())]
    assert torch.equal(*scored)
