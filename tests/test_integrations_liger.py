"""Liger's names with our losses, against Liger's own torch path: its chunked loss, in float32."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_fast.integrations.liger import LigerFusedLinearGRPOLoss, triton_grpo_loss

TEMPERATURE = 0.8
SEQUENCES, LENGTH, WIDTH, VOCABULARY = 4, 5, 8, 31
CASES: list[dict[str, Any]] = [
    {},
    {"loss_type": "grpo", "beta": 0.3, "use_bias_correction_kl": True},
    {"loss_type": "bnpo", "beta": 0.0, "delta": 1.5},
    {"loss_type": "dr_grpo", "max_completion_length": 9},
    {"loss_type": "cispo", "epsilon_high": 1.1},
    {"loss_type": "sapo", "sapo_temperature_neg": 1.4},
    {"loss_type": "vespo", "vespo_k_pos": 1.5},
    {"loss_type": "luspo", "importance_sampling_level": "sequence", "beta": 0.0, "epsilon_low": 0.02, "epsilon_high": 0.02},
    {"loss_type": "grpo", "importance_sampling_level": "sequence", "beta": 0.2, "use_bias_correction_kl": True},
]
IDS = ["-".join(map(str, case.values())) or "defaults" for case in CASES]


@pytest.fixture
def given(generator: torch.Generator) -> dict[str, Tensor]:
    hidden = torch.randn(SEQUENCES, LENGTH, WIDTH, generator=generator)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator)
    bias = torch.randn(VOCABULARY, generator=generator)
    ids = torch.randint(VOCABULARY, (SEQUENCES, LENGTH), generator=generator)
    logprobs = ((hidden @ weight.T + bias) / TEMPERATURE).log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    return {
        "hidden": hidden,
        "weight": weight,
        "bias": bias,
        "ids": ids,
        "mask": (torch.arange(LENGTH) < torch.tensor([5, 3, 4, 1]).unsqueeze(1)).float(),
        "advantages": torch.tensor([1.2, -0.7, 0.0, -0.9]),
        "old": logprobs - 0.3 * torch.randn(SEQUENCES, LENGTH, generator=generator),
        "ref": logprobs + 0.3 * torch.randn(SEQUENCES, LENGTH, generator=generator),
        "ratio": torch.rand(SEQUENCES, LENGTH, generator=generator) + 0.5,
    }


def run(loss: Any, given: dict[str, Tensor], **more: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Loss, gradients of hidden states, weight and bias, and metrics."""
    leaves = [given[name].clone().requires_grad_() for name in ("hidden", "weight", "bias")]
    hidden, weight, bias = leaves
    value, metrics = loss(
        hidden,
        weight,
        given["ids"],
        given["mask"],
        given["advantages"],
        bias=bias,
        ref_per_token_logps=given["ref"],
        old_per_token_logps=given["old"],
        **more,
    )
    return value.detach(), list(torch.autograd.grad(value, leaves)), list(metrics)


def same(ours: Any, theirs: Any, tolerance: float = 2e-5) -> None:
    assert abs(ours[0] - theirs[0]) <= tolerance * max(1.0, abs(theirs[0]))
    for mine, gradient in zip(ours[1], theirs[1], strict=True):
        scale = gradient.abs().max()
        assert scale > 1e-3
        assert (mine - gradient).abs().max() <= tolerance * scale
    for mine, metric in zip(ours[2], theirs[2], strict=True):
        torch.testing.assert_close(mine, metric, rtol=1e-4, atol=1e-6)


# Liger's LUSPO is not the formula with a weight per token.
WITH_WEIGHTS = [
    (case, kind) for case in CASES for kind in (None, "token", "sequence") if (case.get("loss_type"), kind) != ("luspo", "token")
]


@pytest.mark.parametrize(("options", "rollout"), WITH_WEIGHTS, ids=str)
def test_the_chunked_loss(options: dict[str, Any], rollout: str | None, given: dict[str, Tensor]) -> None:
    chunked = pytest.importorskip("liger_kernel.chunked_loss", reason="liger-kernel is not installed")
    ratio = None if rollout is None else given["ratio"] if rollout == "token" else given["ratio"][:, 0]
    if rollout == "token":  # its VESPO takes the logarithm of masked ones too
        ratio = torch.where(given["mask"] != 0, given["ratio"], 1.0)
    more = {"vllm_is_ratio": ratio}
    theirs = chunked.LigerFusedLinearGRPOLoss(temperature=TEMPERATURE, compiled=False, **options)
    ours = LigerFusedLinearGRPOLoss(temperature=TEMPERATURE, compiled=False, **options)
    same(run(ours, given, **more), run(theirs, given, **more))


