"""With batch_invariant() a token's log-probability, entropy and gradient have the same bits whatever stands beside it."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
from invariance_cases import NUM_ITEMS, RandomCall
from linear_cases import operands
from torch import Tensor

import grpo_fast as gf
from grpo_fast.head.precision import Precision
from grpo_fast.head.products import FixedShapeProducts, products_for
from grpo_fast.integrations.logprobs import logprob_loss
from grpo_fast.loss.config import LOSS_TYPES
from grpo_fast.ops.backends import backends

CPU = pytest.mark.skipif(not backends()["cpu"].usable, reason="needs the C++ extension")


@CPU
def test_bits_do_not_depend_on_the_batch() -> None:
    with gf.batch_invariant():
        for seed in range(9):
            RandomCall.random(seed).check(seed)


@CPU
@pytest.mark.sweep
def test_bits_of_many_random_batches() -> None:
    with gf.batch_invariant():
        for seed in range(1000):
            RandomCall.random(seed).check(seed)


@CPU
@pytest.mark.parametrize(
    ("backend", "sets", "config"),
    [
        ("aot_eager", False, None),
        pytest.param("aot_eager", True, None, marks=pytest.mark.sweep),
        pytest.param("inductor", True, gf.LossConfig(entropy_coef=0.2), marks=pytest.mark.sweep),
    ],
)
def test_bits_of_compiled_calls_do_not_depend_on_the_batch(backend: str, sets: bool, config: gf.LossConfig | None) -> None:
    torch._dynamo.reset()
    compiled = functools.partial(torch.compile, fullgraph=True, backend=backend)
    call = dataclasses.replace(RandomCall.random(4), config=config, processes=1, wrap=compiled)
    assert call.sets is not None
    call = call if sets else dataclasses.replace(call, sets=None)
    n = call.count
    first = torch.cat([torch.arange(n), torch.full((n,), -1)])  # calls of one shape, so that it is compiled once
    mixed = first[torch.randperm(2 * n)]
    with gf.batch_invariant():
        whole = call.run(first).of_tokens
        for at in (mixed, torch.where(mixed < n // 2, mixed, -1)):
            found = call.run(at).of_tokens
            different = [name for name, x in found.items() if not torch.equal(x[at >= 0], whole[name][at[at >= 0]])]
            assert not different


@CPU
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_the_loss_of_a_token_does_not_depend_on_its_place(loss_type: str) -> None:
    """Vectorised functions of PyTorch may compute the last elements of a tensor in another way than the others."""
    bound: dict[str, Any] = {"epsilon_high": 2.0} if loss_type == "cispo" else {}
    config = gf.LossConfig(loss_type=loss_type, beta=0.1, entropy_coef=0.1, aggregation="global_token_mean", **bound)
    old, noise, ref, advantages, rollout = torch.randn(5, 1500)
    of_tokens = [x.unsqueeze(1) for x in (old - 3, ref - 3, rollout.exp())]

    def gradient(at: slice) -> Tensor:  # every token is a sequence
        logprobs = (old - 3 + 0.3 * noise)[at].unsqueeze(1).requires_grad_()
        old_logprobs, ref_logprobs, weights = (x[at] for x in of_tokens)
        loss, _ = logprob_loss(
            logprobs, advantages[at], config=config, mask=torch.ones_like(logprobs), entropy=torch.ones_like(logprobs),
            old_logprobs=old_logprobs, ref_logprobs=ref_logprobs, rollout_weights=weights, num_items=NUM_ITEMS,
        )  # fmt: skip
        return torch.autograd.grad(loss, logprobs)[0]

    whole = gradient(slice(None))
    for begin in range(1, 1500, 37):
        part = slice(begin, begin + begin % 36 + 1)
        assert torch.equal(gradient(part), whole[part])


@CPU
@pytest.mark.parametrize("level", ["sequence", "sequence_token"])
def test_the_ratio_of_a_sequence_does_not_depend_on_padding_and_packing(level: str) -> None:
    """Over logits, without batch_invariant()."""
    config = gf.LossConfig(importance_sampling_level=level, epsilon_low=0.9, epsilon_high=50.0)

    def gradient(tokens: tuple[Tensor, ...], at: Tensor, rows: int | None) -> Tensor:
        """Of the logits of the first row; None: packed."""
        real = at >= 0
        logits, ids, advantages, old = (x[at.clamp(min=0)].expand(rows or 1, *([-1] * (x.dim()))) for x in tokens)
        options: dict[str, Any] = {"config": config, "num_items": NUM_ITEMS, "mask": real.expand(rows or 1, -1)}
        leaf = logits.clone().requires_grad_()
        if rows is None:
            options |= {"mask": None, "cu_seqlens": torch.tensor([0, len(at)])}
            out = gf.grpo_loss(leaf[0], ids[0], advantages[0], old_logprobs=old[0], **options)
        else:
            out = gf.grpo_loss(leaf, ids, advantages, old_logprobs=old, **options)
        (found,) = torch.autograd.grad(out.loss, leaf)
        return found[0, real]

    for n in (20, 71, 194, 299):
        tokens = (torch.randn(n, 30), torch.randint(30, (n,)), torch.randn(n), torch.randn(n) - 3)
        everything, padding = torch.arange(n), torch.full((33,), -1)
        whole = gradient(tokens, everything, None)
        for at, rows in ((everything, 1), (everything, 3), (torch.cat([padding, everything]), 1), (torch.cat([everything, padding]), 2)):
            assert torch.equal(gradient(tokens, at, rows), whole), (n, rows)


@CPU
@pytest.mark.parametrize("loss_type", ["dapo", "gspo"])
def test_gradients_of_the_loss_have_the_same_bits_in_any_chunks(loss_type: str) -> None:
    hidden, weight, ids = operands(200, 24, 150, torch.bfloat16)
    bias, adapter = torch.randn(150), (torch.randn(200, 3).bfloat16(), torch.randn(150, 3).bfloat16())
    options: dict[str, Any] = {
        "config": gf.LossConfig(loss_type=loss_type),
        "old_logprobs": torch.full((200,), -5.0),
        "cu_seqlens": torch.tensor([0, 90, 100, 200]),
        "num_items": 50,
    }

    def run(chunk: int) -> tuple[Tensor, ...]:
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias.bfloat16(), *adapter)]
        out = gf.linear_grpo_loss(
            leaves[0], leaves[1], ids, torch.randn(200, generator=torch.Generator().manual_seed(1)), bias=leaves[2],
            adapter=(leaves[3], leaves[4]), chunk_bytes=chunk * 700, **options,
        )  # fmt: skip
        out.loss.backward()
        recomputed.append(float(out.metrics["recomputed_fraction"]))
        return out.loss.detach(), out.logprobs, *(x.grad for x in leaves if x.grad is not None)

    recomputed: list[float] = []
    with gf.batch_invariant():
        whole, parts = run(512), run(70)
    assert len(whole) == 7 and all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
    assert recomputed == [0, 1 if loss_type == "gspo" else 0]


def test_batch_invariant_is_a_statement_a_block_and_a_decorator() -> None:
    from grpo_fast.ops.invariance import is_batch_invariant

    @gf.batch_invariant()
    def inside() -> bool:
        return is_batch_invariant()

    assert not is_batch_invariant() and inside() and not is_batch_invariant()
    with gf.batch_invariant():
        with gf.batch_invariant(False):
            assert not is_batch_invariant()
        assert is_batch_invariant()
    gf.batch_invariant()
    assert is_batch_invariant()
    gf.batch_invariant(False)
    assert not is_batch_invariant()
    with pytest.raises(TypeError, match="as a decorator it is called"):
        gf.batch_invariant(inside)  # type: ignore[arg-type]


def test_what_cannot_be_batch_invariant_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, ids = operands(3, 8, 20, torch.float32)
    with gf.batch_invariant():
        with pytest.raises(RuntimeError, match="weight is a callable"):
            gf.linear_token_logprobs(hidden, lambda x: x @ weight.T, ids)
        with gf.use_backend("reference"), pytest.raises(RuntimeError, match="the reference backend"):
            gf.linear_token_logprobs(hidden, weight, ids)
    monkeypatch.setattr("grpo_fast.ops.extension.load", lambda: False)
    with pytest.raises(RuntimeError, match="the C\\+\\+ extension is not usable"):
        products_for(Precision(torch.float32, torch.float32, True), torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_of_one_shape(dtype: torch.dtype) -> None:
    """What a GPU computes with batch invariance: a token's numbers are those of the token in a tile of zeros."""
    hidden, weight, _ = operands(19, 24, 60, dtype)
    products, bias = FixedShapeProducts(tile=8), torch.randn(60)
    out, alone = torch.empty(19, 60), torch.empty(1, 60)
    products.logits(out, hidden, weight, bias)
    products.add_logits(out, hidden, weight)
    torch.testing.assert_close(out, 2 * hidden.float() @ weight.float().T + bias, rtol=1e-4, atol=1e-4)
    products.logits(alone, hidden[8:9], weight, bias)
    products.add_logits(alone, hidden[8:9], weight)
    assert torch.equal(alone[0], out[8])
    d = torch.randn(19, 60).to(dtype)
    torch.testing.assert_close(products.hidden_gradient(d, weight), d @ weight)
    total, of_bias = torch.randn(60, 24), torch.randn(60)
    products.weight_gradient(total, d, hidden, add=False)
    products.bias_gradient(of_bias, d, add=False)
    torch.testing.assert_close(total, d.float().T @ hidden.float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(of_bias, d.float().sum(0), rtol=1e-4, atol=1e-4)
    parts = torch.empty_like(total)
    products.weight_gradient(parts, d[:16], hidden[:16], add=False)
    products.weight_gradient(parts, d[16:], hidden[16:], add=True)
    assert torch.equal(parts, total)
