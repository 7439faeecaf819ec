"""The loss from hidden states against full logits in float64: value, gradients and metrics over every option, chunk and kind of head."""

from __future__ import annotations

import compare
import pytest
import torch
from cases import KEPT
from compare import assert_close, of_two_ulps
from linear_cases import LinearCase, random_linear_case

import grpo_fast as gf

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SEEDS = range(60)
HALF_ULP = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}


def of_rounded_logits(case: LinearCase, half_ulp: float) -> dict[str, float]:
    """What rounding the logits, by half an ulp each, can do to first order."""
    logits = case.logits().requires_grad_()
    options = {name: x for name, x in case.options.items() if name not in ("chunk_bytes", "frozen")}
    out = gf.grpo_loss(logits, case.token_ids, case.advantages, **options)
    out.loss.backward()
    scaled = logits.detach().nan_to_num(0, 0, 0).abs().amax().item() * options["logit_scale"]
    scaled *= 1 / torch.as_tensor(options["temperature"]).nan_to_num(1).min().item()
    logprobs = 2 * half_ulp * scaled
    assert logits.grad is not None
    loss = half_ulp * (logits.grad * logits.detach().nan_to_num(0, 0, 0)).abs().sum().item()
    return {"loss": loss, "logprobs": logprobs, "entropy": logprobs * (1 + out.entropy.max().item())} | uncancelled(case, logits.grad)


def uncancelled(case: LinearCase, gradient: torch.Tensor) -> dict[str, float]:
    """The largest sums of the magnitudes of what is added up in a gradient, where the terms may cancel."""
    terms = gradient.abs()
    return {
        "bias": terms.flatten(0, -2).sum(0).max().item(),
        "hidden": (terms @ case.tensors["weight"].double().abs()).max().item(),
        "weight": (terms.flatten(0, -2).T @ case.tensors["hidden"].double().abs().nan_to_num(0, 0, 0).flatten(0, -2)).max().item(),
    }


def check(seed: int, dtype: torch.dtype) -> None:
    """One random case on the backend in force."""
    case = random_linear_case(seed, dtype)
    out, gradients = case.run()
    with gf.use_backend("reference"):
        truth, true_gradients = case.run(torch.float64)
        naive, naive_gradients = case.run()
    # Those of kept sets are rounded to float32 once more, after scale and soft cap.
    slack = of_rounded_logits(case, HALF_ULP.get(dtype, 2.0**-25 if seed >= KEPT else 0.0))
    config, steep = case.options["config"], 4 if case.options["config"].surrogate == "vespo" else 1
    scale = steep * (truth.loss.abs().item() + sum(x.abs().sum().item() for x in true_gradients.values()))
    assert_close(
        out.loss,
        truth.loss.double(),
        naive.loss,
        "loss",
        scale=scale,
        slack=steep * slack["loss"] + slack["logprobs"] * truth.loss.abs().item(),
    )
    assert_close(out.logprobs, truth.logprobs, naive.logprobs, "logprobs", slack=slack["logprobs"])
    assert_close(out.entropy, truth.entropy, naive.entropy, "entropy", slack=slack["entropy"])
    assert torch.equal(out.active, truth.active)
    assert gradients.keys() == true_gradients.keys()
    for name, gradient in gradients.items():
        kl = config.beta * case.options["loss_scale"] * truth.logprobs.abs().max().item()
        others = case.tensors["hidden" if name != "hidden" else "weight"].nan_to_num(0, 0, 0).abs().max().item()
        scale = steep * true_gradients[name].abs().max().item() + kl * others
        if seed >= KEPT:  # the loss is computed in two passes, with statistics in float32
            scale = max(scale, slack.get(name, 0.0)) * (1 + of_two_ulps(truth.logprobs) / compare.ALLOWANCE[torch.float32])
        assert gradient.dtype == case.tensors[name].dtype
        assert_close(
            gradient,
            true_gradients[name].double(),
            naive_gradients[name],
            f"gradient of {name}",
            scale=scale,
            slack=slack["logprobs"] * scale,
        )
    for name, value in out.metrics.items():
        if name != "recomputed_fraction":
            assert_close(
                value,
                truth.metrics[name].double(),
                naive.metrics[name],
                f"metrics[{name!r}]",
                scale=max(1.0, value.abs().item()),
                slack=max(1.0, value.abs().item()) * slack["entropy"],
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", SEEDS)
def test_random_options(seed: int, dtype: torch.dtype) -> None:
    check(seed, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(KEPT, KEPT + 30))
def test_random_options_with_kept_sets(seed: int, dtype: torch.dtype) -> None:
    check(seed, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("first", [1000, pytest.param(1100, marks=pytest.mark.sweep), pytest.param(1250, marks=pytest.mark.sweep)])
def test_many_random_options(first: int) -> None:
    """In float32: rounded logits put one token in thousands on the other side of the clip band."""
    count = 100 if first == 1000 else 150
    for seed in (*range(first, first + count), *range(KEPT + first, KEPT + first + count // 2)):
        check(seed, torch.float32)
