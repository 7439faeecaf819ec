"""PolicyLoss against OpenRLHF's own class: losses, gradients and the four numbers it logs."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from peers import peer_module
from policy_batch import assert_same, poisoned, policy_batch, value_and_gradient
from torch import Tensor

from grpo_fast.integrations.openrlhf import PolicyLoss

CASES: list[dict[str, Any]] = [
    {},
    {"clip_eps_low": 0.1, "clip_eps_high": 0.3, "dual_clip": 1.25, "token_level_loss": False},
    {"policy_loss_type": "gspo", "clip_eps_low": 0.05, "clip_eps_high": 0.05},
    {"policy_loss_type": "gspo", "is_correction_level": "token"},
    {"is_correction_level": "token", "is_correction_threshold": (0.8, 1.2)},
    {"is_correction_level": "token", "is_correction_mode": "clip", "is_correction_threshold": (0.8, 1.2)},
    {"is_correction_level": "seq", "is_correction_threshold": (0.8, 1.25), "token_level_loss": False},
    {"is_correction_level": "seq", "is_correction_gating": "binary_kl", "is_correction_threshold": (0.0, 0.03)},
    {"is_correction_level": "token", "is_correction_gating": "tv", "is_correction_threshold": (0.0, 0.05)},
]


def test_the_same_arguments() -> None:
    """Names, order and defaults."""
    theirs = peer_module("openrlhf", "0.11.2", "models.loss", ("deepspeed",)).PolicyLoss

    def arguments(function: Any) -> list[tuple[str, Any]]:
        return [(name, parameter.default) for name, parameter in inspect.signature(function).parameters.items()]

    assert arguments(PolicyLoss.__init__) == arguments(theirs.__init__)
    assert arguments(PolicyLoss.forward) == arguments(theirs.forward)


@pytest.mark.parametrize("counts", [{}, {"dp_size": 2, "batch_num_tokens": 67, "global_batch_size": 24}], ids=["local", "global"])
@pytest.mark.parametrize("options", CASES, ids=lambda options: "-".join(map(str, options.values())) or "defaults")
def test_as_openrlhfs_own(options: dict[str, Any], counts: dict[str, Any], generator: torch.Generator) -> None:
    theirs = peer_module("openrlhf", "0.11.2", "models.loss", ("deepspeed",)).PolicyLoss(**options)
    batch = policy_batch(generator)
    for name in ("logprobs", "old", "ref", "weights", "entropy", "mask"):
        batch[name] = batch[name][:5]  # theirs divides 0 by 0 for a row that is masked as a whole
    advantages = batch["advantages"][:5].unsqueeze(1).expand(5, 5)
    ours = PolicyLoss(**options)
    results: dict[str, tuple[Any, ...]] = {}

    def run(module: Any, given: dict[str, Tensor], name: str) -> Any:
        def of(logprobs: Tensor) -> Tensor:
            results[name] = module(logprobs, given["old"], advantages, batch["mask"], given["ref"], **counts)
            return results[name][0]

        return value_and_gradient(of, given["logprobs"])

    expected = run(theirs, batch, "theirs")
    batch_without_shape = {name: x for name, x in batch.items() if name != "advantages"}
    assert_same(run(ours, poisoned(batch_without_shape), "ours"), expected, batch["mask"], 1e-6)
    for mine, value in zip(results["ours"][1:], results["theirs"][1:], strict=True):
        assert (mine is None) == (value is None) or options.get("policy_loss_type") == "gspo"
        if value is not None:
            assert mine.item() == pytest.approx(value.item(), rel=1e-5, abs=1e-7)
    if options.get("is_correction_level", "off") != "off" and options.get("policy_loss_type") != "gspo":
        assert 0 < results["ours"][4] < 1, "the band must filter some"


def test_a_row_that_is_masked_as_a_whole_does_not_count(generator: torch.Generator) -> None:
    batch = poisoned(policy_batch(generator))
    advantages = batch["advantages"].unsqueeze(1).expand(6, 5)
    loss = PolicyLoss(token_level_loss=False)
    whole = loss(batch["logprobs"], batch["old"], advantages, batch["mask"])[0]
    without = loss(batch["logprobs"][:5], batch["old"][:5], advantages[:5], batch["mask"][:5])[0]
    torch.testing.assert_close(whole, without)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy_loss_type": "reinforce"}, "policy_loss_type is 'reinforce'"),
        ({"dual_clip": 0.5}, "dual_clip is 0.5"),
        ({"is_correction_level": "sequence"}, "is_correction_level is 'sequence'"),
        ({"is_correction_level": "seq", "is_correction_mode": "clip"}, "is_correction_mode is 'clip'"),
        ({"is_correction_level": "token", "is_correction_gating": "tv"}, "is_correction_threshold"),
    ],
)
def test_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PolicyLoss(**options)


def test_the_sampler_is_needed() -> None:
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="rollout_log_probs is None"):
        PolicyLoss(is_correction_level="token")(x, x, x, x + 1)