def test_a_reference_from_hidden_states_and_the_batchs_token_count(given: dict[str, Tensor]) -> None:
    chunked = pytest.importorskip("liger_kernel.chunked_loss", reason="liger-kernel is not installed")
    reference = {"ref_input": given["hidden"].flip(0), "ref_weight": given["weight"], "ref_bias": given["bias"]}
    more = {**reference, "num_items_in_batch": torch.tensor(29)}
    theirs = chunked.LigerFusedLinearGRPOLoss(temperature=TEMPERATURE, compiled=False, beta=0.2)
    ours = LigerFusedLinearGRPOLoss(temperature=TEMPERATURE, beta=0.2)
    given["ref"] = None  # type: ignore[assignment]
    same(run(ours, given, **more), run(theirs, given, **more))
    without = chunked.LigerFusedLinearGRPOLoss(temperature=TEMPERATURE, compiled=False, beta=0.2, use_ref_model=False)
    same(run(LigerFusedLinearGRPOLoss(temperature=TEMPERATURE, beta=0.2, use_ref_model=False), given), run(without, given))
    with pytest.raises(ValueError, match="ref_per_token_logps is None"):
        run(ours, given)


def with_logits(given: dict[str, Tensor], reduce: bool, inplace: bool = True, **options: Any) -> tuple[Any, ...]:
    """Of triton_grpo_loss, which has a position more, and other names."""
    names = {"epsilon_low": "eps_low", "epsilon_high": "eps_high"}
    options = {"eps_high": 0.2, **{names.get(name, name): value for name, value in options.items()}}
    leaves = [given[name].clone().requires_grad_() for name in ("hidden", "weight", "bias")]
    logits = torch.nn.functional.pad(leaves[0] @ leaves[1].T + leaves[2], (0, 0, 0, 1), value=float("nan"))
    beta = options.get("beta", 0.04)
    out = triton_grpo_loss(
        logits,
        given["old"],
        given["ref"] if beta != 0 else None,
        given["ids"],
        given["advantages"],
        given["mask"],
        temperature=TEMPERATURE,
        inplace=inplace,
        reduce=reduce,
        **options,
    )
    if reduce:
        return out[0].detach(), list(torch.autograd.grad(out[0], leaves)), out[1]
    return (*out, leaves)


@pytest.mark.parametrize("options", CASES, ids=IDS)
@pytest.mark.parametrize("inplace", [True, False])
def test_the_loss_over_logits_reduced(options: dict[str, Any], inplace: bool, given: dict[str, Tensor]) -> None:
    chunked = pytest.importorskip("liger_kernel.chunked_loss", reason="liger-kernel is not installed")
    theirs = chunked.LigerFusedLinearGRPOLoss(temperature=TEMPERATURE, compiled=False, **options)
    same(with_logits(given, True, inplace, **options), run(theirs, given))


@pytest.mark.parametrize("options", [case for case in CASES if case.get("loss_type") not in ("grpo", "luspo")], ids=str)
def test_the_loss_over_logits_per_token(options: dict[str, Any], given: dict[str, Tensor]) -> None:
    """Reduced by the caller, as older trainers do, it is the reduced one; gradients flow through the tokens' losses."""
    loss, gradients, metrics = with_logits(given, True, **options)
    token, kl, clipped, leaves = with_logits(given, False, **options)
    mask = given["mask"]
    count = {"dr_grpo": SEQUENCES * 9, "sapo": None}.get(options.get("loss_type", "dapo"), mask.sum())
    total = token.sum() / count if count is not None else (token.sum(1) / mask.sum(1)).mean()
    torch.testing.assert_close(total, loss, rtol=1e-5, atol=1e-6)
    for mine, gradient in zip(torch.autograd.grad(total, leaves), gradients, strict=True):
        torch.testing.assert_close(mine, gradient, rtol=1e-4, atol=1e-5)
    assert (token[mask == 0] == 0).all()
    torch.testing.assert_close(clipped.sum() / mask.sum(), metrics[-1])
    if kl is None:
        assert options["beta"] == 0.0
    else:
        torch.testing.assert_close(kl.sum() / mask.sum(), metrics[0], rtol=1e-4, atol=1e-6)


def test_the_same_arguments() -> None:
    """Names, order and defaults."""
    chunked = pytest.importorskip("liger_kernel.chunked_loss", reason="liger-kernel is not installed")
    transformers = pytest.importorskip("liger_kernel.transformers.grpo_loss", reason="liger-kernel has no Triton here")

    def arguments(function: Any) -> list[tuple[str, Any]]:
        return [(name, parameter.default) for name, parameter in inspect.signature(function).parameters.items()]

    theirs, ours = chunked.LigerFusedLinearGRPOLoss, LigerFusedLinearGRPOLoss
    assert arguments(triton_grpo_loss) == arguments(transformers.triton_grpo_loss)
    assert arguments(ours.__init__) == arguments(theirs.__init__)
    assert arguments(ours.forward) == arguments(theirs.forward)


