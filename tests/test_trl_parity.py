"""Parity with TRL's own loss arithmetic: GRPOTrainer._compute_loss itself, run on a stand-in for the trainer, for its eight loss types.

How TRL's numbers map to ours, for one micro-batch of a training step:

    current_gradient_accumulation_steps = GA      loss_scale = 1 / GA
    num_items_in_batch = M, the tokens of the     num_items = M / (P spg): TRL divides the sum by M / P * GA / spg (P processes, spg =
    whole generation batch                        steps_per_generation micro-batches in it), and 1 / GA of that is our loss_scale
    entropy bonus: the mean over the micro-       entropy_aggregation="token_mean"
    batch's tokens, whatever the loss type
    use_bias_correction_kl                        bias_corrected_kl
    importance_sampling_ratio [B, T] or [B, 1]    rollout_weights
    delta, epsilon_low, epsilon_high, sapo_*,     the same; TRL has no clamp of the log-ratio but in VESPO (±20), which is our default
    vespo_*

In evaluation TRL divides by neither GA nor GA / spg.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peers import needs_trl
from torch import Tensor

import grpo_fast as gf
from grpo_fast.loss.config import LOSS_TYPES, LossConfig
from grpo_fast.ops import extension

pytestmark = needs_trl
needs_extension = pytest.mark.skipif(not extension.load(), reason=f"the extension is not loaded: {extension.status().why}")

TRL_LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
MAX_COMPLETION_LENGTH = 11
SETTINGS: dict[str, Any] = {  # of both; none has a value that float32 rounds, so that a difference is one of arithmetic
    "sapo_temperature_pos": 1.25,
    "sapo_temperature_neg": 1.5,
    "vespo_k_pos": 1.75,
    "vespo_lambda_pos": 2.5,
    "vespo_k_neg": 2.75,
    "vespo_lambda_neg": 1.5,
}


@pytest.fixture(scope="module")
def trainer_class() -> Any:
    from trl.trainer.grpo_trainer import GRPOTrainer  # takes seconds: not before it is needed

    return GRPOTrainer


def batch_of(generator: torch.Generator, on_policy: bool = False) -> dict[str, Tensor]:
    """Float64, T = 0.7. Sequences above, below and inside the band, one without an advantage, and one that is fully masked."""
    b, t, vocabulary, temperature = 6, 5, 6, 0.7

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, dtype=torch.float64)

    logits = 1.5 * normal(b, t, vocabulary)
    token_ids = torch.randint(vocabulary, (b, t), generator=generator)
    logprobs = plain_logprobs_and_entropies(logits, token_ids, temperature)[0]
    mask = torch.arange(t) < torch.tensor([5, 3, 4, 5, 2, 0]).unsqueeze(1)
    noise = 0.4 * normal(b, t)
    mean = (noise * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    of_sequence = torch.tensor([0.35, -0.35, 0.02, 0.35, 0.1, 0.0], dtype=torch.float64)
    log_ratio = noise - mean + of_sequence.unsqueeze(1)
    return {
        "logits": logits,
        "token_ids": token_ids,
        "advantages": torch.tensor([1.3, -0.8, 0.6, -0.5, 0.0, 0.7], dtype=torch.float64),
        "mask": mask,
        "old_logprobs": logprobs if on_policy else logprobs - log_ratio,
        "ref_logprobs": logprobs + 0.5 * normal(b, t),
        "rollout_weights": (0.5 * normal(b, t)).exp(),
        "temperature": torch.tensor(temperature, dtype=torch.float64),
    }


def plain_logprobs_and_entropies(logits: Tensor, token_ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    log_p = (logits / temperature).log_softmax(-1)
    return log_p.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


def trl_loss(
    trainer_class: Any,
    batch: dict[str, Tensor],
    *,
    loss_type: str,
    level: str = "token",
    beta: float = 0.0,
    bias_corrected_kl: bool = True,
    delta: float | None = None,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.25,
    entropy_coef: float = 0.0,
    accumulation: int = 1,
    steps_per_generation: int = 1,
    num_processes: int = 1,
    num_items: int = 19,
    rollout: str | None = None,
    on_policy: bool = False,
    training: bool = True,
) -> tuple[Tensor, Tensor, dict[str, list[float]]]:
    """Loss, gradient with respect to the logits, and TRL's metrics."""
    logits = batch["logits"].clone().requires_grad_()
    mask = batch["mask"].long()
    # TRL's own weights are 1 where masked (it exponentiates a masked difference), and its VESPO counts on that.
    weights = None if rollout is None else batch["rollout_weights"].masked_fill(~batch["mask"], 1.0)
    statistics = plain_logprobs_and_entropies(logits, batch["token_ids"], batch["temperature"].item())
    metrics: dict[str, dict[str, list[float]]] = {"train": defaultdict(list), "eval": defaultdict(list)}
    stand_in = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (*statistics, None),
        get_gamma_weights=trainer_class.get_gamma_weights,
        model=SimpleNamespace(training=training),
        accelerator=SimpleNamespace(num_processes=num_processes, sync_gradients=True, gather=lambda x: x, reduce=lambda x, reduction: x),
        args=SimpleNamespace(delta=delta, use_bias_correction_kl=bias_corrected_kl, steps_per_generation=steps_per_generation, **SETTINGS),
        loss_type=loss_type,
        importance_sampling_level=level,
        beta=beta,
        epsilon_low=epsilon_low,
        epsilon_high=epsilon_high,
        max_completion_length=MAX_COMPLETION_LENGTH,
        current_gradient_accumulation_steps=accumulation,
        entropy_coef=entropy_coef,
        _entropy_bonus_enabled=entropy_coef != 0,
        use_adaptive_entropy=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        aux_loss_enabled=False,
        use_vllm=rollout is not None,
        vllm_importance_sampling_correction=rollout is not None,
        _metrics=metrics,
    )
    inputs = {
        "prompt_ids": torch.zeros(6, 2, dtype=torch.int64),
        "prompt_mask": torch.ones(6, 2, dtype=torch.int64),
        "completion_ids": batch["token_ids"],
        "completion_mask": mask,
        "advantages": batch["advantages"],
        "old_per_token_logps": None if on_policy else batch["old_logprobs"],
        "ref_per_token_logps": batch["ref_logprobs"],
        "num_items_in_batch": torch.tensor(num_items),
    }
    if weights is not None:
        inputs["importance_sampling_ratio"] = weights if rollout == "token" else weights[:, :1]
    loss = trainer_class._compute_loss(stand_in, stand_in.model, inputs)
    (gradient,) = torch.autograd.grad(loss, logits)
    return loss.detach(), gradient, metrics["train" if training else "eval"]


