"""The losses of verl's registry, with verl's own denominators, and its linear_cross_entropy, against verl's own functions."""

from __future__ import annotations

import importlib.metadata
import sys
import types
from pathlib import Path
from typing import Any
from unittest import mock

import numpy
import pytest
import torch
from peers import peer_module
from policy_batch import assert_same, poisoned, policy_batch, value_and_gradient
from ranks import Start, run_together
from torch import Tensor

import grpo_fast as gf
from grpo_fast.integrations import verl as adapter
from grpo_fast.loss.config import LossConfig

AGGREGATIONS = ("token-mean", "token-sum", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")
GLOBAL: dict[str, Any] = {"dp_size": 2, "batch_num_tokens": 67, "global_batch_size": 24, "loss_scale_factor": 11}


@pytest.fixture
def core() -> Any:
    return peer_module("verl", "0.9.1", "trainer.ppo.core_algos", ("omegaconf", "tensordict", "verl.trainer.config", "verl.workers.config"))


def actor_config(core: Any, info: dict[str, Any], **options: Any) -> Any:
    class ActorConfig(core.ActorConfig):
        def get(self, name: str, default: Any) -> Any:
            return getattr(self, name, default)

    config = ActorConfig()
    defaults = {"clip_ratio": 0.2, "clip_ratio_low": None, "clip_ratio_high": None, "clip_ratio_c": 3.0, "tau_pos": 1.0, "tau_neg": 1.05}
    for name, value in {**defaults, "global_batch_info": info, **options}.items():
        setattr(config, name, value)
    return config


@pytest.mark.parametrize("info", [{}, GLOBAL], ids=["local", "global"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("vanilla", {"clip_ratio_c": 1.25}),
        ("gspo", {"clip_ratio": 0.05}),
        ("sapo", {"tau_neg": 1.4}),
        ("cispo", {"clip_ratio_low": 0.1, "clip_ratio_high": 0.2}),
        ("gpg", {}),
    ],
)
def test_as_verls_own(
    mode: str, options: dict[str, Any], aggregation: str, info: dict[str, Any], core: Any, generator: torch.Generator
) -> None:
    batch = policy_batch(generator)
    config = actor_config(core, info, **options)
    advantages = batch["advantages"].unsqueeze(1).expand(6, 5)
    metrics = {}

    def run(loss: Any, given: dict[str, Tensor], name: str) -> Any:
        def of(logprobs: Tensor) -> Tensor:
            value, metrics[name] = loss(
                old_log_prob=given["old"],
                log_prob=logprobs,
                advantages=advantages,
                response_mask=batch["mask"],
                loss_agg_mode=aggregation,
                config=config,
                rollout_is_weights=given["weights"],
            )
            return value

        return value_and_gradient(of, given["logprobs"])

    theirs = run(core.get_policy_loss_fn(mode), batch, "theirs")
    ours = run(lambda **inputs: adapter.policy_loss(**inputs, loss_mode=mode), poisoned(batch), "ours")
    assert_same(ours, theirs, batch["mask"], 1e-6)
    assert metrics["ours"] == {name: pytest.approx(value, rel=1e-5, abs=1e-6) for name, value in metrics["theirs"].items()}


@pytest.mark.parametrize(("low", "high"), [(0.003, 0.01), (0.01, 0.02)])
@pytest.mark.parametrize("loss_type", ["dppo_tv", "dppo_kl"])
def test_dppo_has_the_gradient_of_verls_own(loss_type: str, low: float, high: float, core: Any, generator: torch.Generator) -> None:
    """In float64. The values differ: verl's is -sg(r) A log p, and ours is the paper's -r A."""
    logits = 1.5 * torch.randn(4, 6, 9, generator=generator, dtype=torch.float64)
    ids = torch.randint(9, (4, 6), generator=generator)
    advantages = torch.randn(4, generator=generator, dtype=torch.float64)
    noise = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    logprobs = logits.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    old = (logprobs + 0.5 * noise).clamp(max=-0.01)
    options = {"clip_ratio_low": low, "clip_ratio_high": high, "clip_ratio_c": 1e4}
    metrics: dict[str, float] = {}

    def theirs(z: Tensor) -> Tensor:
        of_tokens = z.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
        arguments = (old, of_tokens, advantages.unsqueeze(1).expand(4, 6), torch.ones(4, 6, dtype=torch.float64))
        value, found = core.get_policy_loss_fn(loss_type)(*arguments, "token-mean", actor_config(core, {}, **options), None)
        metrics.update(found)
        return value

    config = LossConfig(loss_type, dppo_mask_low=low, dppo_mask_high=high)
    outputs = []

    def ours(z: Tensor) -> Tensor:
        outputs.append(gf.grpo_loss(z, ids, advantages, config=config, old_logprobs=old))
        return outputs[-1].loss

    (gradient,), (expected,) = (torch.autograd.grad(loss(z), z) for loss in (ours, theirs) for z in [logits.clone().requires_grad_()])
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-14)
    dropped = outputs[0].metrics["clip_region"].item()
    assert 0 < dropped < 1 and dropped == pytest.approx(metrics["actor/pg_clipfrac"], abs=1e-6)


