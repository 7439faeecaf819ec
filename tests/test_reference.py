"""The reference, in float64, held to tables worked by hand, to gradcheck, to a second derivation in plain Python, and to itself.

Everything goes through gf.grpo_loss and gf.token_logprobs, so the tables and the exact formulas hold for the C++ kernel as well.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

import grpo_fast as gf
from grpo_fast.loss.config import AGGREGATIONS, KL_ESTIMATORS, LEVELS, LOSS_TYPES, LossConfig
from grpo_fast.ops import extension

NAN, INF = math.nan, math.inf
LOG3 = math.log(3)

needs_extension = pytest.mark.skipif(not extension.load(), reason=f"the extension is not loaded: {extension.status().why}")
# backend, type of the logits, tolerance: float64 logits are always the reference's
IMPLEMENTATIONS = [
    pytest.param("reference", torch.float64, 1e-12, id="reference-float64"),
    pytest.param("reference", torch.float32, 2e-6, id="reference-float32"),
    pytest.param("cpu", torch.float32, 2e-6, id="cpu-float32", marks=needs_extension),
]
everywhere = pytest.mark.parametrize(("backend", "dtype", "tolerance"), IMPLEMENTATIONS)


def close(actual: Any, expected: Any, tolerance: float, what: str = "") -> None:
    """Equal within the tolerance, relative, and absolute for numbers below 1."""
    actual, expected = (x.detach().double() if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float64) for x in (actual, expected))
    assert actual.shape == expected.shape, f"{what}: {list(actual.shape)} against {list(expected.shape)}"
    error = (actual - expected).abs() / expected.abs().clamp(min=1)
    assert (error <= tolerance).all(), f"{what}: {actual.tolist()} against {expected.tolist()}, off by {error.max():.3g}"


# ---- tables worked by hand
#
# A vocabulary of two, logits (ln 3, 0): p = (3/4, 1/4). The token 0 is sampled, so log p = ln(3/4), and d log p / dz = (1/4, -1/4): the
# gradient g = d loss / d log p is 4 times the first column of the logits' gradient. An old log-probability of ln(3/4) - ln(r) makes the
# ratio r.

P, LOGP = 0.75, -0.2876820724517809  # ln(3/4)


def hand(
    backend: str,
    dtype: torch.dtype,
    ratios: list[list[float]],
    advantages: list[Any],
    mask: list[list[int]] | None = None,
    ref_probabilities: list[list[float]] | None = None,
    rollout_weights: list[list[float]] | None = None,
    **arguments: Any,
) -> tuple[Tensor, Tensor, gf.GRPOOutput]:
    """Loss, g of every token, and all the rest, for tokens of p = 3/4 with the given importance ratios."""
    shape = len(ratios), len(ratios[0])
    logits = torch.tensor([LOG3, 0.0], dtype=dtype).expand(*shape, 2).clone().requires_grad_()
    with gf.use_backend(backend):
        out = gf.grpo_loss(
            logits,
            torch.zeros(shape, dtype=torch.int64),
            torch.tensor(advantages, dtype=dtype),
            old_logprobs=LOGP - torch.tensor(ratios, dtype=dtype).log(),
            mask=None if mask is None else torch.tensor(mask),
            ref_logprobs=None if ref_probabilities is None else torch.tensor(ref_probabilities, dtype=dtype).log(),
            rollout_weights=None if rollout_weights is None else torch.tensor(rollout_weights, dtype=dtype),
            **arguments,
        )
    (gradient,) = torch.autograd.grad(out.loss, logits)
    close(gradient.sum(-1), torch.zeros(shape), 1e-6, "a softmax gradient sums to 0")
    return out.loss, gradient[..., 0] * 4, out


# settings, A, ratio, loss, g, clip_low, clip_high
SURROGATES: list[tuple[dict[str, Any], float, float, float, float, int, int]] = [
    # clip to [0.8, 1.2]: loss = max(-r A, -clip(r) A)
    ({}, 2.0, 1.1, -2.2, -2.2, 0, 0),  # inside: -1.1 * 2, g = -r A
    ({}, 2.0, 1.5, -2.4, 0.0, 0, 1),  # above and A > 0: -1.2 * 2, constant
    ({}, 2.0, 0.5, -1.0, -1.0, 0, 0),  # below and A > 0: max(-1.0, -1.6), the unclipped one
    ({}, -2.0, 1.1, 2.2, 2.2, 0, 0),
    ({}, -2.0, 1.5, 3.0, 3.0, 0, 0),  # above and A < 0: max(3.0, 2.4), the unclipped one
    ({}, -2.0, 0.5, 1.6, 0.0, 1, 0),  # below and A < 0: max(1.0, 1.6), constant
    ({}, 0.0, 1.5, 0.0, 0.0, 0, 0),
    ({}, 0.0, 0.5, 0.0, 0.0, 0, 0),
    # the two sides of the band are two settings
    ({"epsilon_low": 0.1, "epsilon_high": 0.3}, 1.0, 1.25, -1.25, -1.25, 0, 0),
    ({"epsilon_low": 0.1, "epsilon_high": 0.3}, 1.0, 1.4, -1.3, 0.0, 0, 1),
    ({"epsilon_low": 0.1, "epsilon_high": 0.3}, -1.0, 0.85, 0.9, 0.0, 1, 0),
    # delta = 1.6 bounds the unclipped ratio
    ({"delta": 1.6}, -2.0, 1.5, 3.0, 3.0, 0, 0),
    ({"delta": 1.6}, -2.0, 3.0, 3.2, 0.0, 0, 0),  # 1.6 * 2 in place of 3 * 2
    ({"delta": 1.6}, 2.0, 3.0, -2.4, 0.0, 0, 1),  # the band's 1.2 is lower
    ({"delta": 1.6}, 0.0, 3.0, 0.0, 0.0, 0, 0),
    # dual clip with c = 3: A < 0 loses at most 3 |A|
    ({"dual_clip": 3.0}, -2.0, 2.0, 4.0, 4.0, 0, 0),
    ({"dual_clip": 3.0}, -2.0, 5.0, 6.0, 0.0, 0, 0),  # 3 * 2 in place of 5 * 2
    ({"dual_clip": 3.0}, 2.0, 5.0, -2.4, 0.0, 0, 1),  # no effect for A > 0
    ({"dual_clip": 3.0, "delta": 4.0}, -2.0, 3.5, 6.0, 0.0, 0, 0),
    ({"dual_clip": 5.0, "delta": 4.0}, -2.0, 9.0, 8.0, 0.0, 0, 0),
    # cispo with a raw bound of 2: loss = -min(r, 2) A ln(3/4), g = -min(r, 2) A, whatever the sign
    ({"loss_type": "cispo", "epsilon_high": 2.0}, 2.0, 1.5, 0.8630462173553427, -3.0, 0, 0),  # 3 * 0.28768...
    ({"loss_type": "cispo", "epsilon_high": 2.0}, 2.0, 5.0, 1.1507282898071236, -4.0, 0, 1),  # 4 * 0.28768...
    ({"loss_type": "cispo", "epsilon_high": 2.0}, -2.0, 0.1, -0.05753641449035618, 0.2, 0, 0),  # no lower bound
    ({"loss_type": "cispo", "epsilon_high": 2.0}, -2.0, 5.0, -1.1507282898071236, 4.0, 0, 0),  # bounded too, but not counted as clipped
    ({"loss_type": "cispo", "epsilon_high": 2.0}, 0.0, 5.0, 0.0, 0.0, 0, 0),
    # with a lower bound of 0.8: -clip(r, 0.8, 2) A ln(3/4)
    ({"loss_type": "cispo", "epsilon_high": 2.0, "cispo_ratio_low": 0.8}, -2.0, 0.1, -0.46029131592284945, 1.6, 1, 0),
    ({"loss_type": "cispo", "epsilon_high": 2.0, "cispo_ratio_low": 0.8}, 2.0, 0.1, 0.46029131592284945, -1.6, 0, 0),  # not counted
    ({"loss_type": "cispo", "epsilon_high": 2.0, "cispo_ratio_low": 0.8}, 2.0, 1.5, 0.8630462173553427, -3.0, 0, 0),
    # gmpo of a sequence of one token: the log-ratio is clipped to 0.2 for A > 0, to -0.2 for A < 0
    ({"loss_type": "gmpo"}, 2.0, 1.1, -2.2, -2.2, 0, 0),
    ({"loss_type": "gmpo"}, 2.0, 1.5, -2.4428055163203397, 0.0, 0, 1),  # 2 e^0.2
    ({"loss_type": "gmpo"}, 2.0, 0.5, -1.0, -1.0, 0, 0),
    ({"loss_type": "gmpo"}, -2.0, 0.5, 1.6374615061559636, 0.0, 1, 0),  # 2 e^-0.2
    ({"loss_type": "gmpo"}, -2.0, 1.5, 3.0, 3.0, 0, 0),
    ({"loss_type": "gmpo", "epsilon_low": 1.5, "epsilon_high": 1.5}, 1.0, 4.0, -4.0, -4.0, 0, 0),  # ln 4 = 1.386
    ({"loss_type": "gmpo"}, 0.0, 1.5, 0.0, 0.0, 0, 0),
    # the squared log-ratio d^2 / 2 in addition, g + d: also of a clipped token, and of A = 0
    ({"squared_log_ratio_coef": 0.5}, 2.0, 1.1, -2.1954579848128337, -2.1046898201956754, 0, 0),  # d = 0.0953101798
    ({"squared_log_ratio_coef": 0.5}, 2.0, 1.5, -2.3177990230534173, 0.4054651081081644, 0, 1),  # d = 0.4054651081
    ({"squared_log_ratio_coef": 0.5, "log_ratio_clamp": 3.0}, 0.0, math.exp(2.5), 3.125, 2.5, 0, 0),
    ({"squared_log_ratio_coef": 0.5, "log_ratio_clamp": 2.0}, 0.0, math.exp(2.5), 2.0, 0.0, 0, 0),  # clamped: constant
    ({"squared_log_ratio_coef": 0.5, "loss_type": "gmpo"}, 2.0, 1.5, -2.360604539373757, 0.4054651081081644, 0, 1),
    ({"squared_log_ratio_coef": 0.5, "loss_type": "reinforce"}, 0.0, 0.5, 0.2402265069591007, -0.6931471805599453, 0, 0),
    # sapo: loss = -4/tau s A with s = sigmoid(tau (r - 1)), g = -4 s (1 - s) r A; tau by the sign of A
    ({"loss_type": "sapo"}, 2.0, 1.0, -4.0, -2.0, 0, 0),  # s = 1/2
    ({"loss_type": "sapo"}, 2.0, 2.0, -5.848468629040039, -3.1457909318637096, 0, 0),  # s = sigmoid(1) = 0.7310585786300049
    ({"loss_type": "sapo", "sapo_temperature_neg": 1.25}, -2.0, 1.0, 3.2, 2.0, 0, 0),  # 4/1.25
    # s = sigmoid(1.25) = 0.7772998611746911
    ({"loss_type": "sapo", "sapo_temperature_neg": 1.25}, -2.0, 2.0, 4.974719111518024, 2.769676591879953, 0, 0),
    ({"loss_type": "sapo"}, 0.0, 2.0, 0.0, 0.0, 0, 0),
    ({"loss_type": "sapo", "sapo_temperature_pos": 2.0}, 1.0, 2.0, -1.7615941559557646, -0.8399486832280525, 0, 0),  # 2 sigmoid(2)
    # dppo_tv: loss = -r A, and 0 where |p - q| > the setting and p has moved in the direction of A; q = p / r is the old probability
    ({"loss_type": "dppo_tv"}, 2.0, 1.2, -2.4, -2.4, 0, 0),  # q = 0.625, |p - q| = 0.125
    ({"loss_type": "dppo_tv"}, 2.0, 1.5, 0.0, 0.0, 0, 1),  # q = 0.5: 0.25 > 0.2
    ({"loss_type": "dppo_tv", "dppo_mask_high": 0.26}, 2.0, 1.5, -3.0, -3.0, 0, 0),
    ({"loss_type": "dppo_tv", "dppo_mask_low": 0.0}, -2.0, 1.5, 3.0, 3.0, 0, 0),  # A < 0 and p has risen: it is to come back
    ({"loss_type": "dppo_tv"}, -2.0, 0.8, 1.6, 1.6, 0, 0),  # q = 0.9375: 0.1875
    ({"loss_type": "dppo_tv", "dppo_mask_low": 0.18}, -2.0, 0.8, 0.0, 0.0, 1, 0),
    ({"loss_type": "dppo_tv", "dppo_mask_high": 0.0}, 2.0, 0.8, -1.6, -1.6, 0, 0),  # A > 0 and p has fallen
    ({"loss_type": "dppo_tv", "dppo_mask_low": 0.0, "dppo_mask_high": 0.0}, 0.0, 1.5, 0.0, 0.0, 0, 0),
    ({"loss_type": "dppo_tv", "dppo_mask_high": 1.0, "log_ratio_clamp": 1.0}, 1.0, 3.0, -math.e, 0.0, 0, 0),  # ln 3 clamped to 1: constant
    ({"loss_type": "dppo_tv", "dppo_ratio_max": 3.0}, 2.0, 1.2, 0.6904369738842741, -2.4, 0, 0),  # -1.2 * 2 ln(3/4)
    ({"loss_type": "dppo_tv", "dppo_ratio_max": 1.1}, -2.0, 1.2, -0.6329005593939182, 2.2, 0, 0),  # 1.1 * 2 ln(3/4)
    ({"loss_type": "dppo_tv", "dppo_ratio_max": 3.0}, 2.0, 1.5, 0.0, 0.0, 0, 1),
    # dppo_kl: the same with D = q ln(q / p) + (1 - q) ln((1 - q) / (1 - p))
    ({"loss_type": "dppo_kl"}, 2.0, 1.5, -3.0, -3.0, 0, 0),  # q = 0.5: ln(2/3) / 2 + ln(2) / 2 = 0.14384
    ({"loss_type": "dppo_kl", "dppo_mask_high": 0.143}, 2.0, 1.5, 0.0, 0.0, 0, 1),
    ({"loss_type": "dppo_kl", "dppo_mask_high": 0.144}, 2.0, 1.5, -3.0, -3.0, 0, 0),
    ({"loss_type": "dppo_kl", "dppo_mask_low": 0.0}, -2.0, 1.5, 3.0, 3.0, 0, 0),
    ({"loss_type": "dppo_kl", "dppo_mask_low": 0.122}, -2.0, 0.8, 0.0, 0.0, 1, 0),  # q = 15/16: 0.12255
    ({"loss_type": "dppo_kl", "dppo_mask_low": 0.123}, -2.0, 0.8, 1.6, 1.6, 0, 0),
    ({"loss_type": "dppo_kl", "dppo_mask_high": 0.0}, 2.0, 0.8, -1.6, -1.6, 0, 0),
    ({"loss_type": "dppo_kl"}, 2.0, 5.0, 0.0, 0.0, 0, 1),  # q = 0.15: 0.15 ln(0.2) + 0.85 ln(3.4) = 0.79879
    # reinforce: -A ln(3/4), the ratio does not enter
    ({"loss_type": "reinforce"}, 2.0, 5.0, 0.5753641449035618, -2.0, 0, 0),
    ({"loss_type": "reinforce"}, -2.0, 0.1, -0.5753641449035618, 2.0, 0, 0),
    # a log-ratio of 2.5 clamped to 2: the ratio is e^2 = 7.38905609893065, and constant
    ({"log_ratio_clamp": 2.0}, -1.0, math.exp(1.5), 4.4816890703380645, 4.4816890703380645, 0, 0),
    ({"log_ratio_clamp": 2.0}, -1.0, math.exp(2.5), 7.38905609893065, 0.0, 0, 0),
    ({"log_ratio_clamp": 2.0}, 1.0, math.exp(-2.5), -0.1353352832366127, 0.0, 0, 0),
]


@everywhere
@pytest.mark.parametrize(("settings", "advantage", "ratio", "loss", "g", "low", "high"), SURROGATES)
def test_surrogate_of_one_token(
    backend: str,
    dtype: torch.dtype,
    tolerance: float,
    settings: dict[str, Any],
    advantage: float,
    ratio: float,
    loss: float,
    g: float,
    low: int,
    high: int,
) -> None:
    actual, actual_g, out = hand(backend, dtype, [[ratio]], [advantage], config=LossConfig(**settings))
    close(actual, loss, tolerance, "loss")
    close(actual_g, [[g]], 4 * tolerance, "g")
    assert out.metrics["clip_low"] == low
    assert out.metrics["clip_high"] == high
    assert out.metrics["clip_region"] == max(low, high)
    clamped = min(max(math.log(ratio), -settings.get("log_ratio_clamp", 20.0)), settings.get("log_ratio_clamp", 20.0))
    close(out.metrics["ratio_mean"], math.exp(clamped), max(tolerance, 1e-6), "ratio")


@pytest.mark.parametrize(
    ("ratio", "loss", "g"),
    [
        (1.0, 3.8095238095238093, 2.0),  # 4/1.05
        (2.0, 5.64399923186403, 3.072439166781177),  # s = sigmoid(1.05) = 0.740774899182154
    ],
)
def test_sapo_with_a_temperature_that_float32_does_not_hold(ratio: float, loss: float, g: float) -> None:
    actual, actual_g, _ = hand("reference", torch.float64, [[ratio]], [-2.0], config=LossConfig(loss_type="sapo"))
    close(actual, loss, 1e-12, "loss")
    close(actual_g, [[g]], 1e-12, "g")


def test_vespo_with_shapes_that_float32_does_not_hold() -> None:
    config = LossConfig(loss_type="vespo", vespo_k_pos=2.1, vespo_lambda_pos=3.1)
    loss, _, _ = hand("reference", torch.float64, [[2.0, 0.25]], [2.0], config=config)
    close(loss, -(0.5**2.1) * math.exp(3.1 / 2) * 2 * LOGP, 1e-12, "loss")


@everywhere
@pytest.mark.parametrize(
    ("advantage", "phi"),
    [
        (2.0, 1.1204222675845161),  # W = 2 * 1/4 = 1/2, A >= 0: (k, lambda) = (2, 3), phi = W^2 e^(3 (1 - W)) = e^1.5 / 4
        (0.0, 1.1204222675845161),
        (-2.0, 0.33978522855738066),  # A < 0: (3, 2), phi = W^3 e^(2 (1 - W)) = e / 8
    ],
)
def test_vespo_weighs_a_sequence(backend: str, dtype: torch.dtype, tolerance: float, advantage: float, phi: float) -> None:
    loss, g, _ = hand(backend, dtype, [[2.0, 0.25]], [advantage], config=LossConfig(loss_type="vespo"))
    close(loss, -phi * advantage * LOGP, tolerance, "loss: the mean of two equal tokens")
    close(g, [[-phi * advantage / 2] * 2], 4 * tolerance, "g: the weight of a token is 1/2, and phi is a constant")


@everywhere
def test_vespos_lambda_is_at_least_1e_4(backend: str, dtype: torch.dtype, tolerance: float) -> None:
    """W = 4: phi = exp(-3 lambda) with k = 0, which a lambda of 1e-2 would take 3 % lower."""
    config = LossConfig(loss_type="vespo", vespo_k_pos=0.0, vespo_lambda_pos=0.0)
    loss, _, _ = hand(backend, dtype, [[2.0, 2.0]], [2.0], config=config)
    close(loss, -math.exp(-3e-4) * 2 * LOGP, tolerance, "loss")


@everywhere
@pytest.mark.parametrize(
    ("rollout_weights", "phi"),
    [
        ([[4.0, 0.5]], 1.0),  # per token: their product 2 enters, W = 1/2 * 2 = 1, phi = 1
        ([[2.0]], 1.0),  # per sequence, shared by its tokens: enters once
        ([[0.0]], 2.0085536923187668e-15),  # ln W is at least ln 1e-8: phi = 1e-16 e^3
    ],
)
def test_vespo_takes_the_rollout_weights_into_phi(
    backend: str, dtype: torch.dtype, tolerance: float, rollout_weights: list[list[float]], phi: float
) -> None:
    loss, g, _ = hand(backend, dtype, [[2.0, 0.25]], [2.0], rollout_weights=rollout_weights, config=LossConfig(loss_type="vespo"))
    close(loss, -phi * 2 * LOGP, tolerance, "loss: the rollout weights are not multiplied again")
    close(g, [[-phi, -phi]], 4 * tolerance, "g")


# estimator, reference probability, value, g of the plain estimator; d = ln(q / p)
KL = [
    ("k1", 0.375, 0.6931471805599453, 1.0),  # d = -ln 2; k1 = -d
    ("k2", 0.375, 0.2402265069591007, 0.6931471805599453),  # d^2 / 2; g = -d
    ("k3", 0.375, 0.19314718055994531, 0.5),  # 1/2 - 1 + ln 2; g = 1 - e^d
    ("k1", 0.9375, -0.22314355131420976, 1.0),  # d = ln 5/4
    ("k2", 0.9375, 0.024896522246548823, -0.22314355131420976),
    ("k3", 0.9375, 0.02685644868579024, -0.25),  # 5/4 - 1 - ln 5/4
    ("k1", 0.75, 0.0, 1.0),  # d = 0
    ("k2", 0.75, 0.0, 0.0),
    ("k3", 0.75, 0.0, 0.0),
]


@everywhere
@pytest.mark.parametrize(("estimator", "q", "kl", "g"), KL)
@pytest.mark.parametrize("bias_corrected", [False, True])
def test_kl_penalty(
    backend: str, dtype: torch.dtype, tolerance: float, estimator: str, q: float, kl: float, g: float, bias_corrected: bool
) -> None:
    """Added to the surrogate with beta, and multiplied by the ratio (product rule: d(r k) = r (k + dk)) when bias-corrected."""
    config = LossConfig(beta=0.1, kl_estimator=estimator, bias_corrected_kl=bias_corrected)
    expected_kl, expected_g = (2 * kl, 2 * (kl + g)) if bias_corrected else (kl, g)
    loss, actual_g, out = hand(backend, dtype, [[2.0]], [-3.0], ref_probabilities=[[q]], config=config)  # ratio 2, A = -3: 6, and g = 6
    close(loss, 6.0 + 0.1 * expected_kl, tolerance, "loss")
    close(actual_g, [[6.0 + 0.1 * expected_g]], 4 * tolerance, "g")
    close(out.metrics["kl"], kl, 1e-6, "the metric is the plain estimator")


def test_bias_corrected_k3_has_the_gradient_of_the_reverse_kl() -> None:
    """d(r k3) = r (k3 + 1 - e^d) = -r d, whatever the estimator's noise: with r = 2 and d = -ln 2 that is 2 ln 2."""
    config = LossConfig(beta=1.0, bias_corrected_kl=True)
    _, g, _ = hand("reference", torch.float64, [[2.0]], [0.0], ref_probabilities=[[0.375]], config=config)
    close(g, [[1.3862943611198906]], 1e-12)


