"""The operators as PyTorch sees them: opcheck, torch.compile without graph breaks, autocast, no_grad."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import grpo_fast as gf
from grpo_fast.loss.kernel_settings import loss_settings

OPERATORS = torch.ops.grpo_fast


def arguments(dtype: torch.dtype = torch.float32, positions: int = 3) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "logits": torch.randn(2, positions, 37, generator=generator).to(dtype),
        "ids": torch.randint(37, (2, 3), generator=generator),
        "mask": torch.tensor([[True, True, False], [True, True, True]]),
        "per_token": torch.randn(2, 3, generator=generator) - 3,
        "per_sequence": torch.randn(2, 1, generator=generator),
        "scalar": torch.tensor(0.2),
    }


def loss_arguments(a: dict[str, Any], logits: Tensor, config: gf.LossConfig) -> tuple[Any, ...]:
    weights = a["scalar"]
    tensors = (a["per_sequence"], weights, weights, a["per_token"], a["per_token"].clone(), None, None)
    return logits, a["ids"], a["mask"], *tensors, 0.7, 0.0, 1.0, 1.0, loss_settings(config), False


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("positions", [3, 4])
def test_opcheck_grpo_loss(dtype: torch.dtype, positions: int) -> None:
    a = arguments(dtype, positions)
    config = gf.LossConfig(beta=0.1, entropy_coef=0.1)
    logits = a["logits"].requires_grad_()
    torch.library.opcheck(OPERATORS.grpo_loss.default, (*loss_arguments(a, logits, config), True))
    torch.library.opcheck(OPERATORS.grpo_loss.default, (*loss_arguments(a, logits.detach(), config), False))
    torch.library.opcheck(OPERATORS.grpo_loss_.default, loss_arguments(a, logits.detach().clone(), config))


def test_opcheck_token_logprobs() -> None:
    a = arguments()
    scoring = (a["ids"], a["mask"], a["scalar"].view(1, 1).clone(), 1.0, 5.0, 0.5)
    logits = a["logits"].requires_grad_()
    torch.library.opcheck(OPERATORS.token_logprobs.default, (logits, *scoring))
    statistics = OPERATORS.token_logprobs(logits.detach(), *scoring)
    expanded = torch.ones(1, 1).expand(2, 3)  # what .sum().backward() hands over: stride 0
    for operator in (OPERATORS.token_logprobs_backward.default, OPERATORS.token_logprobs_backward_.default):
        torch.library.opcheck(operator, (expanded, a["per_token"], logits.detach().clone(), *scoring, *statistics))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_scale_gradient(dtype: torch.dtype) -> None:
    gradient = torch.randn(2, 3, 5).to(dtype)
    torch.library.opcheck(OPERATORS.scale_gradient_.default, (gradient, torch.tensor(0.5)))
    for strided in (gradient.clone(), gradient[..., :4], gradient.transpose(0, 1)):
        expected = (strided.double() * 0.5).to(dtype)
        assert OPERATORS.scale_gradient_(strided, torch.tensor(0.5)) is None
        assert torch.equal(strided, expected)


def test_a_gradient_that_was_scaled_in_place_is_not_scaled_again() -> None:
    """With a retained graph a second backward pass through an in-place loss fails, unless nothing had to be scaled."""
    a = arguments()
    leaf = a["logits"].requires_grad_()

    def loss() -> Tensor:
        return gf.grpo_loss(leaf * 1, a["ids"], a["per_sequence"].squeeze(1), mask=a["mask"], inplace=True).loss

    by_one = loss()
    first, second = (torch.autograd.grad(by_one, leaf, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second) and first.abs().max() > 0
    by_half = loss()
    assert torch.equal(torch.autograd.grad(0.5 * by_half, leaf, retain_graph=True)[0], 0.5 * first)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(0.5 * by_half, leaf)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    "config",
    [
        gf.LossConfig(entropy_coef=0.1),
        gf.LossConfig(loss_type="gspo", beta=0.1, bias_corrected_kl=True),
        gf.LossConfig(loss_type="vespo"),
        gf.LossConfig(loss_type="grpo", beta=0.1),
    ],
    ids=lambda config: config.loss_type,
)
def test_compile_without_graph_breaks_or_recompilation(backend: str, config: gf.LossConfig) -> None:
    """Batch, length, vocabulary, temperature: after the first change they are symbols, and nothing is compiled again. For one loss; the
    others have one batch."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def step(logits: Tensor, ids: Tensor, advantages: Tensor, old: Tensor, mask: Tensor, temperature: float) -> tuple[Tensor, ...]:
        out = gf.grpo_loss(
            logits * 1.0,
            ids,
            advantages,
            old_logprobs=old,
            ref_logprobs=old,
            mask=mask,
            temperature=temperature,
            config=config,
            inplace=True,
        )
        return out.loss, out.logprobs, out.metrics["entropy"]

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    batches = [(2, 5, 50, 1.0), (3, 6, 60, 0.7), (4, 9, 61, 0.6)] if config.loss_type == "gspo" else [(3, 6, 60, 0.7)]
    with gf.use_backend(backend):
        for batch, length, vocabulary, temperature in batches:
            logits = torch.randn(batch, length, vocabulary, requires_grad=True)
            rest = (
                torch.randint(vocabulary, (batch, length)),
                torch.randn(batch),
                torch.randn(batch, length) - 4,
                torch.rand(batch, length) > 0.2,
            )
            results = []
            for function in (compiled, step):
                out = function(logits, *rest, temperature)
                out[0].backward()
                results.append((*out, logits.grad))
                logits.grad = None
            for ours, eager in zip(*results, strict=True):
                torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-6)
    assert counter.frame_count <= min(len(batches), 2)


