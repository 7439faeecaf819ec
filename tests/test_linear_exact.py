"""The head with 16-bit operands against float64 of the same operands, and the same bits whatever stands beside a token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from linear_cases import random_linear_case
from torch import Tensor

import grpo_fast as gf
from grpo_fast.head.precision import Precision
from grpo_fast.head.products import FixedShapeProducts, Products, products_for
from grpo_fast.ops.backends import backends
from grpo_fast.ops.rounding import rounded_

HALF = [torch.bfloat16, torch.float16]
CPU = pytest.mark.skipif(not backends()["cpu"].usable, reason="needs the C++ extension")


def operands(
    tokens: int, width: int, vocabulary: int, dtype: torch.dtype, seed: int = 0, std: float = 2.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, a weight with which logits have this standard deviation, and token ids."""
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(tokens, width, generator=generator), torch.randn(vocabulary, width, generator=generator)
    return hidden.to(dtype), (weight * std / width**0.5).to(dtype), torch.randint(vocabulary, (tokens,), generator=generator)


def check_logprobs(hidden: Tensor, weight: Tensor, ids: Tensor, **options: Any) -> None:
    found, gaps = gf.linear_token_logprobs(hidden, weight, ids, **options), []
    for rows in torch.arange(len(ids)).split(32):
        expected = torch.cat([hidden[rows].double() @ part.double().T for part in weight.split(16384)], 1).log_softmax(-1)
        of_logprobs = found.logprobs[rows] - expected.gather(1, ids[rows, None]).squeeze(1)
        gaps.append(torch.stack([of_logprobs, found.entropy[rows] + (expected.exp() * expected).sum(1)]).abs())
    gap = torch.cat(gaps, 1)
    assert gap.max() < 1e-5 and (gap.mean(1) < 1e-6).all(), (gap.max(), gap.mean(1))


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_logprobs_are_those_of_float64(dtype: torch.dtype) -> None:
    check_logprobs(*operands(48, 128, 4003, dtype))