@everywhere
def test_kl_k3_clamps_its_exponent(backend: str, dtype: torch.dtype, tolerance: float) -> None:
    config = LossConfig(beta=1.0, log_ratio_clamp=2.0)
    loss, g, _ = hand(backend, dtype, [[1.0]], [0.0], ref_probabilities=[[P * math.exp(5)]], config=config)
    close(loss, 4.38905609893065, 2 * tolerance, "e^2 - 1 - 2")
    close(g, [[0.0]], tolerance, "constant beyond the clamp")


@everywhere
def test_rollout_weights_multiply_the_surrogate_and_not_the_kl(backend: str, dtype: torch.dtype, tolerance: float) -> None:
    # two tokens, ratio 1, A = -1: surrogate 1 each, times 3 and 0; k3 = 0.19314718... each, times beta = 10; mean over two
    loss, g, _ = hand(
        backend, dtype, [[1.0, 1.0]], [-1.0], ref_probabilities=[[0.375] * 2], rollout_weights=[[3.0, 0.0]], config=LossConfig(beta=10.0)
    )
    close(loss, (3.0 + 0.0) / 2 + 1.9314718055994531, tolerance, "loss")
    close(g, [[(3.0 + 5.0) / 2, (0.0 + 5.0) / 2]], 4 * tolerance, "g")


