"""Rows of real vocabularies against the float64 truth, on any device. What lies beside a row may be poison, and the gradient elsewhere than
the logits."""

from __future__ import annotations

from typing import Any

import compare
import torch
from cases import apart
from torch import Tensor

import grpo_fast as gf

# (vocabulary, dtype, soft cap): of Llama 2, GPT-2, Llama 3, Qwen 2.5 (its tokenizer's, and rounded up) and Gemma.
VOCABULARIES: list[tuple[int, torch.dtype, float | None]] = [
    (vocabulary, torch.bfloat16, None) for vocabulary in (32000, 50257, 128256, 151643, 152064, 262144)
]
VOCABULARIES += [(vocabulary, dtype, 30.0) for vocabulary in (50257, 128256) for dtype in (torch.float32, torch.float16)]

LOGITS_AT_ONCE = 2**22  # of which float64 temporaries are made: some hundred megabytes, since several tests share a GPU
EPSILON = 2.0**-24


def big(rows: int, vocabulary: int, dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> dict[str, Any]:
    """Arguments of grpo_loss: packed logits, a leaf, with their ids and advantages."""
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(rows, vocabulary, device=device, generator=generator, dtype=dtype).requires_grad_()
    ids = torch.randint(vocabulary, (rows,), device=device, generator=generator)
    return {"logits": logits, "token_ids": ids, "advantages": torch.randn(rows, device=device, generator=generator)}


def with_options(call: dict[str, Any], *, entropy_coef: float, softcap: float | None) -> dict[str, Any]:
    """A sampler's temperature, and a scale at which gradients are numbers that float16 has too: a vocabulary divides them by its size."""
    rows = call["logits"].shape[0]
    config = gf.LossConfig(entropy_coef=entropy_coef)
    return {**call, "temperature": 0.6, "softcap": softcap, "config": config, "loss_scale": 2.0**11 * rows}


def loss_and_gradient(call: dict[str, Any], *, elsewhere: bool = False, **changed: Any) -> tuple[gf.GRPOOutput, Tensor]:
    """Forward and backward; elsewhere: the logits are rows apart with poison between, their gradient is contiguous."""
    given = call["logits"] * 1
    if elsewhere:
        given = apart(given)
        assert given.data_ptr() % 16 != 0, "the case tests nothing: newly allocated memory begins on such a boundary"
    out = gf.grpo_loss(**{**call, "logits": given, **changed})
    (gradient,) = torch.autograd.grad(out.loss, given)
    return out, gradient


def assert_true(call: dict[str, Any], out: gf.GRPOOutput, gradient: Tensor) -> None:
    """Each logit's gradient is held to its own size, not to the largest: that of the target is a hundred thousand times the others'."""
    logits, loss = call["logits"].detach(), 0.0
    rows, vocabulary = logits.shape
    assert gradient.shape == logits.shape and gradient.dtype == logits.dtype
    for part in torch.arange(rows, device=logits.device).split(max(1, LOGITS_AT_ONCE // vocabulary)):
        exact = logits[part].double().requires_grad_()
        given = {**call, "logits": exact, "token_ids": call["token_ids"][part], "advantages": call["advantages"][part]}
        with gf.use_backend("reference"):
            truth = gf.grpo_loss(**given, num_items=rows)
        (expected,) = torch.autograd.grad(truth.loss, exact)
        loss += truth.loss.item()
        assert (out.logprobs[part] - truth.logprobs).abs().max().item() < 1e-5
        # A last digit of the log-sum-exp counts as often as the entropy has nats: plain PyTorch in float32 is 1.2e-5 off.
        assert (out.entropy[part] - truth.entropy).abs().max().item() < 2e-5
        allowed = allowed_errors(exact.detach(), given["token_ids"], expected, call["temperature"], call["softcap"], gradient.dtype)
        excess = (gradient[part].double() - expected).abs_() - allowed
        assert excess.max().item() <= 0, f"row {int(part[0]) + int(excess.amax(1).argmax())}, column {int(excess.amax(0).argmax())}"
    assert abs(out.loss.item() - loss) <= 1e-5 * call["loss_scale"]


def allowed_errors(
    logits: Tensor, token_ids: Tensor, expected: Tensor, temperature: float, softcap: float | None, dtype: torch.dtype
) -> Tensor:  # float64 [n, V]
    """The result's own rounding, and 128 float32 roundings of the terms that it is the sum of: p * (g + h * (log p + H)) can cancel."""
    scores = (logits if softcap is None else softcap * torch.tanh(logits / softcap)) / temperature
    p = torch.softmax(scores, -1)
    coefficients = (expected.abs() / p).scatter_(-1, token_ids.unsqueeze(-1), 0)
    terms = p.mul_(coefficients.amax(-1, keepdim=True))
    terms.scatter_(-1, token_ids.unsqueeze(-1), expected.gather(-1, token_ids.unsqueeze(-1)).abs())
    half_of_the_least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / 2
    return compare.ALLOWANCE[dtype] * expected.abs() + 128 * EPSILON * terms + half_of_the_least
