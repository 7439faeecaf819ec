"""linear_token_logprobs against float64 autograd through all the logits: every kind of head, whatever is kept for backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import KEPT
from compare import assert_close
from linear_cases import LinearCase, random_linear_case
from torch import Tensor

import grpo_fast as gf
from grpo_fast.loss.reference import kept_sets, token_statistics

SCORING = ("temperature", "softcap", "logit_scale", "mask", "support")
HEADS = ("weight", "bias", "adapter_weight")
KEEP = (0, 1 << 30, "some")


def scoring_of(case: LinearCase) -> dict[str, Any]:
    return {name: case.options[name] for name in SCORING if name in case.options}


def given(leaves: dict[str, Tensor]) -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
    rest: dict[str, Any] = dict(leaves)
    hidden_and_weight = rest.pop("hidden"), rest.pop("weight")
    if "adapted" in rest:
        rest["adapter"] = (rest.pop("adapted"), rest.pop("adapter_weight"))
    return hidden_and_weight, rest


def leaves_of(case: LinearCase, frozen: tuple[str, ...] = (), dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    return {name: x.to(dtype or x.dtype).detach().clone().requires_grad_(name not in frozen) for name, x in case.tensors.items()}


def truth_of(case: LinearCase, leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropy by all the logits, in plain PyTorch and the type of the leaves; statistics float32 or better."""
    ids, options = case.token_ids, case.options
    mask = torch.ones_like(ids, dtype=torch.bool) if options.get("mask") is None else options["mask"].bool()
    positions = leaves["hidden"].shape[:-1]
    counts = torch.nn.functional.pad(mask, (0, positions[-1] - mask.shape[-1])).unsqueeze(-1)
    logits = torch.nn.functional.linear(torch.where(counts, leaves["hidden"], 0), leaves["weight"], leaves.get("bias"))
    if "adapted" in leaves:
        logits = logits + torch.where(counts, leaves["adapted"], 0) @ leaves["adapter_weight"].T
    if positions != ids.shape:
        logits = logits[:, :-1]
    logits = logits if logits.dtype == torch.float64 else logits.float()
    temperature = options["temperature"]
    if isinstance(temperature, Tensor):
        temperature = temperature if temperature.shape == ids.shape else temperature.unsqueeze(1)
        temperature = torch.where(mask, temperature, 1).to(logits.dtype)
    kept = None
    if "support" in options:
        kept = kept_sets(options["support"].token_ids, options["support"].offsets, logits.shape[-1]).view(logits.shape) | ~mask.unsqueeze(
            -1
        )
    found = token_statistics(logits, torch.where(mask, ids, 0), temperature, options["softcap"], options["logit_scale"], kept)
    return tuple(torch.where(mask, x, 0) for x in found)  # type: ignore[return-value]


def gradients(leaves: dict[str, Tensor], outputs: tuple[Tensor, Tensor], upstream: tuple[Tensor | None, ...]) -> dict[str, Tensor]:
    wanted = {name: x for name, x in leaves.items() if x.requires_grad}
    pairs = [(x, u.to(x.dtype)) for x, u in zip(outputs, upstream, strict=True) if u is not None]
    found = torch.autograd.grad([x for x, _ in pairs], list(wanted.values()), [u for _, u in pairs])
    return dict(zip(wanted, found, strict=True))