# Tokens with ratio 1 and A = -l have the loss l and g = weight * l. Three sequences: l = (1, 2, 3), (4), and a fully masked one.
AGGREGATED = [
    # (1+2+3)/3 = 2 and 4 and 0, over three sequences; weights 1/9 and 1/3
    ("sequence_mean", {}, 2.0, [[1 / 9, 2 / 9, 3 / 9], [4 / 3, 0, 0], [0, 0, 0]]),
    ("token_mean", {}, 2.5, [[1 / 4, 2 / 4, 3 / 4], [1, 0, 0], [0, 0, 0]]),  # 10 / 4
    ("token_mean", {"num_items": 20}, 2.5, [[1 / 4, 2 / 4, 3 / 4], [1, 0, 0], [0, 0, 0]]),  # local: num_items is not its own
    ("global_token_mean", {}, 2.5, [[1 / 4, 2 / 4, 3 / 4], [1, 0, 0], [0, 0, 0]]),
    ("global_token_mean", {"num_items": 20}, 0.5, [[1 / 20, 2 / 20, 3 / 20], [4 / 20, 0, 0], [0, 0, 0]]),  # 10 / 20
    ("global_token_mean", {"num_items": torch.tensor(20)}, 0.5, [[1 / 20, 2 / 20, 3 / 20], [4 / 20, 0, 0], [0, 0, 0]]),
    ("fixed_length", {}, 2 / 3, [[1 / 15, 2 / 15, 3 / 15], [4 / 15, 0, 0], [0, 0, 0]]),  # 10 / (3 * 5)
    ("sequence_sum", {}, 10 / 3, [[1 / 3, 2 / 3, 3 / 3], [4 / 3, 0, 0], [0, 0, 0]]),  # (6 + 4 + 0) / 3
]


@everywhere
@pytest.mark.parametrize("loss_scale", [1.0, 0.25, -2.0])
@pytest.mark.parametrize(("aggregation", "arguments", "loss", "g"), AGGREGATED)
def test_aggregation(
    backend: str,
    dtype: torch.dtype,
    tolerance: float,
    aggregation: str,
    arguments: dict[str, Any],
    loss: float,
    g: list[list[float]],
    loss_scale: float,
) -> None:
    actual, actual_g, _ = hand(
        backend,
        dtype,
        [[1.0] * 3] * 3,
        [[-1.0, -2.0, -3.0], [-4.0, NAN, NAN], [NAN] * 3],
        mask=[[1, 1, 1], [1, 0, 0], [0, 0, 0]],
        config=LossConfig(aggregation=aggregation, max_completion_length=5),
        loss_scale=loss_scale,
        **arguments,
    )
    close(actual, loss * loss_scale, tolerance, "loss")
    close(actual_g, torch.tensor(g, dtype=torch.float64) * loss_scale, 4 * tolerance, "g")


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_types_are_the_rows_of_the_table(loss_type: str) -> None:
    """Naming a loss type is naming its level and aggregation."""
    surrogate, level, aggregation = LOSS_TYPES[loss_type]
    by_name = LossConfig(loss_type=loss_type, max_completion_length=7)
    assert (by_name.surrogate, by_name.level, by_name.resolved_aggregation) == (surrogate, level, aggregation)


# Log-ratios (ln 4, 0), so that their mean is ln 2; weights 1/2 each; the clip never acts as A < 0 and the ratio is above the band.
LEVEL_TABLE = [
    # loss = (4 + 1)/2; g_t = r_t / 2
    ("token", [-1.0], 2.5, [[2.0, 0.5]]),
    # ratio 2 for both: (2 + 2)/2; every token moves the mean by 1/2, and both losses with it: 2 * (1/2 * 2) * 1/2 = 1
    ("sequence", [-1.0], 2.0, [[1.0, 1.0]]),
    # ratio 2 for both, but a token moves only its own loss: 1/2 * 2 = 1
    ("sequence_token", [-1.0], 2.0, [[1.0, 1.0]]),
    # advantages of tokens tell the two apart: losses (2, 6)
    ("token", [[-1.0, -3.0]], 3.5, [[2.0, 1.5]]),  # (4 * 1 + 1 * 3)/2
    ("sequence", [[-1.0, -3.0]], 4.0, [[2.0, 2.0]]),  # (1/2 * 2 + 1/2 * 6) * 1/2 each
    ("sequence_token", [[-1.0, -3.0]], 4.0, [[1.0, 3.0]]),  # 1/2 * 2 and 1/2 * 6
]


@everywhere
@pytest.mark.parametrize(("level", "advantages", "loss", "g"), LEVEL_TABLE)
def test_ratio_level(
    backend: str, dtype: torch.dtype, tolerance: float, level: str, advantages: list[Any], loss: float, g: list[list[float]]
) -> None:
    config = LossConfig(loss_type="grpo", importance_sampling_level=level)
    actual, actual_g, _ = hand(backend, dtype, [[4.0, 1.0]], advantages, config=config)
    close(actual, loss, tolerance, "loss")
    close(actual_g, g, 4 * tolerance, "g")


@everywhere
@pytest.mark.parametrize("level", ["sequence", "sequence_token"])
def test_the_mean_log_ratio_is_over_unmasked_tokens(backend: str, dtype: torch.dtype, tolerance: float, level: str) -> None:
    config = LossConfig(loss_type="grpo", importance_sampling_level=level)
    loss, g, out = hand(backend, dtype, [[4.0, NAN, 1.0]], [-1.0], mask=[[1, 0, 1]], config=config)
    close(loss, 2.0, tolerance, "loss")
    close(g, [[1.0, 0.0, 1.0]], 4 * tolerance, "g")
    close(out.metrics["ratio_mean"], 2.0, 2e-6, "ratio")


# logits, arguments, token, log p, entropy
DISTRIBUTIONS: list[tuple[list[float], dict[str, Any], int, float, float]] = [
    ([0.0] * 8, {}, 5, -2.0794415416798357, 2.0794415416798357),  # uniform: ln 8
    ([LOG3, 0.0], {}, 0, LOGP, 0.5623351446188083),  # -(3/4 ln 3/4 + 1/4 ln 1/4)
    ([LOG3, 0.0], {}, 1, -1.3862943611198906, 0.5623351446188083),  # ln 1/4
    ([math.log(4), math.log(2), 0.0, 0.0], {}, 1, -1.3862943611198906, 1.2130075659799042),  # (1/2, 1/4, 1/8, 1/8): 7/4 ln 2
    ([2 * LOG3, 0.0], {"temperature": 2.0}, 0, LOGP, 0.5623351446188083),  # ln 9 / 2 = ln 3
    ([LOG3 / 2, 0.0], {"temperature": torch.tensor([[0.5]])}, 0, LOGP, 0.5623351446188083),
    ([16 * LOG3, 0.0], {"logit_scale": 1 / 16}, 0, LOGP, 0.5623351446188083),
    ([2 * math.atanh(LOG3 / 2), 0.0], {"softcap": 2.0}, 0, LOGP, 0.5623351446188083),  # 2 tanh(z / 2) = ln 3
    # scale first, then cap, then temperature: 3/4 z = 4 atanh(ln 9 / 4), 4 tanh(. / 4) = ln 9, ln 9 / 2 = ln 3
    ([16 / 3 * math.atanh(LOG3 / 2), 0.0], {"logit_scale": 0.75, "softcap": 4.0, "temperature": 2.0}, 0, LOGP, 0.5623351446188083),
    ([LOG3, 0.0, -INF, -INF], {}, 0, LOGP, 0.5623351446188083),  # a suppressed token is no token
]