def test_luspo_is_the_formula(given: dict[str, Tensor]) -> None:
    """The mean over sequences of the sum over tokens: -5 for two sequences of 8 and 2 tokens and a loss of -1 each, padded to 8, where
    Liger's Triton path gives -4.25."""
    logits = torch.zeros(2, 9, 4, requires_grad=True)
    mask = (torch.arange(8) < torch.tensor([[8], [2]])).long()
    ids = torch.zeros(2, 8, dtype=torch.int64)
    loss = triton_grpo_loss(logits, None, None, ids, torch.ones(2), mask, 1.0, beta=0.0, loss_type="luspo", reduce=True)[0]
    assert loss.item() == pytest.approx(-5.0)


def test_luspo_with_weights_per_token_is_the_formula_and_not_ligers(given: dict[str, Tensor]) -> None:
    chunked = pytest.importorskip("liger_kernel.chunked_loss", reason="liger-kernel is not installed")
    options: dict[str, Any] = {"loss_type": "luspo", "importance_sampling_level": "sequence", "beta": 0.0, "temperature": TEMPERATURE}
    more = {"vllm_is_ratio": torch.where(given["mask"] != 0, given["ratio"], 1.0)}
    logprobs = ((given["hidden"] @ given["weight"].T + given["bias"]) / TEMPERATURE).log_softmax(-1)
    logprobs = logprobs.gather(-1, given["ids"].unsqueeze(-1)).squeeze(-1)
    mask, a = given["mask"], given["advantages"].unsqueeze(1)
    ratio = (((logprobs - given["old"]) * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)).exp()
    token = -torch.min(ratio * a, ratio.clamp(0.8, 1.2) * a) * more["vllm_is_ratio"]
    formula = (token * mask).sum(1).mean().item()
    assert run(LigerFusedLinearGRPOLoss(**options), given, **more)[0].item() == pytest.approx(formula, rel=1e-5)
    theirs = run(chunked.LigerFusedLinearGRPOLoss(**options, compiled=False), given, **more)[0].item()
    assert theirs != pytest.approx(formula, rel=0.05), "then the guide need not say so"


def test_masked_values_have_no_effect(given: dict[str, Tensor]) -> None:
    """A log-ratio beyond 88 under the mask makes the gradient of Liger's chunked loss NaN."""
    ours = LigerFusedLinearGRPOLoss(temperature=TEMPERATURE, beta=0.1)
    expected = run(ours, given)
    given["old"] = torch.where(given["mask"] != 0, given["old"], -200.0)
    given["ref"] = torch.where(given["mask"] != 0, given["ref"], float("nan"))
    same(run(ours, given), expected, tolerance=0.0)

    chunked = pytest.importorskip("liger_kernel.chunked_loss", reason="liger-kernel is not installed")
    given["ref"] = torch.where(given["mask"] != 0, given["ref"], 0.0)
    theirs = run(chunked.LigerFusedLinearGRPOLoss(temperature=TEMPERATURE, beta=0.1, compiled=False), given)
    assert theirs[1][0].isnan().any(), "then the guide need not say so"


def test_a_leaf_keeps_its_logits(given: dict[str, Tensor]) -> None:
    logits = torch.randn(SEQUENCES, LENGTH + 1, VOCABULARY, requires_grad=True)
    before = logits.detach().clone()
    loss = triton_grpo_loss(logits, given["old"], None, given["ids"], given["advantages"], given["mask"], beta=0.0, reduce=True)[0]
    loss.backward()
    assert torch.equal(logits, before)


def test_the_comparison_rejects(given: dict[str, Tensor]) -> None:
    right = run(LigerFusedLinearGRPOLoss(temperature=TEMPERATURE), given)
    for wrong in (
        (right[0] + 1, *right[1:]),
        (right[0], [2 * x for x in right[1]], right[2]),
        (right[0], [0 * x for x in right[1]], right[2]),
    ):
        with pytest.raises(AssertionError):
            same(wrong, right)


def test_a_temperature_that_is_none_is_refused_when_it_is_given() -> None:
    with pytest.raises(ValueError, match="temperature is 0; expected a finite number > 0"):
        LigerFusedLinearGRPOLoss(temperature=0)
    with pytest.raises(TypeError, match="temperature is 'hot'"):
        LigerFusedLinearGRPOLoss(temperature="hot")  # type: ignore[arg-type]