def check(seed: int, dtype: torch.dtype, frozen: tuple[str, ...], of: str, keep: Any) -> None:
    """One random case; the upstream gradients are poisoned under the mask, where they must have no effect."""
    case = random_linear_case(seed, dtype)
    ids, options = case.token_ids, case.options
    vocabulary = case.tensors["weight"].shape[0]
    keep_bytes = ids.numel() // 2 * vocabulary * dtype.itemsize if keep == "some" else keep
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones_like(ids, dtype=torch.bool) if options.get("mask") is None else options["mask"].bool()
    g = torch.randn(ids.shape, generator=generator) if of != "entropy" else None
    h = torch.randn(ids.shape, generator=generator) if of != "logprobs" else None
    clean = tuple(None if x is None else torch.where(mask, x, 0).double() for x in (g, h))
    poisoned = tuple(None if x is None else torch.where(mask, x, float("nan")) for x in (g, h))

    leaves = leaves_of(case, frozen)
    (hidden, weight), rest = given(leaves)
    out = gf.linear_token_logprobs(
        hidden, weight, ids, **rest, **scoring_of(case), chunk_bytes=options["chunk_bytes"], keep_bytes=keep_bytes
    )
    found = gradients(leaves, out, poisoned)
    exact = leaves_of(case, frozen, torch.float64)
    truth = truth_of(case, exact)
    true_gradients = gradients(exact, truth, clean)
    plain = leaves_of(case, frozen)
    naive = truth_of(case, plain)
    naive_gradients = gradients(plain, naive, clean)

    rounding = 0.0
    if dtype != torch.float32:  # of the logits, as in test_linear.py
        computed = torch.nn.functional.pad(mask, (0, case.tensors["hidden"].shape[-2] - mask.shape[-1]))
        logits = case.logits()[computed]
        inverse = 1 / torch.as_tensor(options["temperature"]).nan_to_num(1).min().item()
        rounding = 2 * 2.0**-9 * (logits.abs().max().item() * options["logit_scale"] * inverse if logits.numel() else 0.0)
    assert_close(out.logprobs, truth[0].detach(), naive[0], "logprobs", slack=rounding)
    assert_close(out.entropy, truth[1].detach(), naive[1], "entropy", slack=rounding * (1 + truth[1].abs().max().item()))
    for name, gradient in found.items():
        assert gradient.dtype == case.tensors[name].dtype and gradient.shape == case.tensors[name].shape
        scale = true_gradients[name].abs().max().item()
        other = case.tensors["hidden" if name != "hidden" else "weight"].nan_to_num(0, 0, 0).abs().max().item()
        scale += 0.1 * other if of != "logprobs" else 0.0  # an entropy's slope is a difference of two sums
        assert_close(gradient, true_gradients[name], naive_gradients[name], f"gradient of {name}", scale=scale, slack=2 * rounding * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seed", [*range(36), *range(KEPT, KEPT + 18)])
def test_random_cases(seed: int, dtype: torch.dtype) -> None:
    frozen = (HEADS, (), HEADS, ("weight",), ("hidden", "adapted"), ("weight", "bias"))[seed % 6]
    of = ("both", "logprobs", "entropy")[seed // 6 % 3]
    check(seed, dtype, frozen, of, KEEP[seed // 2 % 3])


@pytest.mark.sweep
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("keep", KEEP, ids=str)
@pytest.mark.parametrize("of", ["both", "logprobs", "entropy"])
@pytest.mark.parametrize("frozen", [(), HEADS], ids=["trainable", "frozen"])
def test_many_random_cases(frozen: tuple[str, ...], of: str, keep: Any, dtype: torch.dtype) -> None:
    for seed in (*range(1000, 1060), *range(KEPT + 1000, KEPT + 1030)):
        check(seed, dtype, frozen, of, keep)


# ---- edges


def call(hidden: Tensor, weight: Any, **options: Any) -> gf.TokenLogprobs:
    ids = options.pop("ids", None)
    if ids is None:
        ids = torch.arange(hidden.shape[0] * hidden.shape[1]).view(hidden.shape[:2]) % 11
    return gf.linear_token_logprobs(hidden, weight, ids, **options)


def tensors(trainable: bool, batch: int = 2, length: int = 5) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, length, 8, requires_grad=True), torch.randn(11, 8, requires_grad=trainable)


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)])
@pytest.mark.parametrize("extra", [0, 1])
def test_no_token_at_all(trainable: bool, shape: tuple[int, int], extra: int) -> None:
    hidden, weight = tensors(trainable, shape[0], shape[1] + extra)
    out = call(hidden, weight, ids=torch.zeros(shape, dtype=torch.int64))
    assert out.logprobs.shape == out.entropy.shape == shape
    (out.logprobs.sum() + out.entropy.sum()).backward()
    assert hidden.grad is not None and (hidden.grad == 0).all() and hidden.grad.shape == hidden.shape
    assert not trainable or (weight.grad is not None and (weight.grad == 0).all())
    if trainable is False:
        hidden.grad = None
        call(hidden, weight, ids=torch.zeros(shape, dtype=torch.int64)).logprobs.sum().backward()
        assert hidden.grad is not None and hidden.grad.shape == hidden.shape