@everywhere
@pytest.mark.parametrize(("row", "arguments", "token", "logprob", "entropy"), DISTRIBUTIONS)
def test_log_probability_and_entropy_of_known_distributions(
    backend: str,
    dtype: torch.dtype,
    tolerance: float,
    row: list[float],
    arguments: dict[str, Any],
    token: int,
    logprob: float,
    entropy: float,
) -> None:
    logits, ids = torch.tensor([[row]], dtype=dtype), torch.tensor([[token]])
    arguments = {name: x.to(dtype) if isinstance(x, Tensor) else x for name, x in arguments.items()}
    with gf.use_backend(backend):
        statistics = gf.token_logprobs(logits, ids, **arguments)
        out = gf.grpo_loss(logits, ids, torch.tensor([1.0], dtype=dtype), **arguments)
    for got in (statistics, out):
        close(got.logprobs, [[logprob]], tolerance, "logprob")
        close(got.entropy, [[entropy]], tolerance, "entropy")
    close(out.metrics["entropy"], entropy, 1e-6, "entropy metric")


@everywhere
@pytest.mark.parametrize(
    ("row", "arguments", "slope"),
    [
        # d log p_0 / dz_0 = f'(z_0) / T * (1 - 3/4)
        ([LOG3, 0.0], {}, 1.0),
        ([2 * LOG3, 0.0], {"temperature": 2.0}, 0.5),
        ([16 * LOG3, 0.0], {"logit_scale": 1 / 16}, 1 / 16),
        ([2 * math.atanh(LOG3 / 2), 0.0], {"softcap": 2.0}, 0.6982627597967069),  # 1 - tanh(z / 2)^2 = 1 - (ln 3 / 2)^2
        ([16 / 3 * math.atanh(LOG3 / 2), 0.0], {"logit_scale": 0.75, "softcap": 4.0, "temperature": 2.0}, 0.75 * 0.6982627597967069 / 2),
    ],
)
def test_gradient_of_known_distributions(
    backend: str, dtype: torch.dtype, tolerance: float, row: list[float], arguments: dict[str, Any], slope: float
) -> None:
    """Column 0 through f'(z_0), column 1 through f'(0) = logit_scale. The entropy's dz_v = -f'/T p_v (ln p_v + H)."""
    logits = torch.tensor([[row]], dtype=dtype, requires_grad=True)
    flat = arguments.get("logit_scale", 1.0) / arguments.get("temperature", 1.0)
    with gf.use_backend(backend):
        statistics = gf.token_logprobs(logits, torch.tensor([[0]]), **arguments)
    (of_logprob,) = torch.autograd.grad(statistics.logprobs.sum(), logits, retain_graph=True)
    (of_entropy,) = torch.autograd.grad(statistics.entropy.sum(), logits)
    close(of_logprob, [[[slope / 4, -flat / 4]]], tolerance, "logprob")
    dh = -P * (LOGP + 0.5623351446188083)  # -3/4 (ln 3/4 + H) = -0.2059898...
    close(dh, -0.20598980412527057, 1e-12)
    close(of_entropy, [[[slope * dh, -flat * dh]]], tolerance, "entropy")


@everywhere
@pytest.mark.parametrize(
    ("entropy_aggregation", "bonus"),
    [
        ("same", 0.5623351446188083 * (1 / 2 + 1 / 2)),  # sequence_mean of H, H | H
        ("token_mean", 0.5623351446188083),  # the same, as all entropies are equal; their weights differ: see g below
    ],
)
def test_entropy_bonus_is_subtracted(backend: str, dtype: torch.dtype, tolerance: float, entropy_aggregation: str, bonus: float) -> None:
    config = LossConfig(loss_type="grpo", entropy_coef=0.5, entropy_aggregation=entropy_aggregation)
    loss, g, _ = hand(backend, dtype, [[1.0, 1.0, 1.0], [1.0, NAN, NAN]], [-1.0, -2.0], mask=[[1, 1, 1], [1, 0, 0]], config=config)
    close(loss, 1.5 - 0.5 * bonus, tolerance, "loss")
    # dz_0 of the entropy is -0.20598980412527057 a token, and g counts four times dz_0
    h = 4 * 0.5 * 0.20598980412527057
    weights = [[1 / 6] * 3, [1 / 2, 0, 0]] if entropy_aggregation == "same" else [[1 / 4] * 3, [1 / 4, 0, 0]]
    expected = torch.tensor([[1 / 6] * 3, [2 / 2, 0, 0]], dtype=torch.float64) + h * torch.tensor(weights, dtype=torch.float64)
    close(g, expected, 4 * tolerance, "g")


def test_active_tokens_and_fraction() -> None:
    """Three of five unmasked tokens have an advantage; with a sequence's ratio all tokens of a sequence that has one."""
    arguments: dict[str, Any] = {"mask": [[1, 1, 1], [1, 1, 0]], "metrics_on": "active"}
    advantages, ratios = [[1.0, 0.0, 2.0], [0.0, 0.0, 5.0]], [[1.0] * 3] * 2
    _, _, out = hand("reference", torch.float64, ratios, advantages, **arguments)
    assert out.active.tolist() == [[True, False, True], [False, False, False]]
    close(out.metrics["active_fraction"], 2 / 5, 1e-6)
    _, _, out = hand("reference", torch.float64, ratios, advantages, config=LossConfig(loss_type="gspo"), **arguments)
    assert out.active.tolist() == [[True, True, True], [False, False, False]]
    _, _, out = hand("reference", torch.float64, ratios, advantages, config=LossConfig(entropy_coef=0.1), **arguments)
    assert out.active.tolist() == [[True, True, True], [True, True, False]]


# ---- a random batch, of which every test below takes its numbers


