"""Properties that hold for any input: shapes, types, settings and magnitudes drawn by hypothesis, the same ones on every run."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from compare import labelled
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import grpo_fast as gf
from grpo_fast.loss.config import AGGREGATIONS, KL_ESTIMATORS, LEVELS, LOSS_TYPES, LossConfig
from grpo_fast.loss.reference import binary_kl, binary_tv
from grpo_fast.ops import extension

BACKENDS = [
    "reference",
    pytest.param("cpu", marks=pytest.mark.skipif(not extension.load(), reason=f"the extension is not loaded: {extension.status().why}")),
]
pytestmark = pytest.mark.filterwarnings("ignore:LossConfig. epsilon_high is:UserWarning")  # any bound of CISPO
on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def examples(count: int) -> Any:
    """The same examples on every machine and in every run; a function-scoped fixture is set up once for all of them."""
    return settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


# ---- what is drawn


@st.composite
def configs(draw: st.DrawFn) -> LossConfig:
    """Any member of the family, with any of its settings."""
    loss_type = draw(st.sampled_from(list(LOSS_TYPES)))
    surrogate = LOSS_TYPES[loss_type].surrogate
    epsilon_high = draw(st.sampled_from([0.0, 0.2, 0.28, 5.0]))
    clip: dict[str, Any] = {
        "delta": draw(st.sampled_from([None, epsilon_high + 1.001, epsilon_high + 3.0])),
        "dual_clip": draw(st.sampled_from([None, 1.5, 3.0])),
    }
    return LossConfig(
        loss_type=loss_type,
        epsilon_low=draw(st.sampled_from([0.0, 0.2, 1.0])),
        epsilon_high=epsilon_high,
        beta=draw(st.sampled_from([0.0, 0.04, 1.0])),
        kl_estimator=draw(st.sampled_from(KL_ESTIMATORS)),
        bias_corrected_kl=draw(st.booleans()),
        entropy_coef=draw(st.sampled_from([0.0, 0.0, 0.01, -0.1])),
        entropy_aggregation=draw(st.sampled_from(["same", "token_mean"])),
        importance_sampling_level=None
        if surrogate in ("vespo", "reinforce", "gmpo", "dppo_tv", "dppo_kl")
        else draw(st.sampled_from([None, *LEVELS])),
        aggregation=draw(st.sampled_from([None, *AGGREGATIONS])),
        log_ratio_clamp=draw(st.sampled_from([2.0, 20.0, 40.0])),
        cispo_ratio_low=min(draw(st.sampled_from([0.0, 0.9])), epsilon_high),
        squared_log_ratio_coef=draw(st.sampled_from([0.0, 0.0, 0.1])),
        dppo_ratio_max=draw(st.sampled_from([None, 1.1])),
        dppo_mask_low=draw(st.sampled_from([0.01, 0.2])),
        dppo_mask_high=draw(st.sampled_from([0.01, 0.2])),
        max_completion_length=draw(st.integers(1, 10)),
        **(clip if surrogate == "clip" else {}),
    )


@dataclass(frozen=True)
class Magnitudes:
    """How large the values of a problem are; its numbers come from torch's generator, which hypothesis only seeds."""

    logits: float
    advantages: float
    log_ratio: float
    temperature: tuple[float, float]


EXTREME = st.builds(
    Magnitudes,
    logits=st.sampled_from([0.0, 1.0, 30.0, 1e3, 1e4]),
    advantages=st.sampled_from([0.0, 1e-3, 1.0, 1e3]),
    log_ratio=st.sampled_from([0.0, 0.3, 5.0, 300.0]),
    temperature=st.sampled_from([(0.05, 0.05), (0.05, 20.0), (1.0, 1.0), (20.0, 20.0)]),
)
USUAL = st.builds(
    Magnitudes,
    logits=st.sampled_from([0.0, 1.0, 5.0]),
    advantages=st.sampled_from([1.0, 3.0]),
    log_ratio=st.sampled_from([0.1, 0.5, 2.0]),
    temperature=st.sampled_from([(0.5, 1.5), (1.0, 1.0)]),
)