@pytest.mark.parametrize("trainable", [True, False])
def test_all_masked_is_a_differentiable_zero(trainable: bool) -> None:
    hidden, weight = tensors(trainable)
    with torch.no_grad():
        hidden.fill_(float("nan"))
    out = call(hidden, weight, mask=torch.zeros(2, 5, dtype=torch.bool))
    assert (out.logprobs == 0).all() and (out.entropy == 0).all()
    (out.logprobs.sum() + out.entropy.sum()).backward()
    assert hidden.grad is not None and (hidden.grad == 0).all()
    assert not trainable or (weight.grad is not None and (weight.grad == 0).all())


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("keep_bytes", [0, 1 << 20])
def test_a_retained_graph_gives_the_same_gradient_again(trainable: bool, keep_bytes: int) -> None:
    """Logits that are kept become their gradient: not while they will be asked for again."""
    hidden, weight = tensors(trainable)
    out = call(hidden, weight, keep_bytes=keep_bytes, chunk_bytes=3 * 11 * 4)
    upstream = torch.randn(2, 5)
    inputs = [x for x in (hidden, weight) if x.requires_grad]

    def gradient(retain: bool) -> list[Tensor]:
        return list(torch.autograd.grad(out.logprobs, inputs, upstream, retain_graph=retain))

    first, second = gradient(True), gradient(True)
    of_entropy = torch.autograd.grad(out.entropy.sum(), inputs, retain_graph=True)
    last = gradient(False)
    for a, b, c in zip(first, second, last, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c) and a.abs().max() > 0
    with torch.no_grad():
        hidden += 0  # the graph is freed, so this is no error
    fresh = torch.autograd.grad(call(hidden, weight).entropy.sum(), inputs)
    for a, b in zip(of_entropy, fresh, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("of", ["logprobs", "entropy"])
def test_a_graph_that_is_gone_gives_no_second_gradient(trainable: bool, of: str) -> None:
    """What was kept for it has become the first."""
    hidden, weight = tensors(trainable)
    result = getattr(call(hidden, weight), of).sum()
    result.backward()
    with pytest.raises(RuntimeError, match="second time"):
        result.backward()


@pytest.mark.parametrize("trainable", [True, False])
def test_gradients_that_are_handed_out_may_be_written_to(trainable: bool) -> None:
    hidden, weight = tensors(trainable)
    out = call(hidden, weight)
    first = torch.autograd.grad(out.logprobs.sum(), hidden, retain_graph=True)[0]
    before = first.clone()
    first.mul_(100)
    again = torch.autograd.grad(out.logprobs.sum(), hidden, retain_graph=True)[0]
    assert torch.equal(before, again)


@pytest.mark.parametrize("trainable", [True, False])
def test_an_upstream_gradient_of_stride_zero(trainable: bool) -> None:
    hidden, weight = tensors(trainable)
    by_sum = torch.autograd.grad(call(hidden, weight).logprobs.sum(), hidden)[0]
    out = call(hidden, weight)
    assert torch.equal(by_sum, torch.autograd.grad(out.logprobs, hidden, torch.ones(2, 5))[0])
    full = torch.log_softmax(hidden @ weight.T, -1).gather(-1, (torch.arange(10).view(2, 5) % 11).unsqueeze(-1))
    torch.testing.assert_close(by_sum, torch.autograd.grad(full.sum(), hidden)[0], rtol=1e-5, atol=1e-6)


def test_without_a_gradient_nothing_is_kept_and_the_values_are_the_same() -> None:
    hidden, weight = tensors(True)
    expected = call(hidden, weight)
    assert expected.logprobs.requires_grad and expected.entropy.requires_grad
    with torch.no_grad():
        quiet = call(hidden, weight)
    detached = call(hidden.detach(), weight.detach())
    for out in (quiet, detached):
        assert not out.logprobs.requires_grad and out.logprobs.grad_fn is None and out.logprobs.is_leaf
        assert torch.equal(out.logprobs, expected.logprobs) and torch.equal(out.entropy, expected.entropy)


def test_a_second_derivative_is_refused() -> None:
    hidden, weight = tensors(True)
    upstream = torch.ones(2, 5, requires_grad=True)
    gradient = torch.autograd.grad(call(hidden, weight).logprobs, hidden, upstream, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("trainable", [True, False])
def test_hidden_states_changed_before_backward_are_noticed(trainable: bool) -> None:
    """A tensor saved for backward was changed in place: PyTorch's version counter raises an error, in place of a wrong gradient."""
    hidden, weight = tensors(trainable)
    source = hidden * 1
    out = call(source, weight, keep_bytes=0)
    source.detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (out.logprobs.sum() + out.entropy.sum()).backward()


@pytest.mark.parametrize("temperature", [0.7, torch.tensor(0.7), torch.full((2,), 0.7), torch.full((2, 1), 0.7), torch.full((2, 5), 0.7)])
def test_the_shapes_of_a_temperature(temperature: float | Tensor) -> None:
    hidden, weight = tensors(True)
    expected = call(hidden / 0.7, weight)
    out = call(hidden, weight, temperature=temperature, chunk_bytes=44)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    reference = torch.autograd.grad(expected.logprobs.sum() + expected.entropy.sum(), (hidden, weight))
    torch.testing.assert_close(torch.autograd.grad(out.logprobs.sum() + out.entropy.sum(), (hidden, weight)), reference)