def test_compile_with_inductor() -> None:
    torch._dynamo.reset()
    a = arguments()
    logits = a["logits"].requires_grad_()

    def step(x: Tensor) -> Tensor:
        return gf.token_logprobs(x * 2, a["ids"], mask=a["mask"], temperature=0.6).logprobs.sum()

    eager = torch.autograd.grad(step(logits), logits)[0]
    compiled = torch.autograd.grad(torch.compile(step, fullgraph=True)(logits), logits)[0]
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("loss_type", ["dapo", "gspo"])
def test_no_grad_and_autocast(backend: str, loss_type: str) -> None:
    a = arguments()
    logits = a["logits"].requires_grad_()
    call = {
        "logits": logits,
        "token_ids": a["ids"],
        "advantages": a["per_sequence"].squeeze(1),
        "config": gf.LossConfig(loss_type=loss_type),
    }
    with gf.use_backend(backend):
        expected = gf.grpo_loss(**call)
        assert expected.loss.requires_grad and not expected.logprobs.requires_grad
        with torch.no_grad():
            quiet = gf.grpo_loss(**call)
        assert not quiet.loss.requires_grad and torch.equal(quiet.loss, expected.loss.detach())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = gf.grpo_loss(**call)
        assert torch.equal(cast.loss, expected.loss)


def test_token_logprobs_is_differentiable_in_both_outputs() -> None:
    a = arguments()
    with gf.use_backend("reference"):
        exact = a["logits"].double().requires_grad_()
        out = gf.token_logprobs(exact, a["ids"], mask=a["mask"], temperature=a["per_token"].abs(), softcap=4.0)
        truth = torch.autograd.grad((out.logprobs * a["per_token"]).sum() + 3 * out.entropy.sum(), exact)[0]
    logits = a["logits"].requires_grad_()
    out = gf.token_logprobs(logits, a["ids"], mask=a["mask"], temperature=a["per_token"].abs(), softcap=4.0)
    gradient = torch.autograd.grad((out.logprobs * a["per_token"]).sum() + 3 * out.entropy.sum(), logits)[0]
    torch.testing.assert_close(gradient.double(), truth, rtol=1e-5, atol=1e-6)
    assert (gradient[0, 2] == 0).all()


def test_ids_out_of_range_turn_the_loss_into_nan_where_values_are_not_checked() -> None:
    """As on a GPU: nothing is read out of bounds, and the loss is NaN, so that training cannot continue unnoticed."""
    a = arguments()
    ids = a["ids"].clone()
    ids[0, 0], ids[1, 1] = -1, 10**12
    loss, logprobs, *_ = OPERATORS.grpo_loss(*loss_arguments({**a, "ids": ids}, a["logits"], gf.LossConfig()), True)
    assert loss.isnan() and logprobs[0, 0].isnan() and logprobs[1, 1].isnan() and logprobs[0, 1].isfinite()