@dataclass(frozen=True)
class Problem:
    """Arguments of one call, float32 but for the logits, which come in a type of their own."""

    logits: Tensor
    arguments: dict[str, Any]

    @property
    def mask(self) -> Tensor:
        mask = self.arguments["mask"]
        return torch.ones_like(self.arguments["token_ids"], dtype=torch.bool) if mask is None else mask != 0

    @property
    def config(self) -> LossConfig:
        return self.arguments["config"]

    @property
    def slope(self) -> float:
        """The largest logit_scale / temperature."""
        temperature = torch.as_tensor(self.arguments["temperature"])
        return self.arguments["logit_scale"] / temperature.min().item() if temperature.numel() else 0.0

    @property
    def entropy_terms(self) -> float:
        """The size of the terms p (log p + H), which cancel in the gradient of an entropy."""
        return abs(self.config.entropy_coef) * self.slope

    @property
    def rounding(self) -> float:
        """What float32 makes of a log-sum-exp as large as the scaled logits, relative to a probability."""
        return 2.0**-22 * (8 + self.slope * (self.logits.abs().amax().item() if self.logits.numel() else 0.0))

    def run(self, backend: str, **changes: Any) -> tuple[gf.GRPOOutput, Tensor]:
        """The output, and the gradient of the logits."""
        arguments = {**self.arguments, **changes}
        logits = arguments.pop("logits", self.logits).detach().clone().requires_grad_()
        with gf.use_backend(backend):
            out = gf.grpo_loss(logits, **arguments)
            (gradient,) = torch.autograd.grad(out.loss, logits)
        assert gradient.dtype == logits.dtype
        return out, gradient

    def double(self) -> dict[str, Any]:
        """The changes that make the reference compute in float64 from the same numbers."""
        tensors = {name: x.double() for name, x in self.arguments.items() if isinstance(x, Tensor) and x.is_floating_point()}
        return {**tensors, "logits": self.logits.double()}


@st.composite
def problems(
    draw: st.DrawFn,
    magnitudes: st.SearchStrategy[Magnitudes],
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    softcaps: bool = True,
    padded: bool = False,
) -> Problem:
    b, t, vocabulary = draw(st.integers(0, 4)), draw(st.integers(0, 6)), draw(st.integers(2, 70))
    size, generator = draw(magnitudes), torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from(dtypes))

    def uniform(low: float, high: float, *sizes: int) -> Tensor:
        return low + (high - low) * torch.rand(sizes, generator=generator)

    longer = draw(st.booleans())
    logits = uniform(-size.logits, size.logits, b, t + longer, vocabulary).to(dtype)
    scoring: dict[str, Any] = {
        "temperature": draw(
            st.sampled_from(
                [
                    uniform(*size.temperature, 1).item(),
                    uniform(*size.temperature, 1).squeeze(),
                    uniform(*size.temperature, b),
                    uniform(*size.temperature, b, t),
                ]
            )
        ),
        "softcap": draw(st.sampled_from([None, 30.0, 1.5])) if softcaps else None,
        "logit_scale": draw(st.sampled_from([1.0, 1.0, 0.0625, 4.0])),
    }
    token_ids = torch.randint(vocabulary, (b, t), generator=generator)
    if draw(st.booleans()):  # the likeliest token: a confident one where the logits are large
        token_ids = logits[:, :t].argmax(-1)
    with gf.use_backend("reference"):
        logprobs = gf.token_logprobs(logits, token_ids, **scoring).logprobs

    def near(x: Tensor) -> Tensor:
        return x + uniform(-size.log_ratio, size.log_ratio, b, t)

    mask = uniform(0, 1, b, t) < draw(st.sampled_from([0.0, 0.5, 0.9]))
    advantages = uniform(-size.advantages, size.advantages, b, t)
    advantages = advantages * (uniform(0, 1, b, t) < 0.8)
    arguments = {
        **scoring,
        "token_ids": token_ids,
        "advantages": advantages if draw(st.booleans()) else advantages.sum(1),
        "config": draw(configs()),
        "old_logprobs": draw(st.sampled_from([None, near(logprobs), near(logprobs)])),
        "ref_logprobs": near(logprobs),
        "mask": draw(st.sampled_from([None, mask, mask.float()])),
        "rollout_weights": draw(st.sampled_from([None, uniform(0, 3, b, t), uniform(0, 3, b, 1)])),
        "num_items": draw(st.sampled_from([None, 1, 37])),
        "loss_scale": draw(st.sampled_from([1.0, 0.125])),
        "metrics_on": draw(st.sampled_from(["all", "active"])),
    }
    if padded or draw(st.booleans()):
        return Problem(logits, arguments)
    per_token = {}
    for name, x in arguments.items():
        if not isinstance(x, Tensor) or x.dim() == 0:
            per_token[name] = x
        else:
            per_token[name] = (x.unsqueeze(1) if x.dim() == 1 else x).expand(b, t).reshape(-1)
    cu_seqlens = torch.arange(b + 1, dtype=torch.int32) * t
    return Problem(logits[:, :t].reshape(b * t, vocabulary), {**per_token, "cu_seqlens": cu_seqlens})