def our_loss(
    batch: dict[str, Tensor],
    dtype: torch.dtype,
    *,
    loss_type: str,
    level: str = "token",
    accumulation: int = 1,
    steps_per_generation: int = 1,
    num_processes: int = 1,
    num_items: int = 19,
    rollout: str | None = None,
    on_policy: bool = False,
    training: bool = True,
    bias_corrected_kl: bool = True,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.25,
    **settings: Any,
) -> tuple[Tensor, Tensor, gf.GRPOOutput]:
    """The same of gf.grpo_loss, with the numbers mapped as the top of this file says. What is masked is poisoned: TRL needs it finite."""
    hidden = ~batch["mask"]
    given: dict[str, Any] = {name: x.to(dtype) if x.is_floating_point() else x for name, x in batch.items()}
    for name in ("logits", "old_logprobs", "ref_logprobs", "rollout_weights"):
        given[name] = given[name].masked_fill(hidden.unsqueeze(-1) if name == "logits" else hidden, float("nan"))
    logits = given.pop("logits").requires_grad_()
    weights = given.pop("rollout_weights")
    config = LossConfig(
        loss_type=loss_type,
        importance_sampling_level=level,
        entropy_aggregation="token_mean",
        bias_corrected_kl=bias_corrected_kl,
        max_completion_length=MAX_COMPLETION_LENGTH,
        epsilon_low=epsilon_low,
        epsilon_high=epsilon_high,
        **settings,
        **SETTINGS,
    )
    first = torch.where(batch["mask"].any(1, keepdim=True), weights[:, :1], 1.0)  # [B, 1]: of no token in the fully masked sequence
    out = gf.grpo_loss(
        logits,
        given.pop("token_ids"),
        given.pop("advantages"),
        config=config,
        **{**given, "old_logprobs": None if on_policy else given["old_logprobs"], "temperature": given["temperature"].item()},
        rollout_weights=None if rollout is None else weights if rollout == "token" else first,
        num_items=num_items / (num_processes * steps_per_generation) if training else num_items / num_processes,
        loss_scale=1 / accumulation if training else 1.0,
    )
    (gradient,) = torch.autograd.grad(out.loss, logits)
    return out.loss.detach(), gradient, out


