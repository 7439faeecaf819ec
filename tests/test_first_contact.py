"""The messages for the first mistakes of a new user: misspelt names, a whole result in place of a field, a name in place of a model."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import grpo_fast as gf
from grpo_fast.ops.backends import forced, select

CPU = torch.device("cpu")
IDS = torch.tensor([[1, 2, 3], [4, 0, 6]])


@pytest.mark.parametrize(
    ("setting", "meant"),
    [
        ("epsilon", "epsilon_low and epsilon_high"),
        ("kl_coef", "beta"),
        ("epsilon_hi", "epsilon_high"),
        ("los_type", "loss_type"),
        ("temperature", "argument temperature of grpo_loss"),
        ("clip_ratio", "LossConfig.like"),
        ("xyz", "The settings are loss_type, "),
    ],
)
def test_an_unknown_setting_of_the_loss_suggests_the_right_one(setting: str, meant: str) -> None:
    given: dict[str, Any] = {setting: 0.2}
    with pytest.raises(TypeError, match=f"LossConfig has no setting '{setting}'") as caught:
        gf.LossConfig(**given)
    assert meant in str(caught.value)
    with pytest.raises(TypeError, match="has no setting"):
        replace(gf.LossConfig(), **given)


def test_the_settings_are_copied_and_pickled_as_before() -> None:
    config = gf.LossConfig(loss_type="gspo", epsilon_low=3e-4)
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == replace(config) == config


def test_the_whole_result_of_group_advantages_names_its_field() -> None:
    whole: Any = gf.group_advantages(torch.tensor([1.0, 0.0]), group_size=2)
    with pytest.raises(TypeError, match=r"advantages is a GroupAdvantages; .* Pass its field \.advantages"):
        gf.grpo_loss(torch.randn(2, 3, 7), IDS, whole)
    logprobs: Any = gf.token_logprobs(torch.randn(2, 3, 7), IDS)
    assert isinstance(logprobs.logprobs, Tensor)
    with pytest.raises(TypeError, match="old_logprobs is a TokenLogprobs"):
        gf.grpo_loss(torch.randn(2, 3, 7), IDS, torch.ones(2), old_logprobs=logprobs)


def test_a_models_name_is_not_a_model() -> None:
    name: Any = "gpt2"
    for call in (lambda: gf.linear_loss_from(name, {}, IDS, torch.ones(2)), lambda: gf.head_of(name)):
        with pytest.raises(TypeError, match=r"model is 'gpt2'; .*AutoModelForCausalLM\.from_pretrained\('gpt2'\)"):
            call()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("softcap", 1e300),
        ("logit_scale", 1e39),
        ("logit_scale", 1e-39),
        ("temperature", 1e39),
        ("temperature", 1e-39),
        ("loss_scale", 1e39),
    ],
)
def test_numbers_that_float32_does_not_hold_are_refused(name: str, value: float) -> None:
    given: dict[str, Any] = {name: value}
    with pytest.raises(ValueError, match=rf"{name} is {re.escape(str(value))}.*float32"):
        gf.grpo_loss(torch.randn(2, 3, 7), IDS, torch.ones(2), **given)


def test_a_quotient_that_float32_does_not_hold_is_refused() -> None:
    with pytest.raises(ValueError, match=r"logit_scale / temperature is 1e\+30 / 1e-30"):
        gf.token_logprobs(torch.randn(2, 3, 7), IDS, logit_scale=1e30, temperature=1e-30)


# ---- use_backend as a statement


@pytest.fixture(autouse=True)
def default_backend() -> Any:
    yield
    gf.use_backend(None)


def test_as_a_statement_it_acts_until_the_next() -> None:
    gf.use_backend("reference")
    assert forced() == select(CPU) == "reference"
    gf.use_backend(None)
    assert forced() is None


def test_in_a_with_it_acts_until_its_end_also_inside_a_statement() -> None:
    gf.use_backend("reference")
    with gf.use_backend("cpu"):
        assert select(CPU) == "cpu"
        with gf.use_backend("reference"):
            assert select(CPU) == "reference"
        assert select(CPU) == "cpu"
    assert select(CPU) == "reference"


def test_it_checks_at_the_call() -> None:
    with pytest.raises(ValueError, match="name is 'cuda'; expected one of reference, cpu, triton, or None"):
        gf.use_backend("cuda")
    assert forced() is None


def test_as_a_decorator_it_acts_in_each_call() -> None:
    @gf.use_backend("reference")
    def inside() -> str:
        return select(CPU)

    before = select(CPU)
    assert forced() is None
    assert [inside(), inside()] == ["reference", "reference"]
    assert select(CPU) == before and forced() is None


def test_an_error_inside_puts_the_backend_back() -> None:
    with pytest.raises(KeyError), gf.use_backend("reference"):
        raise KeyError
    assert forced() is None


# ---- forward-mode differentiation


CALLS: list[Callable[[Tensor], Tensor]] = [
    lambda x: gf.token_logprobs(x, IDS).logprobs,
    lambda x: gf.grpo_loss(x, IDS, torch.tensor([1.0, -1.0])).loss,
    lambda x: gf.linear_token_logprobs(x, torch.ones(7, 7), IDS).logprobs,
    lambda x: gf.linear_grpo_loss(x, torch.ones(7, 7), IDS, torch.tensor([1.0, -1.0])).loss,
]


@pytest.mark.parametrize("call", CALLS)
def test_a_forward_mode_tangent_is_an_error_and_not_a_zero(call: Callable[[Tensor], Tensor]) -> None:
    x, tangent = torch.randn(2, 3, 7), torch.randn(2, 3, 7)
    with pytest.raises(NotImplementedError, match="forward-mode tangent"):
        torch.func.jvp(call, (x,), (tangent,))
    for requires_grad in (False, True):
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode tangent"):
            call(forward_ad.make_dual(x.clone().requires_grad_(requires_grad), tangent))
        with forward_ad.dual_level():
            call(x)  # without a tangent there is no error


def test_the_reference_has_forward_derivatives() -> None:
    x, tangent = torch.randn(2, 3, 7, dtype=torch.float64), torch.randn(2, 3, 7, dtype=torch.float64)
    value, slope = torch.func.jvp(CALLS[0], (x,), (tangent,))[:2]
    step = 1e-6
    expected = (CALLS[0](x + step * tangent) - CALLS[0](x - step * tangent)) / (2 * step)
    torch.testing.assert_close(slope, expected, rtol=1e-6, atol=1e-8)
    assert slope.abs().max() > 1e-2 and value.shape == IDS.shape


# ---- rewards that cancel


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("eps", [0.0, 1e-4])
def test_rewards_that_cancel_give_advantages_of_exactly_zero(backend: str, eps: float) -> None:
    """GDPO adds up normalised rewards. Where they cancel, only roundings are left, which a division by their own std would blow up."""
    first = torch.tensor([0.1, 0.2, 0.4, 0.9, 1000.1, 1000.2, 1000.4, 1000.9], dtype=torch.float64)
    rewards = torch.stack([first, first, 1 - first], 1)
    weights = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    with gf.use_backend(backend):
        found = gf.group_advantages(rewards, group_size=4, reward_weights=weights, normalize="normalize_then_sum", eps=eps)
        assert (found.advantages == 0).all()
        weights = torch.tensor([0.1, 0.2, 0.3001], dtype=torch.float64)
        signal = gf.group_advantages(rewards, group_size=4, reward_weights=weights, normalize="normalize_then_sum", eps=eps)
    assert (signal.advantages.abs() > 1e-6).sum() >= 6  # the third of each four is the mean