def random_batch(
    generator: torch.Generator,
    shape: tuple[int, int] = (3, 4),
    vocabulary: int = 7,
    spread: float = 0.5,
    tempered: bool = True,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> dict[str, Any]:
    """Float64, to be scored with the soft cap and scale given here.

    Ratios straddle any clip band with advantages of either sign, of sequences too; the last sequence is fully masked, and one advantage
    is 0.
    """
    b, t = shape

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, dtype=torch.float64)

    logits = 2 * normal(b, t, vocabulary)
    token_ids = torch.randint(vocabulary, shape, generator=generator)
    temperature = 0.5 + torch.rand(shape, generator=generator, dtype=torch.float64) if tempered else 1.0
    logprobs = gf.token_logprobs(logits, token_ids, temperature=temperature, softcap=softcap, logit_scale=logit_scale).logprobs
    mask = torch.rand(shape, generator=generator) < 0.8
    mask[0], mask[1, :2], mask[-1] = True, True, False
    advantages = normal(b, t)
    advantages[:, 0], advantages[:, 1], advantages[0, 2] = advantages[:, 0].abs(), -advantages[:, 1].abs(), 0.0
    log_ratio = spread * normal(b, t)
    log_ratio[0, 0], log_ratio[1, 1] = 2 * spread, -2 * spread  # a token with A > 0 above the band, one with A < 0 below it
    log_ratio -= (log_ratio * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    log_ratio[0] += spread / 2
    log_ratio[1] -= spread / 2
    return {
        "logits": logits,
        "token_ids": token_ids,
        "advantages": advantages,
        "mask": mask,
        "old_logprobs": logprobs - log_ratio,
        "ref_logprobs": logprobs + 0.5 * normal(b, t),
        "rollout_weights": normal(b, t).exp(),
        "temperature": temperature,
    }


def loss_and_gradient(batch: dict[str, Any], **changes: Any) -> tuple[Tensor, Tensor, gf.GRPOOutput]:
    """Of gf.grpo_loss on the batch with the changes; the gradient is that of the logits, [] changes nothing."""
    arguments = {**batch, **changes}
    logits = arguments.pop("logits").detach().clone().requires_grad_()
    out = gf.grpo_loss(logits, arguments.pop("token_ids"), arguments.pop("advantages"), **arguments)
    (gradient,) = torch.autograd.grad(out.loss, logits)
    return out.loss.detach(), gradient, out


def packed(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch as one row of N = B T tokens."""
    b, t, vocabulary = batch["logits"].shape
    flat = {
        name: x.reshape(b * t, vocabulary) if name == "logits" else x.expand(b, t).reshape(b * t) if isinstance(x, Tensor) else x
        for name, x in batch.items()
    }
    return {**flat, "cu_seqlens": torch.arange(b + 1, dtype=torch.int32) * t}


# ---- gradcheck

SMOOTH = [name for name, row in LOSS_TYPES.items() if row.surrogate in ("clip", "sapo", "reinforce", "gmpo", "dppo_tv", "dppo_kl")]
TOKEN_LEVEL_ONLY = ("reinforce", "dppo_tv", "dppo_kl")
CISPO_BOUND = 1.1  # within the ratios of a random batch
EVERYTHING: dict[str, Any] = {"beta": 0.3, "bias_corrected_kl": True, "entropy_coef": 0.2}
FEATURES: dict[str, tuple[dict[str, Any], tuple[str, ...], dict[str, Any]]] = {  # settings, tensors of the batch, other arguments
    "plain": ({}, (), {}),
    "bounds": ({"delta": 1.4, "dual_clip": 1.3}, (), {}),
    "beta": ({"beta": 0.3}, ("ref_logprobs",), {}),
    "bias_corrected_kl": ({"beta": 0.3, "bias_corrected_kl": True, "kl_estimator": "k2"}, ("ref_logprobs",), {}),
    "entropy": ({"entropy_coef": 0.2, "entropy_aggregation": "token_mean"}, (), {}),
    "rollout_weights": ({}, ("rollout_weights",), {}),
    "temperature": ({}, ("temperature",), {}),
    "softcap": ({}, (), {"softcap": 3.0, "logit_scale": 0.7}),
    "packed": ({"beta": 0.3}, ("ref_logprobs",), {}),
    "everything": (EVERYTHING, ("ref_logprobs", "rollout_weights", "temperature"), {"softcap": 3.0, "loss_scale": 0.5}),
}


def feature_batch(generator: torch.Generator, feature: str, **sizes: Any) -> dict[str, Any]:
    _, tensors, arguments = FEATURES[feature]
    scoring = {name: arguments[name] for name in ("softcap", "logit_scale") if name in arguments}
    return random_batch(generator, tempered="temperature" in tensors, **scoring, **sizes)


def featured(batch: dict[str, Any], feature: str, loss_type: str, level: str | None) -> dict[str, Any]:
    """What of the batch the feature speaks of, with the config."""
    settings, tensors, arguments = FEATURES[feature]
    if LOSS_TYPES[loss_type].surrogate != "clip":
        settings = {name: x for name, x in settings.items() if name not in ("delta", "dual_clip")}
    if loss_type == "cispo":
        settings = {**settings, "epsilon_high": CISPO_BOUND}
    if loss_type.startswith("dppo_"):
        settings = {**settings, "dppo_mask_low": 0.01, "dppo_mask_high": 0.01}  # within the divergences of a random batch
    config = LossConfig(loss_type=loss_type, importance_sampling_level=level, max_completion_length=5, **settings)
    chosen = {name: batch[name] for name in ("logits", "token_ids", "advantages", "mask", "old_logprobs", *tensors)}
    return {**(packed(chosen) if feature == "packed" else chosen), **arguments, "config": config}


def gradchecked(arguments: dict[str, Any]) -> bool:
    arguments = dict(arguments)
    logits = arguments.pop("logits").detach().clone().requires_grad_()

    token_ids, advantages = arguments.pop("token_ids"), arguments.pop("advantages")

    def loss(z: Tensor) -> Tensor:
        return gf.grpo_loss(z, token_ids, advantages, **arguments).loss

    return torch.autograd.gradcheck(loss, (logits,), eps=1e-6, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize(
    ("loss_type", "level"),
    [
        (name, level)
        for name in SMOOTH
        for level in ("token", "sequence")
        if level == "token" or name not in TOKEN_LEVEL_ONLY
        if (name, level) != ("gmpo", "token")
    ],
)
def test_gradcheck(loss_type: str, level: str, feature: str, generator: torch.Generator) -> None:
    """Of everything that stops no gradient; the rest is tied to it by the tests that follow."""
    batch = feature_batch(generator, feature, shape=(3, 3), vocabulary=3)
    assert gradchecked(featured(batch, feature, loss_type, level))


@pytest.mark.parametrize("loss_type", ["dapo", "gspo", "gmpo", "cispo"])
def test_gradcheck_of_the_squared_log_ratio(loss_type: str, generator: torch.Generator) -> None:
    """With advantages of 0, so that the surrogate, whose gradient cispo stops, has none."""
    batch = feature_batch(generator, "plain", shape=(3, 3), vocabulary=3)
    arguments = featured(batch, "plain", loss_type, None)
    arguments["config"] = dataclasses.replace(arguments["config"], squared_log_ratio_coef=0.3)
    arguments["advantages"] = torch.zeros_like(arguments["advantages"])
    assert gradchecked(arguments)
    assert loss_and_gradient(arguments)[1].abs().max() > 0.01


def test_gradcheck_can_fail(generator: torch.Generator) -> None:
    """A stopped gradient is seen: cispo's loss depends on the ratio, its gradient does not."""
    batch = feature_batch(generator, "plain", shape=(3, 3), vocabulary=3)
    with pytest.raises(GradcheckError):
        gradchecked(featured(batch, "plain", "cispo", "token"))


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("loss_type", ["grpo", "sapo", "cispo", "dr_grpo"])
def test_sequence_token_has_the_gradient_of_shifted_tokens(loss_type: str, feature: str, generator: torch.Generator) -> None:
    """log p - sg(log p) + sg(mean) is a token's log-ratio to an old policy at sg(log p - mean): same value, same gradient."""
    batch = feature_batch(generator, feature)
    arguments = featured(batch, feature, loss_type, "sequence_token")
    loss, gradient, out = loss_and_gradient(arguments)
    mask = arguments["mask"].reshape(3, 4)
    log_ratio = torch.where(mask, (out.logprobs - arguments["old_logprobs"]).reshape(3, 4), 0)
    mean = log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    old = (out.logprobs.reshape(3, 4) - mean).reshape_as(out.logprobs)
    by_token = featured(batch, feature, loss_type, "token")
    expected = loss_and_gradient({**by_token, "old_logprobs": old})
    close(loss, expected[0], 1e-12, "loss")
    close(gradient, expected[1], 1e-12, "gradient")
    assert not torch.allclose(gradient, loss_and_gradient(by_token)[1]), "the shift must matter"


@pytest.mark.parametrize("feature", [name for name in FEATURES if name != "rollout_weights"])
@pytest.mark.parametrize(("loss_type", "level"), [("cispo", "token"), ("cispo", "sequence"), ("vespo", "token")])
def test_stopped_weights_have_the_gradient_of_reinforce(loss_type: str, level: str, feature: str, generator: torch.Generator) -> None:
    """cispo and vespo are REINFORCE with a constant weight per token, and KL and entropy as the clip has them with A = 0."""
    batch = feature_batch(generator, feature)
    arguments = featured(batch, feature, loss_type, level)
    kept = {
        name: getattr(arguments["config"], name)
        for name in ("beta", "bias_corrected_kl", "kl_estimator", "entropy_coef", "entropy_aggregation")
    }
    loss, gradient, out = loss_and_gradient(arguments)

    mask = arguments["mask"].reshape(3, 4)
    log_ratio = torch.where(mask, (out.logprobs - arguments["old_logprobs"]).reshape(3, 4), 0)
    given = arguments.get("rollout_weights", torch.ones(3, 4, dtype=torch.float64)).reshape(3, 4)
    if loss_type == "cispo":
        mean = log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
        ratio = (log_ratio if level == "token" else mean.expand_as(log_ratio)).exp()
        assert ((ratio < CISPO_BOUND) & mask).any(), "some ratios below the bound"
        assert ((ratio > CISPO_BOUND) & mask).any(), "some ratios above it"
        weights = ratio.clamp(max=CISPO_BOUND) * given
    else:
        w = (log_ratio + torch.where(mask, given.log(), 0)).sum(1, keepdim=True).exp()
        positive = arguments["advantages"].reshape(3, 4) >= 0
        weights = torch.where(positive, w**2 * (3 - 3 * w).exp(), w**3 * (2 - 2 * w).exp())
    weights = weights.reshape_as(arguments["token_ids"])

    plain = LossConfig(loss_type="reinforce")
    surrogate = loss_and_gradient({**arguments, "config": plain, "rollout_weights": weights})
    rest = LossConfig(loss_type="dapo", importance_sampling_level=level, **kept)
    penalty = loss_and_gradient({**arguments, "config": rest, "advantages": torch.zeros_like(arguments["advantages"])})
    close(loss, surrogate[0] + penalty[0], 1e-12, "loss")
    close(gradient, surrogate[1] + penalty[1], 1e-12, "gradient")


# ---- a second derivation: loops and the math module, from the papers' formulas


def slow_token(row: list[float], token: int, temperature: float, softcap: float | None, logit_scale: float) -> tuple[float, float]:
    s = [logit_scale * z for z in row]
    s = [softcap * math.tanh(z / softcap) if softcap else z for z in s]
    s = [z / temperature for z in s]
    top = max(s)
    log_norm = top + math.log(math.fsum(math.exp(z - top) for z in s))
    log_p = [z - log_norm for z in s]
    return log_p[token], -math.fsum(math.exp(x) * x for x in log_p)


def gmpo_bound(log_ratio: float, advantage: float, config: LossConfig) -> float:
    if advantage > 0:
        return min(log_ratio, config.epsilon_high)
    return max(log_ratio, -config.epsilon_low) if advantage < 0 else log_ratio


def slow_loss(
    batch: dict[str, Any], config: LossConfig, softcap: float | None, logit_scale: float, num_items: float | None
) -> dict[str, float]:
    """Loss and metrics of a padded batch, one token after the other."""
    ids, mask = batch["token_ids"].tolist(), batch["mask"].tolist()
    old, ref, advantages = batch["old_logprobs"].tolist(), batch["ref_logprobs"].tolist(), batch["advantages"].tolist()
    rollout, temperature = batch["rollout_weights"].tolist(), batch["temperature"].tolist()
    sequences, length = len(ids), len(ids[0])
    tokens = [(b, t) for b in range(sequences) for t in range(length) if mask[b][t]]
    stats = {(b, t): slow_token(batch["logits"][b, t].tolist(), ids[b][t], temperature[b][t], softcap, logit_scale) for b, t in tokens}
    log_ratio = {(b, t): stats[b, t][0] - old[b][t] for b, t in tokens}
    size = [max(sum(row), 1) for row in mask]

    losses, kls, ratios, low, high = {}, {}, {}, 0, 0
    for b, t in tokens:
        mine = [n for n in tokens if n[0] == b]
        a, logprob = advantages[b][t], stats[b, t][0]
        w = log_ratio[b, t] if config.level == "token" else sum(log_ratio[n] for n in mine) / size[b]
        r = math.exp(w)
        ratios[b, t] = r
        if config.surrogate == "clip":
            below, above = 1 - config.epsilon_low, 1 + config.epsilon_high
            unclipped = r if config.delta is None else min(r, config.delta)
            loss = -min(unclipped * a, min(max(r, below), above) * a)
            if config.dual_clip is not None and a < 0:
                loss = min(loss, config.dual_clip * -a)
            low, high = low + (r < below and a < 0), high + (r > above and a > 0)
        elif config.surrogate == "cispo":
            loss = -max(min(r, config.epsilon_high), config.cispo_ratio_low) * a * logprob
            low, high = low + (r < config.cispo_ratio_low and a < 0), high + (r > config.epsilon_high and a > 0)
        elif config.surrogate == "gmpo":
            bounded = [gmpo_bound(log_ratio[n], advantages[n[0]][n[1]], config) for n in mine]
            loss, d = -math.exp(sum(bounded) / size[b]) * a, log_ratio[b, t]
            low, high = low + (d < -config.epsilon_low and a < 0), high + (d > config.epsilon_high and a > 0)
        elif config.surrogate == "sapo":
            tau = config.sapo_temperature_pos if a > 0 else config.sapo_temperature_neg
            loss = -(4 / tau) / (1 + math.exp(-tau * (r - 1))) * a
        elif config.surrogate == "vespo":
            k, lam = (config.vespo_k_pos, config.vespo_lambda_pos) if a >= 0 else (config.vespo_k_neg, config.vespo_lambda_neg)
            product = math.prod(math.exp(log_ratio[n]) * rollout[n[0]][n[1]] for n in mine)
            loss = -(product**k) * math.exp(lam * (1 - product)) * a * logprob
        elif config.surrogate in ("dppo_tv", "dppo_kl"):
            p, q = math.exp(logprob), math.exp(min(old[b][t], 0.0))  # no probability is above 1
            divergence = abs(p - q)
            if config.surrogate == "dppo_kl":
                divergence = q * math.log(q / p) + ((1 - q) * math.log((1 - q) / (1 - p)) if q < 1 else 0.0)
            falls, rises = a < 0 and p < q and divergence > config.dppo_mask_low, a > 0 and p > q and divergence > config.dppo_mask_high
            kept = -r * a if config.dppo_ratio_max is None else -min(r, config.dppo_ratio_max) * a * logprob
            loss = 0.0 if falls or rises else kept
            low, high = low + falls, high + rises
        else:
            loss = -a * logprob
        if config.surrogate != "vespo":
            loss *= rollout[b][t]
        d = ref[b][t] - logprob
        kls[b, t] = {"k1": -d, "k2": d * d / 2, "k3": math.exp(d) - 1 - d}[config.kl_estimator]
        losses[b, t] = loss + config.beta * kls[b, t] * (r if config.bias_corrected_kl else 1)
        losses[b, t] += config.squared_log_ratio_coef * log_ratio[b, t] ** 2

    def aggregated(x: dict[tuple[int, int], float], aggregation: str) -> float:
        per_sequence = [math.fsum(x[n] for n in tokens if n[0] == b) for b in range(sequences)]
        count = sum(any(n[0] == b for n in tokens) for b in range(sequences)) if aggregation.startswith("nonempty_") else sequences
        if aggregation.endswith("sequence_mean"):
            return math.fsum(s / n for s, n in zip(per_sequence, size, strict=True)) / count
        total = math.fsum(per_sequence)
        return (
            total
            / {
                "token_mean": len(tokens),
                "global_token_mean": num_items or len(tokens),
                "fixed_length": sequences * (config.max_completion_length or 0),
                "sequence_sum": sequences,
                "nonempty_sequence_sum": count,
            }[aggregation]
        )

    entropies = {n: stats[n][1] for n in tokens}
    loss = aggregated(losses, config.resolved_aggregation)
    entropy_aggregation = config.resolved_aggregation if config.entropy_aggregation == "same" else "token_mean"
    loss -= config.entropy_coef * aggregated(entropies, entropy_aggregation)
    n = len(tokens)
    return {
        "loss": loss,
        "kl": math.fsum(kls.values()) / n,
        "entropy": math.fsum(entropies.values()) / n,
        "ratio_mean": math.fsum(ratios.values()) / n,
        "ratio_max": max(ratios.values()),
        "clip_low": low / n,
        "clip_high": high / n,
        "clip_region": (low + high) / n,
    }


SLOW_CASES = [
    *[(name, None, {"sapo_temperature_neg": 1.25}) for name in LOSS_TYPES],
    *[("dapo", None, {"aggregation": name}) for name in AGGREGATIONS],
    *[("dapo", None, {"kl_estimator": name, "beta": 0.4}) for name in KL_ESTIMATORS],
    *[
        ("sapo", level, {"beta": 0.4, "bias_corrected_kl": True, "sapo_temperature_pos": 0.75, "sapo_temperature_neg": 1.5})
        for level in LEVELS
    ],
    *[("cispo", level, {"epsilon_high": 1.3}) for level in LEVELS],
    ("cispo", None, {"epsilon_high": 1.3, "cispo_ratio_low": 0.9, "squared_log_ratio_coef": 0.2}),
    ("gmpo", None, {"beta": 0.4, "bias_corrected_kl": True, "epsilon_low": 0.05, "epsilon_high": 0.1, "squared_log_ratio_coef": 0.2}),
    ("gspo", None, {"beta": 0.4, "bias_corrected_kl": True, "epsilon_low": 0.05, "epsilon_high": 0.02}),
    ("grpo", "sequence_token", {"beta": 0.4, "bias_corrected_kl": True, "kl_estimator": "k2", "delta": 1.4}),
    ("dr_grpo", None, {"delta": 1.4, "dual_clip": 1.3, "epsilon_high": 0.28}),
    ("vespo", None, {"beta": 0.4, "vespo_k_pos": 1.5, "vespo_lambda_pos": 0.5, "vespo_k_neg": 2.5, "vespo_lambda_neg": 1.5}),
    *[(name, None, {"beta": 0.4, "dppo_mask_low": 0.005, "dppo_mask_high": 0.003}) for name in ("dppo_tv", "dppo_kl")],
    ("dppo_tv", None, {"dppo_mask_low": 0.005, "dppo_mask_high": 0.003, "dppo_ratio_max": 1.05}),
    ("luspo", None, {"entropy_coef": 0.1}),
    ("grpo", None, {"entropy_coef": 0.1, "entropy_aggregation": "token_mean"}),
]


@pytest.mark.parametrize(("softcap", "logit_scale", "num_items"), [(None, 1.0, None), (2.5, 0.8, 29)])
@pytest.mark.parametrize(("loss_type", "level", "settings"), SLOW_CASES)
def test_equals_a_second_derivation(
    loss_type: str,
    level: str | None,
    settings: dict[str, Any],
    softcap: float | None,
    logit_scale: float,
    num_items: int | None,
    generator: torch.Generator,
) -> None:
    batch = random_batch(generator, shape=(4, 5), softcap=softcap, logit_scale=logit_scale)
    config = LossConfig(loss_type=loss_type, importance_sampling_level=level, max_completion_length=9, **settings)
    expected = slow_loss(batch, config, softcap, logit_scale, num_items)
    loss, _, out = loss_and_gradient(batch, config=config, softcap=softcap, logit_scale=logit_scale, num_items=num_items)
    close(loss, expected.pop("loss"), 1e-12, "loss")
    for name, value in expected.items():
        close(out.metrics[name], value, 1e-6, name)  # metrics are float32
    if (
        (config.surrogate == "clip" and config.level == "token")
        or settings.keys() & {"dppo_mask_low", "cispo_ratio_low"}
        or loss_type == "gmpo"
    ):
        assert expected["clip_low"] > 0, "the band must cut below"
        assert expected["clip_high"] > 0, "the band must cut above"


# ---- the same batch in another form

FORMS = [(name, None) for name in LOSS_TYPES] + [("grpo", "sequence_token"), ("cispo", "sequence"), ("dapo", "sequence_token")]


@pytest.mark.parametrize(("loss_type", "level"), FORMS)
def test_packed_equals_padded(loss_type: str, level: str | None, generator: torch.Generator) -> None:
    """Sequences of lengths 4, 2, 0 and 3, once padded with a mask and once packed without the padding."""
    batch = random_batch(generator, shape=(4, 4))
    lengths = torch.tensor([4, 2, 0, 3])
    mask = torch.arange(4) < lengths.unsqueeze(1)
    config = LossConfig(loss_type=loss_type, importance_sampling_level=level, max_completion_length=6, **EVERYTHING)
    loss, gradient, out = loss_and_gradient(batch, mask=mask, config=config)
    tight = {name: x[mask] for name, x in batch.items() if name != "mask"}
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
    packed_loss, packed_gradient, packed_out = loss_and_gradient(tight, cu_seqlens=cu_seqlens, config=config)
    close(packed_loss, loss, 1e-12, "loss")
    close(packed_gradient, gradient[mask], 1e-12, "gradient")
    assert packed_out.logprobs.shape == packed_out.entropy.shape == packed_out.active.shape == (9,)
    close(packed_out.logprobs, out.logprobs[mask], 1e-12, "logprobs")
    close(packed_out.entropy, out.entropy[mask], 1e-12, "entropy")
    for name in out.metrics:
        close(packed_out.metrics[name], out.metrics[name], 1e-6, name)


@pytest.mark.parametrize(("loss_type", "level"), FORMS)
def test_the_last_position_of_a_model_is_ignored(loss_type: str, level: str | None, generator: torch.Generator) -> None:
    batch = random_batch(generator)
    config = LossConfig(loss_type=loss_type, importance_sampling_level=level, max_completion_length=6, **EVERYTHING)
    loss, gradient, _ = loss_and_gradient(batch, config=config)
    longer = torch.cat([batch["logits"], torch.full((3, 1, 7), NAN, dtype=torch.float64)], 1)
    longer_loss, longer_gradient, _ = loss_and_gradient(batch, logits=longer, config=config)
    close(longer_loss, loss, 0, "loss")
    close(longer_gradient[:, :-1], gradient, 0, "gradient")
    close(longer_gradient[:, -1], torch.zeros(3, 7), 0, "gradient of the last position")


@pytest.mark.parametrize("extra", [{}, {"beta": 0.3}, {"entropy_coef": 0.1}], ids=["plain", "beta", "entropy"])
@pytest.mark.parametrize(("loss_type", "level"), FORMS)
def test_active_tokens_are_enough(loss_type: str, level: str | None, extra: dict[str, Any], generator: torch.Generator) -> None:
    """metrics_on="active" leaves out tokens, not loss."""
    batch = random_batch(generator)
    batch["advantages"][1] = 0.0
    config = LossConfig(loss_type=loss_type, importance_sampling_level=level, max_completion_length=6, **extra)
    loss, gradient, everything = loss_and_gradient(batch, config=config)
    active_loss, active_gradient, out = loss_and_gradient(batch, config=config, metrics_on="active")
    close(active_loss, loss, 1e-15, "loss")
    close(active_gradient, gradient, 1e-15, "gradient")
    assert torch.equal(everything.active, batch["mask"])
    assert (out.active.sum() < batch["mask"].sum()) == (not extra), "something is left out, unless every token has a KL or entropy term"
    close(out.logprobs, torch.where(out.active, everything.logprobs, 0), 0, "logprobs")
    close(out.entropy, torch.where(out.active, everything.entropy, 0), 0, "entropy")
    close(out.metrics["active_fraction"], everything.metrics["active_fraction"], 0, "the fraction does not depend on it")


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_number_a_sequence_and_a_token_mean_the_same(loss_type: str, generator: torch.Generator) -> None:
    """[B] advantages and temperatures are their expansion, a 0-d temperature is its number, and [B, 1] rollout weights are their
    expansion but for vespo, where they enter a product."""
    batch = random_batch(generator)
    config = LossConfig(loss_type=loss_type, max_completion_length=6)
    advantages, temperatures = batch["advantages"][:, 0], batch["temperature"][:, 0]
    weights = batch["rollout_weights"][:, :1]
    short = loss_and_gradient(batch, advantages=advantages, temperature=temperatures, rollout_weights=weights, config=config)
    expanded = [x.reshape(3, 1).expand(3, 4) for x in (advantages, temperatures, weights)]
    if loss_type == "vespo":
        expanded[2] = torch.ones(3, 4, dtype=torch.float64)
        expanded[2][torch.arange(2), batch["mask"][:2].int().argmax(1)] = weights[:2, 0]  # once, on a sequence's first token
    long = loss_and_gradient(batch, advantages=expanded[0], temperature=expanded[1], rollout_weights=expanded[2], config=config)
    close(short[0], long[0], 1e-14, "loss")
    close(short[1], long[1], 1e-14, "gradient")
    number = loss_and_gradient(batch, temperature=0.7, config=config)
    tensor = loss_and_gradient(batch, temperature=torch.tensor(0.7, dtype=torch.float64), config=config)
    close(number[0], tensor[0], 1e-14, "loss")
    close(number[1], tensor[1], 1e-14, "gradient")


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_without_old_logprobs_the_ratio_is_one_and_its_gradient_flows(loss_type: str, generator: torch.Generator) -> None:
    batch = random_batch(generator)
    old = gf.token_logprobs(batch["logits"], batch["token_ids"], temperature=batch["temperature"]).logprobs
    config = LossConfig(loss_type=loss_type, max_completion_length=6, **EVERYTHING)
    given, absent = loss_and_gradient(batch, old_logprobs=old, config=config), loss_and_gradient(batch, old_logprobs=None, config=config)
    close(absent[0], given[0], 1e-14, "loss")
    close(absent[1], given[1], 1e-14, "gradient")
    assert absent[1].abs().max() > 0.01
    close(absent[2].metrics["ratio_mean"], 1.0, 1e-7)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_scale_scales(loss_type: str, generator: torch.Generator) -> None:
    batch = random_batch(generator)
    config = LossConfig(loss_type=loss_type, max_completion_length=6, **EVERYTHING)
    loss, gradient, out = loss_and_gradient(batch, config=config)
    for scale in (0.25, -3.0, 0.0):
        scaled = loss_and_gradient(batch, config=config, loss_scale=scale)
        close(scaled[0], loss * scale, 1e-14, "loss")
        close(scaled[1], gradient * scale, 1e-14, "gradient")
        assert {k: v.item() for k, v in scaled[2].metrics.items()} == {k: v.item() for k, v in out.metrics.items()}


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_num_items_is_the_denominator_of_global_token_mean_and_of_nothing_else(loss_type: str, generator: torch.Generator) -> None:
    batch = random_batch(generator)
    config = LossConfig(loss_type=loss_type, max_completion_length=6)
    loss, gradient, _ = loss_and_gradient(batch, config=config)
    own = batch["mask"].sum().item()
    factor = own / 40 if LOSS_TYPES[loss_type].aggregation == "global_token_mean" else 1.0
    for num_items in (40, 40.0, torch.tensor(40), torch.tensor(40.0)):
        other = loss_and_gradient(batch, config=config, num_items=num_items)
        close(other[0], loss * factor, 1e-14, "loss")
        close(other[1], gradient * factor, 1e-14, "gradient")


def test_num_items_that_float32_does_not_hold(generator: torch.Generator) -> None:
    """A step's share of the tokens need not be a whole number."""
    batch = random_batch(generator)
    loss, _, _ = loss_and_gradient(batch, num_items=1)
    close(loss_and_gradient(batch, num_items=15.3)[0], loss / 15.3, 1e-14)


def test_num_items_makes_micro_batches_add_up(generator: torch.Generator) -> None:
    """Two halves with the whole's token count sum to the whole, though their own token counts differ."""
    batch = random_batch(generator, shape=(4, 5))
    items = batch["mask"].sum()
    assert batch["mask"][:2].sum() != batch["mask"][2:].sum()
    whole = loss_and_gradient(batch)
    halves = [loss_and_gradient({name: x[part] for name, x in batch.items()}, num_items=items) for part in (slice(2), slice(2, 4))]
    close(halves[0][0] + halves[1][0], whole[0], 1e-14, "loss")
    close(torch.cat([half[1] for half in halves]), whole[1], 1e-14, "gradient")


@pytest.mark.parametrize("no_grad", [False, True])
def test_the_value_does_not_depend_on_a_gradient(no_grad: bool, generator: torch.Generator) -> None:
    batch = random_batch(generator)
    loss, _, _ = loss_and_gradient(batch)
    logits = batch.pop("logits").requires_grad_(no_grad)
    with torch.no_grad() if no_grad else nullcontext():
        out = gf.grpo_loss(logits, batch.pop("token_ids"), batch.pop("advantages"), **batch)
    assert not out.loss.requires_grad
    close(out.loss, loss, 0)


# ---- confident tokens


@pytest.mark.parametrize("sequence_level", [False, True])
@pytest.mark.parametrize("vocabulary", [2, 5, 1500])
@pytest.mark.parametrize("margin", [10.0, 14.0, 30.0, 60.0])
@pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"),
    [
        pytest.param("reference", torch.float64, 1e-12, id="reference-float64"),
        pytest.param("reference", torch.float32, 1e-6, id="reference-float32"),
        pytest.param("cpu", torch.float32, 1e-6, id="cpu-float32", marks=needs_extension),
    ],
)
def test_confident_tokens_are_exact(
    backend: str, dtype: torch.dtype, tolerance: float, margin: float, vocabulary: int, sequence_level: bool
) -> None:
    """A target ``margin`` nats above V - 1 equal others: log p = -log1p((V - 1) e^-margin), and 1 - p = -expm1(log p).

    The plain ``s_y - lse`` is 0 here in float32 from 17 nats on, and so would be the gradient.
    """
    n = vocabulary - 1
    logprob = -math.log1p(n * math.exp(-margin))
    one_minus_p, p_other = -math.expm1(logprob), math.exp(-margin + logprob)
    logits = torch.full((1, 2, vocabulary), 3.0, dtype=dtype)
    token_ids = torch.tensor([[0, vocabulary - 1]])
    logits.scatter_(2, token_ids.unsqueeze(2), 3.0 + margin)
    logits.requires_grad_()
    config = LossConfig(loss_type="gspo" if sequence_level else "reinforce")
    with gf.use_backend(backend):
        out = gf.grpo_loss(logits, token_ids, torch.tensor([-1.0], dtype=dtype), config=config)
        statistics = gf.token_logprobs(logits, token_ids)
    assert margin < 17 or (logits.float()[0, 0, 0] - logits.float()[0, 0].logsumexp(0)) == 0, "the plain form would have lost it"
    expected = torch.full((1, 2, vocabulary), -p_other, dtype=torch.float64)
    expected.scatter_(2, token_ids.unsqueeze(2), one_minus_p)  # d log p / dz
    (of_loss,) = torch.autograd.grad(out.loss, logits)
    (of_logprobs,) = torch.autograd.grad(statistics.logprobs.sum(), logits)
    for got in (out.logprobs, statistics.logprobs):
        assert ((got.detach().double() / logprob - 1).abs() <= tolerance).all(), f"logprob {got.tolist()} against {logprob}"
    for gradient, exact in ((of_loss, expected / 2), (of_logprobs, expected)):
        error = (gradient.double() / exact - 1).abs()
        of_target = error.gather(2, token_ids.unsqueeze(2)).max().item()
        assert of_target <= tolerance, f"the target's gradient off by {of_target:.3g}, relative"
        # A backward that comes after its forward has the rounded lse to start from, 60 nats above the others: e^(60 eps) for them
        one_pass = gradient is of_loss and not sequence_level
        assert error.max() <= (tolerance if one_pass or dtype == torch.float64 else 4e-6), f"the others' off by {error.max():.3g}, relative"


@everywhere
@pytest.mark.parametrize("margin", [1e3, 1e5])
def test_a_certain_token_is_finite(backend: str, dtype: torch.dtype, tolerance: float, margin: float) -> None:
    logits = torch.tensor([[[margin, 0.0, 0.0], [0.0, 0.0, margin]]], dtype=dtype, requires_grad=True)
    config = LossConfig(entropy_coef=0.1)
    with gf.use_backend(backend):
        out = gf.grpo_loss(logits, torch.tensor([[0, 0]]), torch.tensor([1.0], dtype=dtype), config=config)
    (gradient,) = torch.autograd.grad(out.loss, logits)
    close(out.logprobs, [[0.0, -margin]], tolerance, "logprobs")
    close(out.entropy, [[0.0, 0.0]], tolerance, "entropy")
    close(gradient, [[[0.0, 0.0, 0.0], [-0.5, 0.0, 0.5]]], tolerance, "gradient")  # ratio 1, weight 1/2: -A/2 (1[v = y] - p)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        pytest.param("reference", torch.float64),
        pytest.param("reference", torch.float32),
        pytest.param("cpu", torch.float32, marks=needs_extension),
    ],
)
def test_a_large_gradient_of_an_unlikely_token_is_finite(backend: str, dtype: torch.dtype) -> None:
    """A target 59 nats below the rest, and A = -1e14: the gradient -A (1[v = y] - p) is a thing that float32 holds."""
    logits = torch.tensor([[[59.0, 0.0]]], dtype=dtype, requires_grad=True)
    with gf.use_backend(backend):
        out = gf.grpo_loss(logits, torch.tensor([[1]]), torch.tensor([-1e14], dtype=dtype))
    (gradient,) = torch.autograd.grad(out.loss, logits)
    assert ((gradient / 1e14 - torch.tensor([[[-1.0, 1.0]]])).abs() < 1e-6).all(), gradient


