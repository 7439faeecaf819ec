"""The modules compute what the functions compute, with settings that are kept in the module."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import grpo_fast as gf


@pytest.fixture
def given(generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "hidden": torch.randn(3, 4, 6, generator=generator),
        "weight": torch.randn(19, 6, generator=generator),
        "token_ids": torch.randint(19, (3, 4), generator=generator),
        "advantages": torch.tensor([1.0, -0.5, 0.0]),
    }


def test_over_logits(given: dict[str, Tensor]) -> None:
    logits = given["hidden"] @ given["weight"].T
    config = gf.LossConfig(loss_type="grpo", beta=0.1)
    module = gf.GRPOLoss(config, temperature=0.7, softcap=5.0, logit_scale=0.5, metrics_on="active")
    ref = torch.full((3, 4), -2.0)
    ours = module(logits, given["token_ids"], given["advantages"], ref_logprobs=ref)
    expected = gf.grpo_loss(
        logits,
        given["token_ids"],
        given["advantages"],
        config=config,
        temperature=0.7,
        softcap=5.0,
        logit_scale=0.5,
        metrics_on="active",
        ref_logprobs=ref,
    )
    assert torch.equal(ours.loss, expected.loss)


def test_over_hidden_states_it_is_the_same_loss(given: dict[str, Tensor]) -> None:
    head = nn.Linear(6, 19, bias=False)
    head.weight.data = given["weight"]
    module = gf.LinearGRPOLoss(temperature=0.7)
    out = module(given["hidden"], head.weight, given["token_ids"], given["advantages"])
    out.loss.backward()
    logits = (given["hidden"] @ given["weight"].T).requires_grad_()
    expected = gf.GRPOLoss(temperature=0.7)(logits, given["token_ids"], given["advantages"])
    torch.testing.assert_close(out.loss, expected.loss)
    (gradient,) = torch.autograd.grad(expected.loss, logits)
    torch.testing.assert_close(head.weight.grad, gradient.flatten(0, 1).T @ given["hidden"].flatten(0, 1), rtol=1e-4, atol=1e-6)


def test_over_hidden_states_with_every_setting(given: dict[str, Any]) -> None:
    config = gf.LossConfig(loss_type="grpo", epsilon_low=0.01)
    settings: dict[str, Any] = {"temperature": 0.7, "softcap": 5.0, "logit_scale": 0.5, "metrics_on": "all"}
    ours = gf.LinearGRPOLoss(config, **settings)(**given, old_logprobs=torch.full((3, 4), -2.5))
    expected = gf.linear_grpo_loss(**given, old_logprobs=torch.full((3, 4), -2.5), config=config, **settings)
    assert torch.equal(ours.loss, expected.loss)
    assert torch.equal(ours.entropy, expected.entropy)
    for name, other in {"temperature": 0.9, "softcap": None, "logit_scale": 1.0, "metrics_on": "active"}.items():
        without = gf.LinearGRPOLoss(config, **{**settings, name: other})(**given, old_logprobs=torch.full((3, 4), -2.5))
        assert not torch.equal(without.entropy, expected.entropy), name


def test_the_temperature_may_change_and_a_call_goes_before_the_module(given: dict[str, Tensor]) -> None:
    logits = given["hidden"] @ given["weight"].T
    module = gf.GRPOLoss(temperature=0.5)
    module.temperature = 1.5
    hot = gf.grpo_loss(logits, given["token_ids"], given["advantages"], temperature=1.5)
    assert torch.equal(module(logits, given["token_ids"], given["advantages"]).entropy, hot.entropy)
    cold = module(logits, given["token_ids"], given["advantages"], temperature=0.5)
    assert cold.metrics["entropy"] < hot.metrics["entropy"]


@pytest.mark.parametrize("kind", [gf.GRPOLoss, gf.LinearGRPOLoss])
@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"config": "dapo"}, TypeError, "config is a str; expected a LossConfig"),
        ({"temperature": 0}, ValueError, "temperature is 0; expected a finite number > 0"),
        ({"temperature": "1"}, TypeError, "temperature is '1'"),
        ({"softcap": -1.0}, ValueError, "softcap is -1.0"),
        ({"logit_scale": 0.0}, ValueError, "logit_scale is 0.0"),
        ({"metrics_on": "some"}, ValueError, "metrics_on is 'some'; expected 'all' or 'active'"),
        ({"epsilon_high": 0.3}, TypeError, r"Loss has no argument epsilon_high; .*config=LossConfig\(epsilon_high=\.\.\.\)"),
    ],
)
def test_invalid_settings_are_rejected_at_construction(
    kind: type[nn.Module], settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        kind(**settings)


def test_no_parameters_and_a_name() -> None:
    module = nn.Sequential(gf.GRPOLoss(gf.LossConfig(loss_type="gspo")))
    assert not list(module.parameters())
    assert not module.state_dict()
    assert "loss_type='gspo'" in repr(module)