def test_registered_by_the_plugin_that_verl_finds(core: Any) -> None:
    (plugin,) = importlib.metadata.entry_points(group="verl.plugins", name="grpo_fast")
    module = types.ModuleType("verl.trainer.ppo.core_algos")
    module.register_policy_loss, module.register_adv_est = core.register_policy_loss, core.register_adv_est  # type: ignore[attr-defined]
    names = ("verl", "verl.trainer", "verl.trainer.ppo")
    with mock.patch.dict(sys.modules, {**{name: types.ModuleType(name) for name in names}, module.__name__: module}):
        sys.modules.pop("grpo_fast.integrations.verl_plugin", None)
        plugin.load()
    assert {f"grpo_fast_{mode}" for mode in adapter.LOSS_MODES} <= set(core.POLICY_LOSS_REGISTRY)
    assert core.get_adv_estimator_fn("grpo_fast") is adapter.group_relative_advantages
    loss = core.get_policy_loss_fn("grpo_fast_vespo")
    value, metrics = loss(
        torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2, 3), torch.ones(2, 3), config=actor_config(core, {}), rollout_is_weights=None
    )
    assert value.item() == 0.0
    assert set(metrics) == {"actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower"}


def test_a_missing_count_is_named(core: Any) -> None:
    zeros = torch.zeros(2, 3)
    for aggregation, name in (("token-mean", "batch_num_tokens"), ("seq-mean-token-sum", "global_batch_size")):
        with pytest.raises(ValueError, match=name):
            adapter.policy_loss(zeros, zeros, zeros, zeros + 1, aggregation, actor_config(core, {"dp_size": 2}))
    with pytest.raises(ValueError, match="loss_agg_mode is 'mean'"):
        adapter.policy_loss(zeros, zeros, zeros, zeros + 1, "mean", actor_config(core, {}))


@pytest.mark.parametrize("by_std", [True, False])
def test_advantages(by_std: bool, core: Any, generator: torch.Generator) -> None:
    """Of groups whose responses are not side by side."""
    index: Any = numpy.array([f"prompt-{i * 5 % 3}" for i in range(12)], dtype=object)
    rewards = torch.zeros(12, 4)
    rewards[:, -1] = torch.rand(12, generator=generator)
    mask = (torch.rand(12, 4, generator=generator) > 0.3).float()
    config = types.SimpleNamespace(norm_adv_by_std_in_grpo=by_std)
    theirs, _ = core.compute_grpo_outcome_advantage(rewards.clone(), mask, index, norm_adv_by_std_in_grpo=by_std, config=config)
    ours, returns = adapter.group_relative_advantages(rewards, mask, index, config=config)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert returns is ours
    equal = torch.full_like(rewards, 0.7 / 4)
    assert (adapter.group_relative_advantages(equal, mask, index, config=config)[0] == 0).all()


def test_linear_cross_entropy(generator: torch.Generator) -> None:
    fused = peer_module("verl", "0.9.1", "utils.experimental.torch_functional").FusedLinearForPPO()
    hidden = torch.randn(2, 5, 12, generator=generator)
    weight = torch.randn(37, 12, generator=generator)
    labels = torch.randint(37, (2, 5), generator=generator)
    upstream = torch.randn(2, 10, generator=generator)
    results = []
    for function in (fused, adapter.linear_cross_entropy):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        logprobs, entropy = function(leaves[0], leaves[1], labels, 0.7)
        assert logprobs.dtype == torch.float32
        total = (logprobs.flatten() * upstream[0]).sum() + (entropy.flatten() * upstream[1]).sum()
        results.append((logprobs.flatten(), entropy.flatten(), *torch.autograd.grad(total, leaves)))
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_which_heads_of_verl_round_the_logits_to_bfloat16(generator: torch.Generator) -> None:
    """Its PyTorch head does. The adapter keeps them in float32, as the Triton kernel that it replaces."""
    fused = peer_module("verl", "0.9.1", "utils.experimental.torch_functional").FusedLinearForPPO()
    hidden = torch.randn(40, 64, generator=generator).bfloat16()
    weight = (torch.randn(500, 64, generator=generator) / 4).bfloat16()
    labels = torch.randint(500, (40,), generator=generator)
    exact = (hidden.double() @ weight.double().T).log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
    of_adapter = adapter.linear_cross_entropy(hidden, weight, labels)[0]
    assert (of_adapter - exact).abs().max() < 1e-5
    theirs = fused(hidden, weight, labels, 1.0)[0]
    assert (theirs - exact).abs().max() > 1e-3
    rounded = gf.linear_token_logprobs(hidden, weight, labels, logits_dtype="input").logprobs
    torch.testing.assert_close(theirs, rounded, rtol=1e-5, atol=1e-5)


def test_a_temperature_per_sample(generator: torch.Generator) -> None:
    """Which verl's fused kernels refuse: a row at its own temperature is that row alone."""
    hidden, weight = torch.randn(2, 5, 12, generator=generator), torch.randn(37, 12, generator=generator)
    labels = torch.randint(37, (2, 5), generator=generator)
    logprobs, entropy = adapter.linear_cross_entropy(hidden, weight, labels, torch.tensor([0.5, 1.3]))
    for row, temperature in enumerate((0.5, 1.3)):
        alone = adapter.linear_cross_entropy(hidden[row], weight, labels[row], temperature)
        torch.testing.assert_close(logprobs.view(2, 5)[row], alone[0])
        torch.testing.assert_close(entropy.view(2, 5)[row], alone[1])
    with pytest.raises(ValueError, match="reduction is 'mean'"):
        adapter.linear_cross_entropy(hidden, weight, labels, 1.0, "mean")


def test_a_vocabulary_divided_between_two_processes(tmp_path: Path) -> None:
    run_together(Path(__file__).with_name("verl_ranks.py"), [Start([str(rank), str(tmp_path / "group")]) for rank in range(2)])