# ---- what must have no effect, and what must stay finite


def poisoned(batch: dict[str, Any], poison: float) -> dict[str, Any]:
    """The batch with something else under every 0 of its mask."""
    hidden = ~batch["mask"]
    out = {
        name: x.masked_fill(hidden.unsqueeze(-1) if name == "logits" else hidden, poison)
        for name, x in batch.items()
        if x.is_floating_point()
    }
    return {**batch, **out, "token_ids": batch["token_ids"].masked_fill(hidden, -100)}


BACKENDS = [
    pytest.param("reference", torch.float64, id="reference-float64"),
    pytest.param("reference", torch.float32, id="reference-float32"),
    pytest.param("cpu", torch.float32, id="cpu-float32", marks=needs_extension),
]


def cast(batch: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {name: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in batch.items()}


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
@pytest.mark.parametrize("poison", [NAN, -INF, 1e30])
@pytest.mark.parametrize(("loss_type", "level"), FORMS)
def test_masked_values_have_no_effect(
    backend: str, dtype: torch.dtype, loss_type: str, level: str | None, poison: float, generator: torch.Generator
) -> None:
    batch = cast(random_batch(generator), dtype)
    assert not batch["mask"].all()
    config = LossConfig(loss_type=loss_type, importance_sampling_level=level, max_completion_length=6, **EVERYTHING)
    with gf.use_backend(backend):
        loss, gradient, out = loss_and_gradient(batch, config=config)
        other_loss, other_gradient, other = loss_and_gradient(poisoned(batch, poison), config=config)
        statistics = gf.token_logprobs(poisoned(batch, poison)["logits"], batch["token_ids"], mask=batch["mask"])
    assert torch.equal(other_loss, loss)
    assert torch.equal(other_gradient, gradient)
    assert (other_gradient[~batch["mask"]] == 0).all()
    for name in ("logprobs", "entropy", "active"):
        assert torch.equal(getattr(other, name), getattr(out, name)), name
        assert (getattr(out, name)[~batch["mask"]] == 0).all(), name
    assert all(torch.equal(other.metrics[name], out.metrics[name]) for name in out.metrics)
    assert (statistics.logprobs[~batch["mask"]] == 0).all()
    assert (statistics.entropy[~batch["mask"]] == 0).all()


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
@pytest.mark.parametrize(("loss_type", "level"), FORMS)
def test_a_fully_masked_batch_has_no_loss(
    backend: str, dtype: torch.dtype, loss_type: str, level: str | None, generator: torch.Generator
) -> None:
    batch = cast(random_batch(generator), dtype)
    batch["mask"][:] = False
    config = LossConfig(loss_type=loss_type, importance_sampling_level=level, max_completion_length=6, **EVERYTHING)
    with gf.use_backend(backend):
        loss, gradient, out = loss_and_gradient(poisoned(batch, NAN), config=config)
    assert loss == 0
    assert (gradient == 0).all()
    assert all(value == 0 for value in out.metrics.values())


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
@pytest.mark.parametrize(("loss_type", "level"), FORMS)
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0)])
def test_an_empty_batch_has_no_loss(backend: str, dtype: torch.dtype, loss_type: str, level: str | None, shape: tuple[int, int]) -> None:
    config = LossConfig(loss_type=loss_type, importance_sampling_level=level, max_completion_length=6, entropy_coef=0.1)
    logits = torch.zeros(*shape, 5, dtype=dtype, requires_grad=True)
    ids, per_token = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=dtype)
    rows: dict[str, Any] = {"old_logprobs": per_token, "rollout_weights": per_token, "ref_logprobs": per_token}
    with gf.use_backend(backend):
        out = gf.grpo_loss(logits, ids, torch.zeros(shape[0], dtype=dtype), config=config, **rows)
        flat: dict[str, Any] = {name: x.reshape(-1)[:0] for name, x in rows.items()}
        cu_seqlens = torch.zeros(1, dtype=torch.int32)
        none = gf.grpo_loss(
            logits.reshape(-1, 5)[:0], ids.reshape(-1)[:0], per_token.reshape(-1)[:0], config=config, cu_seqlens=cu_seqlens, **flat
        )
    for result in (out, none):
        assert result.loss == 0
        assert all(value == 0 for value in result.metrics.values())
        assert torch.autograd.grad(result.loss, logits)[0].shape == logits.shape


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
@pytest.mark.parametrize("log_ratio", [200.0, -200.0])
@pytest.mark.parametrize(("loss_type", "level"), FORMS)
def test_huge_log_ratios_of_tokens_without_a_gradient(
    backend: str, dtype: torch.dtype, loss_type: str, level: str | None, log_ratio: float, generator: torch.Generator
) -> None:
    """exp(200) overflows float32, and 0 * inf is NaN. On a token with A = 0 the loss and its gradient are 0, as without the log-ratio; a
    sequence's ratio is made of all its tokens, so there the whole sequence has A = 0."""
    batch = cast(random_batch(generator), dtype)
    config = LossConfig(loss_type=loss_type, importance_sampling_level=level, max_completion_length=6)
    by_sequence = config.level != "token" or config.surrogate == "vespo"
    batch["advantages"][1] = 0.0
    still = batch["mask"] & (batch["advantages"] == 0)
    if by_sequence:
        still[0] = False
    else:
        assert still[0].any(), "in a sequence whose other tokens have an advantage"
    assert still.any()
    logprobs = gf.token_logprobs(batch["logits"], batch["token_ids"], temperature=batch["temperature"]).logprobs
    hidden = ~batch["mask"]
    old = torch.where(still | hidden, logprobs - log_ratio, batch["old_logprobs"])
    with gf.use_backend(backend):
        loss, gradient, _ = loss_and_gradient(batch, config=config)
        huge_loss, huge_gradient, out = loss_and_gradient(batch, old_logprobs=old, config=config)
    assert torch.equal(huge_loss, loss)
    assert torch.equal(huge_gradient, gradient)
    assert (huge_gradient[still | hidden] == 0).all()
    assert all(value.isfinite() for value in out.metrics.values())


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
@pytest.mark.parametrize("log_ratio", [200.0, -200.0])
@pytest.mark.parametrize(("loss_type", "level"), FORMS)
def test_huge_log_ratios_of_active_tokens_stay_finite(
    backend: str, dtype: torch.dtype, loss_type: str, level: str | None, log_ratio: float, generator: torch.Generator
) -> None:
    assert_finite_at(log_ratio, backend, dtype, loss_type, level, generator)


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
@pytest.mark.parametrize("log_ratio", [INF, -INF])
@pytest.mark.parametrize("level", ["token", "sequence", "sequence_token"])
def test_a_token_that_the_sampler_gave_no_probability_stays_finite(
    backend: str, dtype: torch.dtype, level: str, log_ratio: float, generator: torch.Generator
) -> None:
    """Its old log-probability is -inf, or so large that the difference overflows."""
    assert_finite_at(log_ratio, backend, dtype, "grpo", level, generator)


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
@pytest.mark.parametrize("log_ratio", [INF, -INF])
@pytest.mark.parametrize("loss_type", ["dppo_tv", "dppo_kl"])
def test_a_divergence_from_no_probability_stays_finite(
    backend: str, dtype: torch.dtype, loss_type: str, log_ratio: float, generator: torch.Generator
) -> None:
    assert_finite_at(log_ratio, backend, dtype, loss_type, None, generator)