# ---- properties


@on_every_backend
@given(problem=problems(EXTREME))
@examples(120)
def test_finite_in_finite_out(backend: str, problem: Problem) -> None:
    """Loss, gradient, log-probabilities, entropies and metrics, with logits to ±1e4, log-ratios to ±300, advantages to ±1e3."""
    out, gradient = problem.run(backend)
    assert out.loss.isfinite()
    assert out.loss.dtype == torch.float32
    for name in ("logprobs", "entropy"):
        x = getattr(out, name)
        assert x.isfinite().all(), name
        assert x.shape == problem.arguments["token_ids"].shape
        assert (x[~out.active] == 0).all(), name
    assert (out.logprobs <= 0).all()
    assert (out.entropy >= -problem.rounding).all()
    for name, value in out.metrics.items():
        assert value.isfinite(), name
        assert value.dtype == torch.float32
        assert value.dim() == 0
    for name in ("clip_low", "clip_high", "clip_region", "active_fraction"):
        assert 0 <= out.metrics[name] <= 1, name
    if problem.logits.dtype == torch.float16:  # whose largest number is 65504: a gradient beyond is infinite, and never NaN
        assert not gradient.isnan().any()
    else:
        assert gradient.isfinite().all()


@on_every_backend
@given(problem=problems(EXTREME))
@examples(60)
def test_masked_and_inactive_tokens_have_no_gradient(backend: str, problem: Problem) -> None:
    """Exactly 0 on masked tokens, on the position after the last token, and on tokens that are not active."""
    out, gradient = problem.run(backend, metrics_on="active")
    length = problem.arguments["token_ids"].shape[-1]
    assert (out.active <= problem.mask).all()
    tokens = gradient if gradient.dim() == 2 else gradient[:, :length]
    assert (tokens[~out.active] == 0).all()
    assert gradient.dim() == 2 or (gradient[:, length:] == 0).all()


@on_every_backend
@given(problem=problems(EXTREME))
@examples(60)
def test_tokens_that_are_not_active_have_no_gradient_either_way(backend: str, problem: Problem) -> None:
    """metrics_on chooses what is computed, and does not change the loss or its gradient."""
    everything, gradient = problem.run(backend, metrics_on="all")
    active, same = problem.run(backend, metrics_on="active")
    assert torch.equal(everything.active, problem.mask)
    assert torch.equal(everything.metrics["active_fraction"], active.metrics["active_fraction"])
    assert torch.equal(gradient, same)
    torch.testing.assert_close(active.loss, everything.loss, rtol=1e-5, atol=1e-6 * (1 + everything.loss.abs().item()))


