"""prime-rl's custom loss against the arithmetic of its commit 6deea6385bf07cd86017a34ae1729e49902ddef1, written out here: it cannot be
installed beside the tests."""

from __future__ import annotations

import sys
import types
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from policy_batch import assert_same, policy_batch, value_and_gradient
from torch import Tensor

from grpo_fast.integrations.prime_rl import policy_loss


@dataclass
class LossInputs:
    """Theirs, of one sequence: each [T]."""

    trainer_logprobs: Tensor
    inference_logprobs: Tensor
    teacher_logprobs: Tensor | None
    advantages: Tensor
    loss_mask: Tensor


@dataclass
class LaterLossInputs(LossInputs):
    ref_logprobs: Tensor | None = None
    loss_weights: Tensor | None = None


@dataclass
class LossOutputs:
    loss: Tensor
    metrics: dict[str, Tensor]


@pytest.fixture(autouse=True)
def prime_rl(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules under prime-rl's names with what the adapter takes of them."""
    for name in ("prime_rl", "prime_rl.trainer", "prime_rl.trainer.rl", "prime_rl.trainer.rl.loss"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["prime_rl.trainer.rl.loss"].LossOutputs = LossOutputs  # type: ignore[attr-defined]


def total(batch: dict[str, Tensor], logprobs: Tensor, make: Any, loss_scale: int, **kwargs: Any) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Their compute_loss: a call for each sequence, the sum over the scale."""
    lengths = [5, 5, 5, 5, 5, 0]  # of which a mask leaves some out; and an empty one
    outputs = [policy_loss(make(row, logprobs[row, :length], length), **kwargs) for row, length in enumerate(lengths)]
    assert all(isinstance(output, LossOutputs) for output in outputs)
    return sum(output.loss for output in outputs) / loss_scale, [output.metrics for output in outputs]


def inputs_of(batch: dict[str, Tensor], kind: type[LossInputs] = LossInputs, **more: Tensor) -> Any:
    def make(row: int, logprobs: Tensor, length: int) -> LossInputs:
        advantages = batch["advantages"][row].expand(length)
        given = {name: x[row, :length] for name, x in more.items()}
        return kind(logprobs, batch["old"][row, :length], None, advantages, batch["mask"][row, :length], **given)

    return make


def test_the_clipped_loss_of_their_guide(generator: torch.Generator) -> None:
    batch = policy_batch(generator)
    a, mask = batch["advantages"].unsqueeze(1), batch["mask"]

    def theirs(logprobs: Tensor) -> Tensor:
        ratio = (logprobs - batch["old"]).exp()
        return (-torch.min(ratio * a, ratio.clamp(0.8, 1.2) * a) * mask).sum() / 19

    def ours(logprobs: Tensor) -> Tensor:
        loss, metrics = total(batch, logprobs, inputs_of(batch), 19)
        assert all(value.dim() == 0 for found in metrics for value in found.values())
        assert 0 < sum(found["clip_region"].item() for found in metrics) < 6
        return loss

    assert_same(value_and_gradient(ours, batch["logprobs"]), value_and_gradient(theirs, batch["logprobs"]), mask, 1e-6)


def test_sequence_ratio_weights_and_reference(generator: torch.Generator) -> None:
    batch = policy_batch(generator)
    a, mask, weights = batch["advantages"].unsqueeze(1), batch["mask"], batch["weights"]

    def weighted(logprobs: Tensor) -> Tensor:
        ratio = (logprobs - batch["old"]).exp()
        return (-ratio.clamp(max=1.3).detach() * a * logprobs * weights * mask).sum()

    make = inputs_of(batch, LaterLossInputs, loss_weights=weights)
    found = value_and_gradient(lambda x: total(batch, x, make, 1, loss_type="cispo", epsilon_high=1.3), batch["logprobs"])
    assert_same(found, value_and_gradient(weighted, batch["logprobs"]), mask, 1e-6)

    def by_sequence(logprobs: Tensor) -> Tensor:
        lengths = mask.sum(-1, keepdim=True).clamp(min=1)
        ratio = (((logprobs - batch["old"]) * mask).sum(-1, keepdim=True) / lengths).exp()
        token = -torch.min(ratio * a, ratio.clamp(0.9, 1.1) * a).expand(6, 5)
        d = batch["ref"] - logprobs
        return ((token + 0.1 * (d.exp() - d - 1)) * mask / lengths).sum()

    make = inputs_of(batch, LaterLossInputs, ref_logprobs=batch["ref"])
    options = {"loss_type": "gspo", "epsilon_low": 0.1, "epsilon_high": 0.1, "beta": 0.1, "aggregation": "sequence_mean"}
    found = value_and_gradient(lambda x: total(batch, x, make, 1, **options), batch["logprobs"])
    assert_same(found, value_and_gradient(by_sequence, batch["logprobs"]), mask, 1e-6)


def test_inputs_that_are_not_known_are_refused(generator: torch.Generator) -> None:
    @dataclass
    class NewerLossInputs(LossInputs):
        staleness: Tensor | None = None

    batch = policy_batch(generator)
    make = inputs_of(batch, NewerLossInputs)
    assert policy_loss(make(0, batch["logprobs"][0], 5)).loss.isfinite()
    with pytest.raises(ImportError, match=r"LossInputs has staleness; expected nothing but advantages, inference_logprobs"):
        policy_loss(inputs_of(batch, NewerLossInputs, staleness=batch["ref"])(0, batch["logprobs"][0], 5))
    taught = inputs_of(batch)(0, batch["logprobs"][0], 5)
    taught.teacher_logprobs = batch["ref"][0]
    with pytest.raises(ImportError, match="LossInputs has teacher_logprobs"):
        policy_loss(taught)


def test_refused_by_name(generator: torch.Generator) -> None:
    batch = policy_batch(generator)
    given = inputs_of(batch)(0, batch["logprobs"][0], 5)
    with pytest.raises(ValueError, match="entropy_coef is"):
        policy_loss(given, entropy_coef=0.1)
    with pytest.raises(ValueError, match="ref_logprobs is None"):
        policy_loss(given, beta=0.1)
    given = inputs_of(batch, LaterLossInputs, ref_logprobs=batch["ref"], loss_weights=batch["weights"])(0, batch["logprobs"][0], 5)
    with pytest.raises(ValueError, match="with loss_weights"):
        policy_loss(given, beta=0.1)
