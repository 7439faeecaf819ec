"""Corrections that depend on the current policy: the adaptive entropy bonus, and the off-policy sequence mask. Both against TRL's own."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peers import needs_trl
from trainer_cases import Scripted, config, logs, model, trainer

import grpo_fast as gf
from grpo_fast.models.batch import ForwardBatch
from grpo_fast.models.forward import ModelForward
from grpo_fast.trainer.entropy_control import EntropyControl

ADAPTIVE: dict[str, Any] = {
    "use_adaptive_entropy": True,
    "entropy_coef": 0.25,
    "entropy_coef_delta": 0.125,
    "entropy_coef_min": 0.125,
    "entropy_coef_max": 0.5,
    "entropy_target": 0.6,
}


@needs_trl
def test_the_coefficient_is_trls(tmp_path: Path) -> None:
    """The coefficient that is applied and the one that is logged, over steps below and above the target, up to both bounds."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    entropies = [0.5, 0.6, 0.5, 0.7, 0.8, 0.9, 0.9, 0.4]
    ours = EntropyControl(config(tmp_path, **ADAPTIVE))
    metrics: dict[str, Any] = {"train": {"policy_loss": [], "entropy_coef": [], "entropy": []}}
    theirs = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(num_processes=1, sync_gradients=True, gather=lambda x: x, reduce=lambda x, reduction: x),
        args=SimpleNamespace(delta=None, steps_per_generation=1, **ADAPTIVE),
        loss_type="sapo",  # the loss without metrics of its own
        importance_sampling_level="token",
        beta=0.0,
        current_gradient_accumulation_steps=1,
        entropy_coef=ADAPTIVE["entropy_coef"],
        use_adaptive_entropy=True,
        _entropy_bonus_enabled=True,
        _last_world_entropy=float("inf"),
        _entropy_window_stats=None,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        aux_loss_enabled=False,
        use_vllm=False,
        _metrics=metrics,
    )
    theirs.args.sapo_temperature_pos = theirs.args.sapo_temperature_neg = 1.0
    ones, ids = torch.ones(2, 3), torch.ones(2, 3, dtype=torch.int64)
    inputs = {"prompt_ids": ids, "prompt_mask": ids, "completion_ids": ids, "completion_mask": ids, "advantages": torch.zeros(2)}
    for entropy in entropies:
        theirs._get_per_token_logps_and_entropies = lambda *_, entropy=entropy, **__: (-ones, entropy * ones, None)
        loss = GRPOTrainer._compute_loss(theirs, theirs.model, inputs)
        assert ours.coef * entropy == pytest.approx(-loss.item(), abs=1e-6)
        ours.observe(entropy)
        assert ours._coef == metrics["train"]["entropy_coef"][-1]
    assert {0.125, 0.5} <= set(metrics["train"]["entropy_coef"])  # it was at both bounds


def test_a_run_adapts_and_resumes(tmp_path: Path) -> None:
    """The bonus reaches the loss of the next step; a checkpoint holds the coefficient, and without a bonus nothing is logged."""
    settings = {**ADAPTIVE, "entropy_target": 9.0, "max_steps": 3, "save_strategy": "steps", "save_steps": 2}
    run = trainer(tmp_path / "a", sampler=Scripted(), **settings)
    run.train()
    assert [log["entropy_coef"] for log in logs(run)] == [0.375, 0.5, 0.5]
    off = trainer(tmp_path / "b", sampler=Scripted(), **{**settings, "entropy_target": 1e-6, "save_strategy": "no"})
    off.train()
    assert [log["entropy_coef"] for log in logs(off)] == [0.125, 0.125, 0.125]
    first, second, _ = zip(logs(run), logs(off), strict=True)
    assert first[0]["loss"] == first[1]["loss"]  # no bonus in the first step
    assert second[0]["loss"] == pytest.approx(second[1]["loss"] - 0.375 * second[0]["entropy"], abs=1e-5)
    plain = trainer(tmp_path / "c", sampler=Scripted())
    plain.train()
    assert "entropy_coef" not in logs(plain)[0]
    resumed = trainer(tmp_path / "a", sampler=Scripted(), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert logs(resumed)[-1]["loss"] == logs(run)[-1]["loss"] and logs(resumed)[-1]["entropy_coef"] == 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"entropy_coef_min": 2.0}, r"entropy_coef_min is 2\.0; expected between 0 and entropy_coef_max = 1\.0"),
        ({"entropy_target": 0.0}, r"entropy_target is 0\.0; expected a finite number above 0"),
        ({"use_adaptive_entropy": True, "entropy_coef": 2.0}, r"entropy_coef is 2\.0; expected between entropy_coef_min = 0\.0"),
        ({"off_policy_mask_threshold": 0.0}, r"off_policy_mask_threshold is 0\.0; expected a number of nats per token above 0"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **settings)


@pytest.mark.parametrize("fused", [True, False])
def test_off_policy_sequences_are_masked(fused: bool) -> None:
    """Those with a negative advantage whose sampling log-probabilities exceed the current ones, by the mean over their tokens."""
    advantages = torch.tensor([-1.0, 1.0, -1.0, -0.5])
    batch = ForwardBatch([[5], [6], [7], [8]], [[9, 10], [11], [12, 13], [3]], torch.full((4,), 0.7), advantages, torch.ones(4).bool())
    forward = ModelForward(Accelerator(cpu=True), 0, fused_head=fused, off_policy_mask_threshold=0.5)
    of = model().train()
    current = forward.logprobs(of, batch, batch_size=4).logprobs
    drift = torch.tensor([0.9, 0.2, 5.0, 0.9, 0.0, -3.0])  # means 0.55, 5, 0.45, -3: only the first is masked
    batch.tokens |= {"old": current.clone(), "sampler": current + drift, "weights": torch.full((6,), 0.5)}

    def loss(**options: Any) -> gf.GRPOOutput:
        made = ModelForward(Accelerator(cpu=True), 0, fused_head=fused, **options)
        return made.loss(of, batch, config=gf.LossConfig(), num_items=6)

    out, plain = loss(off_policy_mask_threshold=0.5), loss()
    assert out.metrics["off_policy_masked"].item() == 0.25 and "off_policy_masked" not in plain.metrics
    expected = -(0.5 * torch.tensor([0.0, 0.0, 1.0, -1.0, -1.0, -0.5])).sum() / 6
    assert out.loss.item() == pytest.approx(expected.item(), abs=1e-6)
    assert plain.loss.item() == pytest.approx(expected.item() + 0.5 * 2 / 6, abs=1e-5)
    del batch.tokens["sampler"]
    batch.tokens["old"] = current + drift
    assert loss(off_policy_mask_threshold=0.5).metrics["off_policy_masked"].item() == 0.25  # measured against the old policy
    del batch.tokens["old"]
    assert loss(off_policy_mask_threshold=0.5).metrics["off_policy_masked"].item() == 0.0  # still the policy that sampled


def test_a_run_with_the_mask(tmp_path: Path) -> None:
    """In its second step the policy has moved away from the one that sampled, so that a small threshold masks, and a large one does not."""
    found = {}
    for threshold in (None, 1e-4, 50.0):
        settings = {"num_iterations": 2, "max_steps": 2, "off_policy_mask_threshold": threshold}
        run = trainer(tmp_path, sampler=Scripted(), **settings)
        run.train()
        found[threshold] = logs(run)
    assert found[1e-4][0]["off_policy_masked"] == 0.0 < found[1e-4][1]["off_policy_masked"]
    assert found[50.0][1]["loss"] == found[None][1]["loss"] != found[1e-4][1]["loss"]