@on_every_backend
@given(problem=problems(EXTREME, dtypes=(torch.float32,), softcaps=False))
@examples(60)
def test_gradient_rows_sum_to_zero(backend: str, problem: Problem) -> None:
    """Adding a number to all logits changes no probability and no entropy. With a soft cap it would."""
    out, gradient = problem.run(backend)
    assume(out.logprobs.numel() > 0)
    largest = gradient.double().abs().amax(-1)
    allowed = problem.rounding * (largest * gradient.shape[-1] ** 0.5 + problem.entropy_terms)
    assert (gradient.double().sum(-1).abs() <= allowed + 1e-30).all()


@on_every_backend
@given(problem=problems(USUAL, padded=True), data=st.data())
@examples(60)
def test_the_order_of_the_sequences_does_not_matter(backend: str, problem: Problem, data: st.DataObject) -> None:
    count = problem.arguments["token_ids"].shape[0]
    order = torch.tensor(data.draw(st.permutations(range(count))), dtype=torch.int64)
    out, gradient = problem.run(backend)
    moved = {name: x[order] for name, x in problem.arguments.items() if isinstance(x, Tensor) and x.dim() > 0}
    other, other_gradient = problem.run(backend, logits=problem.logits[order], **moved)
    assert torch.equal(other_gradient, gradient[order])
    for name in ("logprobs", "entropy", "active"):
        assert torch.equal(getattr(other, name), getattr(out, name)[order]), name
    torch.testing.assert_close(other.loss, out.loss, rtol=1e-5, atol=1e-5)


@on_every_backend
@given(problem=problems(USUAL, dtypes=(torch.float32,), softcaps=False), shift=st.sampled_from([-512.0, -3.0, 1.0, 64.0]))
@examples(60)
def test_a_constant_added_to_a_row_changes_nothing(backend: str, problem: Problem, shift: float) -> None:
    logits = (problem.logits * 64).round() / 64  # so that the sum is exact
    out, gradient = problem.run(backend, logits=logits)
    other, other_gradient = problem.run(backend, logits=logits + shift)
    assert torch.equal((logits + shift) - shift, logits)
    shifted = dataclasses.replace(problem, logits=logits + shift)
    two_passes = problem.config.level != "token" or problem.config.surrogate == "vespo"
    slack = 4 * shifted.rounding if two_passes or backend == "reference" else 2e-6  # one pass never holds a number as large as the shift
    scale = gradient.abs().amax().item() if gradient.numel() else 0.0
    torch.testing.assert_close(other.logprobs, out.logprobs, rtol=slack, atol=slack)
    torch.testing.assert_close(other.entropy, out.entropy, rtol=slack, atol=10 * slack)
    torch.testing.assert_close(other_gradient, gradient, rtol=0, atol=10 * slack * (scale + problem.entropy_terms))


@on_every_backend
@given(problem=problems(USUAL))
@examples(150)
def test_against_the_reference_in_float64(backend: str, problem: Problem) -> None:
    """Within the rounding of the logits' type where it is stored, and a few float32 ulps of the arithmetic before."""
    out, gradient = problem.run(backend)
    truth, true_gradient = problem.run("reference", **problem.double())
    assume(away_from_the_corners(truth, problem))
    for name, tolerance in (("logprobs", 4e-6), ("entropy", 1e-5)):
        torch.testing.assert_close(getattr(out, name).double(), getattr(truth, name), rtol=tolerance, atol=tolerance, msg=labelled(name))
    assert torch.equal(out.active, truth.active)
    for name in out.metrics:
        torch.testing.assert_close(out.metrics[name], truth.metrics[name], rtol=1e-4, atol=1e-5, msg=labelled(name))
    scale = true_gradient.abs().amax().item() if true_gradient.numel() else 0.0
    rounding = torch.finfo(problem.logits.dtype).eps / 2
    allowed = 1.01 * rounding * true_gradient.abs() + 4e-5 * scale + 3e-7
    if problem.arguments["softcap"] is not None and out.logprobs.numel():  # its derivative 1 - (f / c)^2 cancels where it saturates
        allowed = allowed + 3e-7 * problem.slope * problem.arguments["advantages"].abs().amax().item()
    error = (gradient.double() - true_gradient).abs()
    assert (error <= allowed).all(), f"gradient off by {error.max():.3g} of {scale:.3g}"
    # The terms of the loss may cancel; the gradient's sum of magnitudes is of their size
    size = truth.loss.abs().item() + true_gradient.abs().sum().item() + truth.entropy.abs().sum().item()
    torch.testing.assert_close(out.loss.double(), truth.loss, rtol=0, atol=2e-5 * size + 1e-7)