@everywhere
def test_dppo_keeps_a_rare_token_that_a_ratio_would_clip(backend: str, dtype: torch.dtype, tolerance: float) -> None:
    """From 1e-5 to 1e-3 the ratio is 100 and the total variation 0.00099; from 0.99 to 0.8 they are 0.81 and 0.19."""
    logits = torch.tensor([[[math.log(1e-3 / 0.999), 0.0], [math.log(4), 0.0]]], dtype=dtype)
    old = torch.tensor([[1e-5, 0.99]], dtype=dtype).log()
    advantages = torch.tensor([[1.0, -1.0]], dtype=dtype)
    settings: dict[str, Any] = {"loss_type": "dppo_tv", "dppo_mask_low": 0.15, "dppo_mask_high": 0.15}
    with gf.use_backend(backend):
        out = gf.grpo_loss(logits, torch.zeros(1, 2, dtype=torch.int64), advantages, old_logprobs=old, config=LossConfig(**settings))
    close(out.loss, -100.0 / 2, 20 * tolerance, "the first token alone")
    assert (out.metrics["clip_low"].item(), out.metrics["clip_high"].item()) == (0.5, 0.0)


def assert_finite_at(
    log_ratio: float, backend: str, dtype: torch.dtype, loss_type: str, level: str | None, generator: torch.Generator
) -> None:
    batch = cast(random_batch(generator), dtype)
    old = batch["old_logprobs"].clone()
    old[0, :2] -= log_ratio  # an advantage of either sign
    assert batch["advantages"][0, 0] > 0 > batch["advantages"][0, 1]
    config = LossConfig(loss_type=loss_type, importance_sampling_level=level, max_completion_length=6, **EVERYTHING)
    with gf.use_backend(backend):
        loss, gradient, out = loss_and_gradient(batch, old_logprobs=old, config=config)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    assert all(value.isfinite() for value in out.metrics.values())