def assert_same(ours: Tensor, trls: Tensor, tolerance: float, what: str, scale: float = 0.0) -> None:
    """Relative to the largest magnitude, or to a scale that is larger: that of a sum's terms, which cancel."""
    assert torch.isfinite(trls).all(), f"{what} of TRL is not finite: the inputs are wrong"
    error, scale = (ours.double() - trls).abs().max().item(), max(trls.abs().max().item(), scale)
    assert scale > 1e-3, f"{what}: {scale:.3g} says nothing"
    assert error <= tolerance * scale, f"{what}: off by {error:.3g} of {scale:.3g}"


# Everything that changes the arithmetic of at least one loss type, alone and together.
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "on_policy": {"on_policy": True},
    "beta": {"beta": 0.3, "bias_corrected_kl": False},
    "bias_corrected_kl": {"beta": 0.3},
    "delta": {"delta": 1.5},
    "sequence": {"level": "sequence"},
    "sequence_beta": {"level": "sequence", "beta": 0.3},
    "sequence_delta": {"level": "sequence", "delta": 1.125, "epsilon_high": 0.0625},
    "rollout_per_token": {"rollout": "token"},
    "rollout_per_sequence": {"rollout": "sequence"},
    "sequence_rollout_per_token": {"level": "sequence", "rollout": "token"},
    "entropy": {"entropy_coef": 0.2},
    "accumulation": {"accumulation": 3, "steps_per_generation": 6, "num_processes": 2, "num_items": 192},
    "accumulation_entropy": {"accumulation": 3, "steps_per_generation": 6, "num_items": 90, "entropy_coef": 0.2},
    "evaluation": {"training": False, "accumulation": 3, "steps_per_generation": 6, "num_items": 30, "entropy_coef": 0.2},
    "everything": {"beta": 0.3, "rollout": "token", "entropy_coef": 0.2, "accumulation": 2, "steps_per_generation": 4, "num_items": 50},
}


def known_to_both(loss_type: str, case: dict[str, Any]) -> bool:
    """VESPO has one weight per sequence, so that we refuse another level; delta belongs to the clip (TRL ignores both)."""
    surrogate = LOSS_TYPES[loss_type].surrogate
    return not (surrogate == "vespo" and case.get("level") == "sequence") and not ("delta" in case and surrogate != "clip")


PARITY = [(loss_type, name) for loss_type in TRL_LOSS_TYPES for name, case in CASES.items() if known_to_both(loss_type, case)]


@pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"),
    [
        pytest.param("reference", torch.float64, 1e-9, id="reference-float64"),
        pytest.param("cpu", torch.float32, 1e-5, id="cpu-float32", marks=needs_extension),
    ],
)
@pytest.mark.parametrize(("loss_type", "case"), PARITY)
def test_loss_and_gradient(
    backend: str, dtype: torch.dtype, tolerance: float, loss_type: str, case: str, generator: torch.Generator, trainer_class: Any
) -> None:
    settings = {"loss_type": loss_type, **CASES[case]}
    if loss_type == "cispo":
        settings["epsilon_high"] = 1.25  # the raw bound
    batch = batch_of(generator, settings.get("on_policy", False))
    loss, gradient, metrics = trl_loss(trainer_class, batch, **settings)
    with gf.use_backend(backend):
        our, our_gradient, out = our_loss(batch, dtype, **settings)
    assert_same(our, loss, tolerance, "loss", scale=gradient.abs().sum().item())
    assert_same(our_gradient, gradient, tolerance, "gradient")
    assert (our_gradient[~batch["mask"]] == 0).all()
    if settings.get("level") != "sequence":  # TRL's means are then over sequences, ours over tokens
        names = {
            "entropy": "entropy",
            "clip_ratio/low_mean": "clip_low",
            "clip_ratio/high_mean": "clip_high",
            "cispo_clip_ratio": "clip_high",
        }
        if not settings.get("bias_corrected_kl", True):
            names["kl"] = "kl"
        for theirs, ours in names.items():
            if theirs in metrics:
                assert out.metrics[ours].item() == pytest.approx(metrics[theirs][0], rel=1e-5, abs=1e-6), theirs


@pytest.mark.parametrize("loss_type", TRL_LOSS_TYPES)
def test_advantages_per_token(loss_type: str, generator: torch.Generator, trainer_class: Any) -> None:
    batch = batch_of(generator)
    batch["advantages"] = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    loss, gradient, _ = trl_loss(trainer_class, batch, loss_type=loss_type, beta=0.3, rollout="token")
    our, our_gradient, _ = our_loss(batch, torch.float64, loss_type=loss_type, beta=0.3, rollout="token")
    assert_same(our, loss, 1e-9, "loss")
    assert_same(our_gradient, gradient, 1e-9, "gradient")


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_inputs_straddle_the_band(level: str, generator: torch.Generator, trainer_class: Any) -> None:
    """Else the cases above would hold for a loss without a clip."""
    _, _, metrics = trl_loss(trainer_class, batch_of(generator), loss_type="grpo", level=level)
    assert 0 < metrics["clip_ratio/low_mean"][0] < 0.5
    assert 0 < metrics["clip_ratio/high_mean"][0] < 0.5


@pytest.mark.parametrize("loss_type", TRL_LOSS_TYPES)
def test_every_case_has_another_loss(loss_type: str, generator: torch.Generator, trainer_class: Any) -> None:
    """Else a case would test what another already does. Evaluation and one accumulation may agree with a plain step."""
    losses = {}
    for name, case in CASES.items():
        if known_to_both(loss_type, case):
            settings = {"loss_type": loss_type, **case, **({"epsilon_high": 1.25} if loss_type == "cispo" else {})}
            losses[name] = trl_loss(trainer_class, batch_of(generator.manual_seed(3)), **settings)[0].item()
    distinct = {name: loss for name, loss in losses.items() if name not in ("evaluation", "accumulation", "accumulation_entropy")}
    assert len({round(loss, 9) for loss in distinct.values()}) == len(distinct), distinct


def test_the_comparison_rejects(generator: torch.Generator, trainer_class: Any) -> None:
    _, gradient, _ = trl_loss(trainer_class, batch_of(generator), loss_type="dapo")
    for wrong in (torch.zeros_like(gradient), 2 * gradient, -gradient):
        with pytest.raises(AssertionError):
            assert_same(wrong, gradient, 1e-5, "gradient")
    with pytest.raises(AssertionError):
        assert_same(gradient, torch.zeros_like(gradient), 1e-5, "gradient")