@pytest.mark.sweep
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_logprobs_of_a_large_vocabulary_are_those_of_float64(dtype: torch.dtype) -> None:
    check_logprobs(*operands(256, 896, 151_936, dtype, std=4.0))


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_without_the_extension_logits_are_float32_too(dtype: torch.dtype) -> None:
    hidden, weight, _ = operands(7, 40, 301, dtype)
    bias, exact = torch.randn(301), hidden.double() @ weight.double().T
    out, adapted = torch.empty(7, 304)[:, :301], exact + bias
    Products().logits(out, hidden, weight, bias)
    torch.testing.assert_close(out.double(), adapted, rtol=1e-5, atol=1e-5)
    Products().add_logits(out, hidden, weight)
    torch.testing.assert_close(out.double(), adapted + exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_the_gradient_has_the_error_of_one_rounding(dtype: torch.dtype) -> None:
    """Of every element: at most the sum of the magnitudes in its product times the rounding of one factor, and of the result."""
    hidden, weight, ids = operands(64, 96, 2001, dtype)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    g = torch.randn(64)
    (gf.linear_token_logprobs(hidden, weight, ids, keep_bytes=0).logprobs * g).sum().backward()
    h, w = (x.detach().double() for x in (hidden, weight))
    d = g.double()[:, None] * (torch.nn.functional.one_hot(ids, 2001) - (h @ w.T).softmax(-1))
    unit = torch.finfo(dtype).eps / 2
    subnormal = torch.finfo(dtype).smallest_normal * unit * 2  # spacing of the smallest numbers
    for found, expected, magnitudes in ((hidden.grad, d @ w, d.abs() @ w.abs()), (weight.grad, d.T @ h, d.abs().T @ h.abs())):
        assert found is not None
        bound = (unit * 1.01 + 1e-5) * magnitudes + unit * 1.01 * expected.abs() + subnormal * 64
        assert ((found.double() - expected).abs() <= bound).all()


def test_input_rounds_the_logits_as_the_model_does() -> None:
    hidden, weight, ids = operands(9, 64, 300, torch.bfloat16)
    found = gf.linear_token_logprobs(hidden, weight, ids, logits_dtype="input")
    expected = gf.token_logprobs((hidden @ weight.T).unsqueeze(0), ids.unsqueeze(0))
    assert torch.equal(found.logprobs, expected.logprobs[0])
    assert not torch.equal(found.logprobs, gf.linear_token_logprobs(hidden, weight, ids).logprobs)
    with pytest.raises(ValueError, match=r"logits_dtype is 'bfloat16'; expected 'float32', or 'input'.*Fix"):
        gf.linear_token_logprobs(hidden, weight, ids, logits_dtype="bfloat16")
    with pytest.raises(ValueError, match="logits_dtype is 32"):
        gf.LinearGRPOLoss(logits_dtype=32)  # type: ignore[arg-type]
    advantages = torch.ones(9)
    as_input = gf.LinearGRPOLoss(logits_dtype="input")(hidden, weight, ids, advantages)
    assert torch.equal(as_input.logprobs, found.logprobs)


def test_a_callables_logits_are_converted_once() -> None:
    hidden, weight, ids = operands(9, 64, 300, torch.bfloat16)
    hidden.requires_grad_()
    found = gf.linear_token_logprobs(hidden, lambda x: x @ weight.T, ids)
    logits = (hidden.detach() @ weight.T).float()
    assert torch.equal(found.logprobs, gf.token_logprobs(logits.unsqueeze(0), ids.unsqueeze(0)).logprobs[0])
    found.logprobs.sum().backward()
    assert hidden.grad is not None and hidden.grad.isfinite().all()


def test_rounding_in_place() -> None:
    rows = torch.randn(5, 1004)[:, :1001]
    expected = rows.to(torch.bfloat16)
    found = rounded_(rows, torch.bfloat16)
    assert torch.equal(found, expected) and found.data_ptr() == rows.data_ptr() and found.stride(0) % 8 == 0


def errors_of_gradients(seeds: range) -> list[float]:
    """Relative errors against float64 of random calls in which no ratio lies near a bound of the clip."""
    errors = []
    for seed in seeds:
        case = random_linear_case(seed, HALF[seed % 2])
        with gf.use_backend("reference"):
            exact, expected = case.run(torch.float64)
        old, config = case.options.get("old_logprobs"), case.options.get("config", gf.LossConfig())
        if old is not None:
            ratio = (exact.logprobs.double() - old).exp()
            bounds = [1 - (config.epsilon_low or 0), 1 + (config.epsilon_high or config.epsilon_low or 0)]
            if any(((ratio - bound).abs() < 1e-4).any() for bound in bounds):
                continue
        _, found = case.run()
        norm = torch.cat([x.double().flatten() for x in expected.values()]).norm()
        gap = torch.cat([(found[name].double() - x.double()).flatten() for name, x in expected.items()]).norm()
        rounded = {name: x.to(found[name].dtype).double() for name, x in expected.items()}
        of_rounding = torch.cat([(rounded[name] - x.double()).flatten() for name, x in expected.items()]).norm()
        # Gradients below the smallest numbers of float16 cannot be returned: no result of that dtype is nearer.
        if norm > 0 and of_rounding < 5e-3 * norm:
            errors.append(float(gap / norm))
    return errors


def check_errors(errors: list[float]) -> None:
    assert max(errors) < 2e-2, max(errors)
    assert sorted(errors)[int(0.95 * len(errors))] < 5e-3


def test_random_calls_against_float64() -> None:
    check_errors(errors_of_gradients(range(40)))


@pytest.mark.sweep
def test_many_random_calls_against_float64() -> None:
    check_errors(errors_of_gradients(range(1000)))


def one_batch(seed: int) -> None:
    """Each token alone, in a batch, permuted, padded, among masked tokens and in other chunks, by other numbers of threads."""
    generator = torch.Generator().manual_seed(seed)
    n, width, vocabulary = (int(torch.randint(low, high, (), generator=generator)) for low, high in ((3, 150), (5, 70), (9, 300)))
    dtype = (*HALF, torch.float32)[seed % 3]
    hidden, weight, ids = operands(n, width, vocabulary, dtype, seed)
    g, h = torch.randn(2, n, generator=generator)
    row = vocabulary * 4 + 64

    def run(x: Tensor, at: Tensor, chunk: int = 512, trainable: bool = True, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        x, w = x.detach().clone().requires_grad_(), weight.clone().requires_grad_(trainable)
        safe = at.clamp(min=0)
        out = gf.linear_token_logprobs(x, w, ids[safe], mask=mask, chunk_bytes=chunk * row)
        upstream = [torch.where(at >= 0, y[safe], 0) for y in (g, h)]
        ((out.logprobs * upstream[0]) + (out.entropy * upstream[1])).sum().backward()
        assert x.grad is not None
        return out.logprobs.detach(), out.entropy.detach(), x.grad, w.grad if w.grad is not None else x.new_empty(0)

    everything = torch.arange(n)
    whole = run(hidden, everything)

    def check(found: tuple[Tensor, ...], at: Tensor, of_weight: bool) -> None:
        kept = at >= 0
        for a, b in zip(found[:3], whole[:3], strict=True):
            assert torch.equal(a[kept], b[at[kept]])
        assert not of_weight or torch.equal(found[3], whole[3])

    for chunk in (1, 70, 128):
        check(run(hidden, everything, chunk), everything, True)
    check(run(hidden, everything, trainable=False), everything, False)
    order = torch.randperm(n, generator=generator)
    check(run(hidden[order], order), order, False)
    one = order[:1]
    check(run(hidden[one], one), one, False)
    padded = torch.full((2 * n,), -1)
    padded[torch.randperm(2 * n, generator=generator)[:n].sort().values] = everything
    filled = torch.where((padded >= 0)[:, None], hidden[padded.clamp(min=0)], torch.nan)
    check(run(filled, padded, 64, mask=padded >= 0), padded, True)
    threads = torch.get_num_threads()
    torch.set_num_threads(2 if threads == 1 else 1)
    try:
        check(run(hidden, everything), everything, True)
    finally:
        torch.set_num_threads(threads)


@CPU
def test_bits_do_not_depend_on_the_batch() -> None:
    with gf.batch_invariant():
        for seed in range(6):
            one_batch(seed)


@CPU
@pytest.mark.sweep
def test_bits_of_many_random_batches() -> None:
    with gf.batch_invariant():
        for seed in range(1000):
            one_batch(seed)


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


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_rows_of_an_odd_vocabulary_are_aligned(dtype: torch.dtype) -> None:
    for name in ("float32", "input"):
        precision = Precision.of(dtype, name, False)
        device = torch.device("meta")  # as on a GPU
        logits = precision.new_logits(3, 1001, device)
        assert logits.shape == (3, 1001) and logits.stride(0) * logits.element_size() % 16 == 0
        assert precision.row_bytes(1001, device) == logits.stride(0) * logits.element_size() > 1001 * logits.element_size()
        assert precision.rows_per_chunk(10 * precision.row_bytes(1001, device), 1001, device) == 10
        assert precision.new_logits(3, 1001, torch.device("cpu")).is_contiguous()


def test_row_operators_take_padded_rows() -> None:
    logits, ids = torch.randn(1, 5, 1004), torch.randint(1001, (1, 5))
    padded = logits.clone()
    padded[..., 1001:] = torch.nan
    scored = [gf.token_logprobs(x, ids).logprobs for x in (padded[..., :1001], logits[..., :1001].contiguous())]
    assert torch.equal(*scored)