def away_from_the_corners(truth: gf.GRPOOutput, problem: Problem) -> bool:
    """Whether float32 sees the same side of every clip: the gradient jumps there, and 1e-6 of a ratio may decide."""
    config, arguments = problem.config, problem.arguments
    if arguments["old_logprobs"] is None:
        corners = {config.epsilon_low, config.epsilon_high}
        return 0.0 not in corners  # on-policy the ratio is 1
    log_ratio = torch.where(truth.active, truth.logprobs - arguments["old_logprobs"].double(), 0.0)
    if config.surrogate == "gmpo":
        bounds = torch.tensor([-config.epsilon_low, config.epsilon_high])
        return bool(((log_ratio.unsqueeze(-1) - bounds).abs() > 1e-5).all())
    if config.level != "token":
        if log_ratio.dim() == 1:
            return config.surrogate != "clip" or not truth.active.any() or config.epsilon_low * config.epsilon_high > 0
        log_ratio = log_ratio.sum(-1) / truth.active.sum(-1).clamp(min=1)
    if config.surrogate in ("dppo_tv", "dppo_kl"):
        logprobs = torch.where(truth.active, truth.logprobs, -1.0)
        divergence = (binary_tv if config.surrogate == "dppo_tv" else binary_kl)(logprobs, (logprobs - log_ratio).clamp(max=0))
        if config.dppo_ratio_max is not None and bool(((log_ratio.exp() - config.dppo_ratio_max).abs() < 1e-5).any()):
            return False
        return all(bool(((divergence - mask).abs() > 1e-5).all()) for mask in (config.dppo_mask_low, config.dppo_mask_high))
    ratio = log_ratio.exp()
    bounds = torch.tensor(
        [
            1 - config.epsilon_low,
            1 + config.epsilon_high,
            config.epsilon_high,
            config.cispo_ratio_low,
            config.delta or 9e9,
            config.dual_clip or 9e9,
        ]
    )
    return bool(((ratio.unsqueeze(-1) - bounds).abs() > 1e-5).all())


def test_the_properties_can_fail() -> None:
    """The comparison above rejects a gradient that is wrong by a part in a thousand, zeroed or doubled."""
    generator = torch.Generator().manual_seed(0)
    logits, ids = torch.randn(2, 3, 9, generator=generator), torch.randint(9, (2, 3), generator=generator)
    advantages = torch.tensor([1.0, -1.0])
    problem = Problem(logits, {"token_ids": ids, "advantages": advantages, "config": LossConfig(), "mask": None, "temperature": 1.0})
    _, truth = problem.run("reference", **problem.double())
    for wrong in (truth * 1.001, torch.zeros_like(truth), truth * 2):
        assert ((wrong - truth).abs() > 4e-5 * truth.abs().amax() + 2.0**-24 * truth.abs() + 3e-7).any()
    masked = dataclasses.replace(problem, arguments={**problem.arguments, "mask": torch.tensor([[1, 1, 0], [1, 0, 0]])})
    assert not torch.equal(masked.run("reference")[1], problem.run("reference")[1])