def suppressed(batch: dict[str, Any], left: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of -inf outside ``left`` tokens of each vocabulary of 7, the sampled one first; their ids; which they are."""
    ids = (batch["token_ids"].unsqueeze(-1) + torch.arange(left)) % 7
    allowed = torch.zeros(3, 4, 7, dtype=torch.bool).scatter_(2, ids, True)
    return batch["logits"].masked_fill(~allowed, -INF), ids, allowed


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
@pytest.mark.parametrize("left", [2, 4])
@pytest.mark.parametrize(("loss_type", "level"), FORMS)
def test_suppressed_tokens_are_none(
    backend: str, dtype: torch.dtype, loss_type: str, level: str | None, left: int, generator: torch.Generator
) -> None:
    """Logits of -inf outside the tokens that a grammar allows: as in the vocabulary of those left."""
    batch = cast(random_batch(generator), dtype)
    config = LossConfig(loss_type=loss_type, importance_sampling_level=level, max_completion_length=6, **EVERYTHING)
    logits, ids, allowed = suppressed(batch, left)
    with gf.use_backend(backend):
        loss, gradient, _ = loss_and_gradient(batch, logits=logits, config=config)
        first = torch.zeros_like(batch["token_ids"])
        small = loss_and_gradient(batch, logits=batch["logits"].gather(2, ids), token_ids=first, config=config)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    close(loss, small[0], tolerance, "loss")
    close(gradient.gather(2, ids), small[1], tolerance, "gradient")
    assert (gradient[~allowed].abs() < 1e-30).all()


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
@pytest.mark.parametrize("sequence_level", [False, True])
def test_a_token_without_alternative_is_certain(backend: str, dtype: torch.dtype, sequence_level: bool, generator: torch.Generator) -> None:
    batch = cast(random_batch(generator), dtype)
    logits, _, _ = suppressed(batch, 1)
    with gf.use_backend(backend):
        config = LossConfig(loss_type="gspo" if sequence_level else "dapo", **EVERYTHING)
        loss, gradient, out = loss_and_gradient(batch, logits=logits, config=config)
    assert loss.isfinite()
    assert (out.logprobs == 0).all()
    assert (out.entropy == 0).all()
    assert (gradient.abs() < 1e-30).all()


def test_the_helper_rejects(generator: torch.Generator) -> None:
    """A comparison that accepts everything would make this file worthless."""
    _, gradient, _ = loss_and_gradient(random_batch(generator))
    for wrong in (torch.zeros_like(gradient), 2 * gradient, gradient + 1e-9):
        with pytest.raises(AssertionError):
            close(wrong, gradient, 1e-12)
    for sizes in itertools.combinations([(2, 3), (3, 2), (6,)], 2):
        with pytest.raises(AssertionError):
            close(torch.zeros(sizes[0]), torch.zeros(sizes[1]), 1.0)
