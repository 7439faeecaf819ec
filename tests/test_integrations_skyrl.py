"""SkyRL's policy losses against the arithmetic of its commit 03d74caf396591a62a53528ca9d23a51baffae3c, written out here: it cannot be
installed beside the tests."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from policy_batch import assert_same, poisoned, policy_batch, value_and_gradient
from torch import Tensor

from grpo_fast.integrations.skyrl import POLICY_LOSSES, policy_loss, register

UTILS = "skyrl.backends.skyrl_train.utils"
CONFIG = types.SimpleNamespace(
    eps_clip_low=0.1,
    eps_clip_high=0.3,
    clip_ratio_c=1.2,
    sapo=types.SimpleNamespace(tau_pos=1.0, tau_neg=1.3),
    cispo=types.SimpleNamespace(cispo_eps_clip_low=0.2, cispo_eps_clip_high=0.25, cispo_anchor="old"),
    off_policy_correction=types.SimpleNamespace(tis_ratio_type="token"),
)


def theirs(name: str, logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of each token, and which are counted as clipped."""
    if name == "gspo":
        mean = ((logprobs - old) * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
        ratio = (logprobs - logprobs.detach() + mean.detach()).clamp(max=10).exp()
    else:
        ratio = (logprobs - old).clamp(-20, 20).exp()
    if name == "sapo":
        tau = torch.where(advantages > 0, CONFIG.sapo.tau_pos, CONFIG.sapo.tau_neg)
        return -torch.sigmoid(tau * (ratio - 1)) * 4 / tau * advantages, torch.zeros_like(ratio)
    if name == "cispo":
        bounded = ratio.clamp(1 - CONFIG.cispo.cispo_eps_clip_low, 1 + CONFIG.cispo.cispo_eps_clip_high)
        return -advantages * bounded.detach() * logprobs, bounded != ratio
    one, two = ratio * advantages, ratio.clamp(1 - CONFIG.eps_clip_low, 1 + CONFIG.eps_clip_high) * advantages
    loss = -torch.min(one, two)
    if name == "dual_clip":
        loss = torch.where(advantages < 0, torch.min(-advantages * CONFIG.clip_ratio_c, loss), loss)
    return loss, two < one


def apply_off_policy_correction(
    loss: Tensor, old: Tensor, rollout: Tensor, mask: Tensor, settings: Any
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Theirs with tis_ratio_type="token", a cap of 1.1, and the second sequence filtered."""
    kept = mask * (torch.arange(len(mask)) != 1).unsqueeze(1)
    return loss * (old - rollout).exp().clamp(max=1.1), kept, {"is_ratio_mean": 0.5}


@pytest.fixture
def skyrl(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Modules under SkyRL's names with what the adapter takes of them."""
    registry: dict[str, Any] = {}
    ppo_utils = types.ModuleType(f"{UTILS}.ppo_utils")
    ppo_utils.PolicyLossRegistry = types.SimpleNamespace(register=registry.__setitem__, functions=registry)  # type: ignore[attr-defined]
    ppo_utils.reduce_loss = lambda loss, loss_mask: (loss * loss_mask).sum()  # type: ignore[attr-defined]
    correction = types.ModuleType(f"{UTILS}.off_policy_correction_utils")
    correction.apply_off_policy_correction = apply_off_policy_correction  # type: ignore[attr-defined]
    parts = UTILS.split(".")
    for i in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), types.ModuleType(".".join(parts[:i])))
    sys.modules[UTILS].ppo_utils = ppo_utils  # type: ignore[attr-defined]
    for module in (ppo_utils, correction):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return ppo_utils


@pytest.mark.parametrize("corrected", [False, True], ids=["plain", "corrected"])
@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_as_skyrls_own(name: str, corrected: bool, skyrl: Any, generator: torch.Generator) -> None:
    register()
    batch = policy_batch(generator)
    advantages, mask = batch["advantages"].unsqueeze(1).expand(6, 5) / 7, batch["mask"]

    def expected(logprobs: Tensor) -> Tensor:
        loss, _ = theirs(name, logprobs, batch["old"], advantages, mask)
        kept: Tensor = mask
        if corrected:
            loss, kept, _ = apply_off_policy_correction(loss, batch["old"], batch["ref"], mask, None)
        return (loss * kept).sum()

    given, metrics = poisoned(batch) if not corrected else batch, {}

    def ours(logprobs: Tensor) -> Tensor:
        rollout = batch["ref"] if corrected else None
        loss, found = skyrl.PolicyLossRegistry.functions[f"grpo_fast_{name}"](
            logprobs, given["old"], advantages, config=CONFIG, loss_mask=mask.float(), rollout_logprobs=rollout
        )
        metrics.update(found)
        return loss

    assert_same(value_and_gradient(ours, given["logprobs"]), value_and_gradient(expected, batch["logprobs"]), mask, 1e-6)
    clipped = (theirs(name, batch["logprobs"], batch["old"], advantages, mask)[1] * mask).sum() / mask.sum()
    assert (0 < clipped < 1) or name == "sapo"
    assert metrics == {"clip_ratio": pytest.approx(clipped.item(), abs=1e-6), **({"is_ratio_mean": 0.5} if corrected else {})}


def test_cispo_anchored_at_the_sampler(skyrl: Any, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = policy_batch(generator)
    advantages, mask = batch["advantages"].unsqueeze(1).expand(6, 5), batch["mask"]
    monkeypatch.setattr(CONFIG.cispo, "cispo_anchor", "rollout")
    with pytest.raises(ValueError, match="tis_ratio_type is 'token'"):
        policy_loss(batch["logprobs"], batch["old"], advantages, CONFIG, mask, batch["ref"], policy_loss_type="cispo")
    with pytest.raises(ValueError, match="rollout_logprobs is None"):
        policy_loss(batch["logprobs"], batch["old"], advantages, CONFIG, mask, policy_loss_type="cispo")
    monkeypatch.setattr(CONFIG.off_policy_correction, "tis_ratio_type", None)
    monkeypatch.setattr(
        sys.modules[f"{UTILS}.off_policy_correction_utils"],
        "apply_off_policy_correction",
        lambda loss, old, rollout, mask, settings: (loss, mask, {}),
    )
    found = value_and_gradient(
        lambda x: policy_loss(x, batch["old"], advantages, CONFIG, mask, batch["ref"], policy_loss_type="cispo"), batch["logprobs"]
    )
    expected = value_and_gradient(lambda x: (theirs("cispo", x, batch["ref"], advantages, mask)[0] * mask).sum(), batch["logprobs"])
    assert_same(found, expected, mask, 1e-6)


def test_another_version_is_refused(skyrl: Any) -> None:
    skyrl.reduce_loss = lambda loss, loss_mask, loss_reduction, max_seq_len: loss
    with pytest.raises(ImportError, match="expected loss, loss_mask"):
        register()


def test_an_unknown_name_is_refused() -> None:
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="policy_loss_type is 'kl_cov'"):
        policy_loss(x, x, x, CONFIG, policy_loss_type="kl_cov")
