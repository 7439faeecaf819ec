"""Custom surrogates on the backend in force: one that repeats DAPO's formula gives DAPO's numbers, and one that takes every input gives
those of the float64 reference. test_custom_surrogate.py runs them for the reference and the C++ kernels, triton_interpreter.py for Triton.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from cases import KEPT, random_case
from linear_cases import random_linear_case
from torch import Tensor

import grpo_fast as gf
from grpo_fast.loss.custom_surrogate import Surrogate

__all__ = ["test_a_repeated_formula_in_the_head", "test_a_repeated_formula_over_logits", "test_every_input"]

SEEDS = [*range(10), *range(KEPT, KEPT + 3)]
KEPT_SETTINGS = (
    *("epsilon_low", "beta", "kl_estimator", "bias_corrected_kl", "entropy_coef", "entropy_aggregation"),
    *("importance_sampling_level", "aggregation", "max_completion_length"),
)
# Two float32 ulps of a log-probability near 10, for a ratio and a loss; gradients are also rounded to the dtype of the logits.
ROUNDING = 1e-5
EPS = {torch.float32: ROUNDING, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def clipped(low: float, high: float) -> Surrogate:
    """DAPO's formula."""

    def surrogate(ratio: Tensor, advantages: Tensor) -> Tensor:
        return torch.maximum(-ratio * advantages, -ratio.clamp(1 - low, 1 + high) * advantages)

    return surrogate


def everything(
    ratio: Tensor,
    advantages: Tensor,
    logprobs: Tensor,
    old_logprobs: Tensor,
    rollout_weights: Tensor,
    entropy: Tensor,
    mine: Tensor,
    sequence: Tensor,
    *,
    tau: float = 0.1,
) -> Tensor:
    """A smooth function of every input, which does not vanish with the advantage."""
    square = (logprobs - old_logprobs).clamp(-2, 2) ** 2
    return -torch.sigmoid(ratio) * advantages * rollout_weights * mine + tau * (square + sequence * torch.tanh(entropy))


def pair(given: gf.LossConfig) -> tuple[gf.LossConfig, gf.LossConfig]:
    """DAPO with the settings of ``given``, built in and custom."""
    settings = {name: getattr(given, name) for name in KEPT_SETTINGS}
    built_in = gf.LossConfig(loss_type="dapo", epsilon_high=0.15, **settings)
    return built_in, dataclasses.replace(built_in, loss_type="custom", surrogate=clipped(built_in.epsilon_low, 0.15))


def check_equal(
    mine: tuple[gf.GRPOOutput, Mapping[str, Tensor]], expected: tuple[gf.GRPOOutput, Mapping[str, Tensor]], eps: float = ROUNDING
) -> None:
    (out, gradients), (truth, true_gradients) = mine, expected
    assert torch.equal(out.active, truth.active)
    for actual, wanted in ((out.logprobs, truth.logprobs), (out.entropy, truth.entropy)):
        torch.testing.assert_close(actual.double(), wanted.double(), rtol=ROUNDING, atol=ROUNDING)
    size = sum(x.abs().sum().item() for x in true_gradients.values())
    torch.testing.assert_close(out.loss.double(), truth.loss.double(), rtol=ROUNDING, atol=ROUNDING * (1 + min(size, 10.0)))
    assert out.metrics.keys() == truth.metrics.keys()
    for name, value in truth.metrics.items():
        if name != "recomputed_fraction":  # is of the implementation
            torch.testing.assert_close(out.metrics[name], value, rtol=1e-4, atol=ROUNDING)
    assert gradients.keys() == true_gradients.keys()
    for name, gradient in true_gradients.items():
        atol = 3 * eps * gradient.abs().max().item()
        torch.testing.assert_close(gradients[name].double(), gradient.double(), rtol=3 * eps, atol=atol)


def run(case: Any, **changed: Any) -> tuple[gf.GRPOOutput, Mapping[str, Tensor]]:
    out, gradient = case.run(**changed)
    return out, gradient if isinstance(gradient, dict) else {"logits": gradient}


@pytest.mark.parametrize("seed", SEEDS)
def test_a_repeated_formula_over_logits(seed: int) -> None:
    dtype = list(EPS)[seed % 3]
    case = random_case(seed, dtype, largest_vocabulary=600)
    built_in, custom = pair(case.options["config"])
    check_equal(run(case, config=custom), run(case, config=built_in), EPS[dtype])


@pytest.mark.parametrize("seed", SEEDS)
def test_a_repeated_formula_in_the_head(seed: int) -> None:
    case = random_linear_case(seed, torch.float32)
    built_in, custom = pair(case.options["config"])
    mine, expected = run(case, config=custom), run(case, config=built_in)
    check_equal(mine, expected)
    if custom.level == "token":
        assert mine[0].metrics["recomputed_fraction"] == 0


@pytest.mark.parametrize("seed", SEEDS[:6])
@pytest.mark.parametrize("make", [random_case, random_linear_case])
def test_every_input(seed: int, make: Any) -> None:
    """Against the reference in float64, at every level."""
    case = make(seed, torch.float32)
    built_in, _ = pair(case.options["config"])
    level = [None, "sequence", "sequence_token"][seed % 3]
    config = dataclasses.replace(built_in, loss_type="custom", surrogate=everything, importance_sampling_level=level)
    assert not config.skips_zero_advantages
    generator, tokens = torch.Generator().manual_seed(seed), case.token_ids.shape
    columns = {"mine": torch.rand(tokens, generator=generator), "sequence": torch.arange(tokens[0])}  # of whole numbers, [B] or [N]
    mine = run(case, config=config, surrogate_inputs=columns)
    with gf.use_backend("reference"):
        double: dict[str, Any] = (
            {"dtype": torch.float64} if make is random_linear_case else {"logits": case.logits.double(), "inplace": False}
        )
        check_equal(mine, run(case, config=config, surrogate_inputs=columns, **double))
