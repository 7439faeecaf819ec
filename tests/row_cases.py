"""Tests of single rows with the Triton kernels, on any device: offsets and targets, rows in parts, rows on which the estimated reference is
wrong, and some of the tests of test_grpo_loss.py.

A module that collects these tests (``from row_cases import *``) defines a fixture ``device`` and selects the backend and small blocks:
triton_interpreter.py on the CPU, test_triton_rows.py on a GPU.
"""

from __future__ import annotations

import itertools
from typing import Any

import compare
import pytest
import test_grpo_loss
import torch
from bfloat16_gradient import check_bfloat16_gradient
from test_triton import far_apart
from torch import Tensor
from vocabulary_cases import big

import grpo_fast as gf
from grpo_fast.kernels import grpo_loss as grpo_loss_module
from grpo_fast.kernels import token_logprobs as kernels
from grpo_fast.kernels.scale import BLOCK as SCALE_BLOCK
from grpo_fast.kernels.scale import scale_
from grpo_fast.kernels.token_logprobs import LogitRows, Scoring, token_gradient, token_logprobs_bwd, token_logprobs_fwd
from grpo_fast.loss import reference
from grpo_fast.loss.kernel_settings import loss_settings
from grpo_fast.ops import triton_registration as triton_ops

EPSILON = 2.0**-24


def normal(*shape: int, seed: int, device: str) -> Tensor:
    """The same numbers on every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


# ---- one row: its offset, its target, its parts


def truth_of(rows: LogitRows, scoring: Scoring, g: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(logprobs, entropy, gradient) in float64."""
    leaf = rows.logits.double().requires_grad_()
    temperature = scoring.temperature if scoring.temperatures is None else scoring.temperatures.double()
    logprobs, entropy = reference.token_statistics(leaf, rows.token_ids, temperature, scoring.softcap or None, scoring.logit_scale)
    (gradient,) = torch.autograd.grad((logprobs * g + entropy * h).sum(), leaf)
    return logprobs.detach(), entropy.detach(), gradient


def check_rows(rows: LogitRows, scoring: Scoring, *, parts: int = 1, gradient: Tensor | None = None) -> None:
    g, h = normal(2, *rows.token_ids.shape, seed=1, device=rows.logits.device.type)
    true_logprobs, true_entropy, true_gradient = truth_of(rows, scoring, g, h)
    logprobs, entropy, lse = token_logprobs_fwd(rows, scoring, parts=parts)
    # The rounding of the temperature and of a sum: the accuracy of float32 for log-probabilities of this size.
    size = 1 + true_logprobs.abs().max().item()
    assert (logprobs - true_logprobs).abs().max().item() <= 16 * EPSILON * size
    assert (entropy - true_entropy).abs().max().item() <= 64 * EPSILON * size
    if gradient is None:
        gradient = token_logprobs_bwd(g, h, rows, scoring, logprobs, entropy, lse, parts=parts)
    else:
        token_gradient(rows, scoring, g, h, logprobs, entropy, lse, gradient, parts=parts)
    size = true_gradient.abs().max().item()
    rounding, least = (0.0, 0.0) if gradient.dtype == torch.float32 else (compare.ALLOWANCE[gradient.dtype], 1e-7)
    error = (gradient.double() - true_gradient).abs()
    assert (error <= rounding * true_gradient.abs() + 128 * EPSILON * size + least).all(), error.max()


def rows_with_targets(vocabulary: int, targets: list[int], dtype: torch.dtype, device: str, shift: int = 0) -> LogitRows:
    """One row per target; the first row begins ``shift`` elements after a 16-byte boundary, and all around it is NaN."""
    memory = torch.full((16 + len(targets) * vocabulary + 16,), float("nan"), dtype=dtype, device=device)
    logits = memory[shift : shift + len(targets) * vocabulary].view(1, len(targets), vocabulary)
    logits.copy_(normal(*logits.shape, seed=vocabulary, device=device) * 3)
    return LogitRows(logits, torch.tensor([targets], device=device), torch.ones(1, len(targets), dtype=torch.bool, device=device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("blocks", "more"), [(0, 2), (0, 3), (0, 7), (0, 8), (0, 9), (0, 16), (0, 17), (1, -1), (1, 0), (1, 1), (1, 8), (4, 13)]
)
def test_every_place_of_the_target_and_of_the_row(blocks: int, more: int, dtype: torch.dtype, device: str) -> None:
    """Edges, plain blocks, the partial one, the boundaries between them: odd vocabularies put each row on another offset."""
    block = kernels.BLOCK
    vocabulary = blocks * block + more
    around = [*range(2), *range(6, 10), block - 2, block - 1, block, block + 7, block + 8, 2 * block, 4 * block + 7, 4 * block + 8]
    targets = sorted({target for target in around if target < vocabulary} | {vocabulary - 1})
    for shift, parts in ((0, 1), (3, 2), (5, blocks + 2)):  # the last: more parts than there are blocks
        check_rows(rows_with_targets(vocabulary, targets, dtype, device, shift), Scoring(None, 0.7, 0.0, 1.0), parts=parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_soft_cap_scale_and_temperatures(dtype: torch.dtype, device: str) -> None:
    block = kernels.SOFTCAP_BLOCK
    rows = rows_with_targets(2 * block + 11, [0, 100, block + 44, 2 * block - 1, 2 * block + 10], dtype, device, 2)
    temperatures, one = torch.tensor([[0.3, 0.7, 1.0, 1.3, 2.0]], device=device), torch.full((1, 1), 0.6, device=device)
    for (i, softcap), (k, own) in itertools.product(enumerate((0.0, 2.0, 30.0)), enumerate((None, temperatures, one))):
        if dtype == torch.float32 or i == k:  # float32: each pair of values; another type: each value
            check_rows(rows, Scoring(own, 0.8, softcap, (1.0, 0.25)[(i + k) % 2 if dtype == torch.float32 else i % 2]), parts=2)


def test_the_gradient_goes_where_the_logits_lie_or_anywhere_else(device: str) -> None:
    vocabulary = 2 * kernels.BLOCK + 11
    targets = [0, 100, kernels.BLOCK + 44, vocabulary - 12, vocabulary - 1]
    rows = rows_with_targets(vocabulary, targets, torch.float32, device, 2)
    scoring = Scoring(None, 0.9, 0.0, 1.0)
    statistics = token_logprobs_fwd(rows, scoring)
    g, h = normal(1, 5, seed=2, device=device), torch.zeros(1, 1, device=device)
    expected = token_logprobs_bwd(g, h, rows, scoring, *statistics)
    assert not kernels.same_phase(rows.logits, expected), "the case is of no use: the rows are to lie on other offsets than the gradient's"
    torch.testing.assert_close(expected.double(), truth_of(rows, scoring, g, h)[2], rtol=1e-5, atol=1e-7)
    for parts in (1, 3):
        copied = LogitRows(rows_with_targets(vocabulary, targets, torch.float32, device, 2).logits.copy_(rows.logits), *rows[1:])
        assert token_logprobs_bwd(g, h, copied, scoring, *statistics, inplace=True, parts=parts) is copied.logits
        torch.testing.assert_close(copied.logits, expected, rtol=1e-6, atol=1e-9)
    padded = torch.full((1, 5, vocabulary + 77), float("nan"), device=device)
    inside = padded[..., 7 : 7 + vocabulary]
    token_gradient(rows, scoring, g, h, *statistics, inside)
    torch.testing.assert_close(inside, expected, rtol=1e-6, atol=1e-9)
    assert padded[..., :7].isnan().all() and padded[..., 7 + vocabulary :].isnan().all()


def test_rows_without_a_gradient_are_cleared_and_not_read(device: str) -> None:
    vocabulary = kernels.BLOCK + 44
    rows = rows_with_targets(vocabulary, [0, 5, vocabulary - 1, 7], torch.float32, device, 1)
    rows.logits[:, :3] = float("nan")
    rows.token_ids[0, 0] = -100
    rows.mask[0, 0] = False
    g, h = torch.tensor([[float("nan"), 0.0, 0.0, 1.0]], device=device), torch.zeros(1, 4, device=device)
    statistics = [torch.full((1, 4), x, device=device) for x in (-5.0, 1.0, 5.0)]
    for parts in (1, 3):
        gradient = token_logprobs_bwd(g, h, rows, Scoring(None, 1.0, 0.0, 1.0), *statistics, parts=parts)
        assert (gradient[:, :3] == 0).all() and gradient[:, 3].isfinite().all() and (gradient[:, 3] != 0).any()


def test_without_the_entropy_the_rest_is_the_same(device: str) -> None:
    rows = rows_with_targets(4 * kernels.BLOCK + 13, [3, 4 * kernels.BLOCK - 24], torch.bfloat16, device)
    scoring = Scoring(None, 0.6, 0.0, 1.0)
    logprobs, _, lse = token_logprobs_fwd(rows, scoring)
    quick_logprobs, _, quick_lse = token_logprobs_fwd(rows, scoring, want_entropy=False)
    assert torch.equal(logprobs, quick_logprobs) and torch.equal(lse, quick_lse)


def test_rows_that_lie_two_to_the_31_apart(device: str) -> None:
    """The same bits as of rows side by side; the gradient where the logits lie, scaled there."""
    vocabulary = 2 * kernels.BLOCK + 16
    rows, scoring = rows_with_targets(vocabulary, [100, vocabulary - 1], torch.float16, device), Scoring(None, 0.7, 0.0, 1.0)
    g, h = torch.tensor([[0.7, -0.3]], device=device), torch.tensor([[0.1, 0.2]], device=device)
    results = []
    for logits in (rows.logits.clone(), far_apart(rows.logits)):
        own = LogitRows(logits, *rows[1:])
        statistics = token_logprobs_fwd(own, scoring, parts=2)
        gradient = token_logprobs_bwd(g, h, own, scoring, *statistics, inplace=True, parts=2)
        results.append((*statistics, scale_(gradient, torch.tensor(0.5, device=device)).clone()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_largest_vocabularies(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr(kernels, "BLOCK", 4096)
    for vocabulary in (2**18, 2**18 + 1):
        check_rows(rows_with_targets(vocabulary, [7, vocabulary - 1], torch.bfloat16, device), Scoring(None, 0.7, 0.0, 1.0), parts=3)


# ---- rows on which the estimated reference of the sums is wrong


def far_ahead(logits: Tensor) -> None:
    logits[..., 1500] += 500.0  # far above all columns that the estimate uses


def far_behind(logits: Tensor) -> None:
    logits += torch.linspace(0, -3000, logits.shape[-1], device=logits.device)


def masked_start(logits: Tensor) -> None:
    logits[..., :1400] = float("-inf")


def alone(logits: Tensor) -> None:
    target = logits[..., 1450].clone()
    logits[...] = float("-inf")
    logits[..., 1450] = target


def offset(logits: Tensor) -> None:
    logits += 2000.0


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("change", [far_ahead, far_behind, masked_start, alone, offset], ids=lambda change: change.__name__)
def test_rows_on_which_the_estimated_reference_is_wrong(change: Any, parts: int, device: str) -> None:
    logits = normal(1, 1, 1600, seed=3, device=device)
    change(logits)
    rows = LogitRows(logits, torch.tensor([[1450]], device=device), torch.ones(1, 1, dtype=torch.bool, device=device))
    scoring, g, h = Scoring(None, 1.0, 0.0, 1.0), torch.tensor([[0.7]], device=device), torch.tensor([[0.2]], device=device)
    finite = torch.where(logits == float("-inf"), -1e30, logits)  # the gradient of the reference does not allow -inf
    true_logprobs, true_entropy, true_gradient = truth_of(LogitRows(finite, *rows[1:]), scoring, g, h)
    logprobs, entropy, lse = token_logprobs_fwd(rows, scoring, parts=parts)
    assert logprobs.item() == pytest.approx(true_logprobs.item(), rel=1e-5, abs=1e-30)
    assert entropy.item() == pytest.approx(true_entropy.item(), rel=1e-5, abs=1e-5)
    gradient = token_logprobs_bwd(g, h, rows, scoring, logprobs, entropy, lse, parts=parts)
    tolerance = 1e-5 * max(1.0, lse.abs().item() * 8 * EPSILON / 1e-5)  # lse is one float32
    torch.testing.assert_close(gradient.double(), true_gradient, rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("margin", [9.5, 14.0, 30.0, 60.0, 80.0])
def test_confident_tokens_keep_their_digits(margin: float, device: str) -> None:
    logits = torch.zeros(1, 1, 1000, device=device)
    logits[0, 0, 7] = margin + torch.tensor(999.0).log()
    odds = torch.exp(logits[0, 0, 7].double()).reciprocal().cpu() * 999
    rows = LogitRows(logits, torch.tensor([[7]], device=device), torch.ones(1, 1, dtype=torch.bool, device=device))
    scoring = Scoring(None, 1.0, 0.0, 1.0)
    statistics = token_logprobs_fwd(rows, scoring)
    relative = 8 * EPSILON * (margin + 10)  # of an exponential of such an argument
    assert abs(statistics[0].item() / -torch.log1p(odds).item() - 1) < relative
    g, h = torch.ones(1, 1, device=device), torch.zeros(1, 1, device=device)
    gradient = token_logprobs_bwd(g, h, rows, scoring, *statistics)
    assert abs(gradient[0, 0, 7].item() / (odds / (1 + odds)).item() - 1) < relative
    assert abs(gradient[0, 0, 8].item() / (-odds / (1 + odds) / 999).item() - 1) < relative


def test_a_row_is_the_same_bits_alone_and_among_others(device: str) -> None:
    vocabulary = 4 * kernels.BLOCK + 16
    rows = rows_with_targets(vocabulary, [0, 3 * kernels.BLOCK - 68, vocabulary - 1], torch.float32, device)
    scoring = Scoring(None, 0.6, 0.0, 1.0)
    together = token_logprobs_fwd(rows, scoring)
    for i in range(3):
        alone = token_logprobs_fwd(
            LogitRows(rows.logits[:, i : i + 1], rows.token_ids[:, i : i + 1], rows.mask[:, i : i + 1]), scoring, parts=1
        )
        again = token_logprobs_fwd(rows, scoring, parts=1)
        assert all(torch.equal(a[0, i], b[0, 0]) for a, b in zip(again, alone, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(together, token_logprobs_fwd(rows, scoring), strict=True))


# ---- the upstream gradient


@pytest.mark.parametrize("count", [1, 100, SCALE_BLOCK, 2 * SCALE_BLOCK + 17])
def test_scaling_in_place(count: int, device: str) -> None:
    x = torch.randn(count, device=device)
    expected = x.clone()
    assert scale_(x, torch.tensor(1.0, device=device)) is x and torch.equal(x, expected)
    assert torch.equal(scale_(x, torch.tensor(0.25, device=device)), 0.25 * expected)


@pytest.mark.parametrize("shape", [(1, 1, SCALE_BLOCK + 5), (3, 2, 7), (2, 5, 133)])
def test_scaling_of_rows_that_lie_apart(shape: tuple[int, int, int], device: str) -> None:
    """The gradient in place of logits that are a view: rows on every offset, and what lies between them stays."""
    dtype = torch.bfloat16 if shape[2] == 7 else torch.float32
    wide = torch.randn(shape[0], shape[1] + 1, shape[2] + 6, dtype=dtype, device=device)
    expected = wide.clone()
    x = wide[:, :-1, 3:-3]
    assert scale_(x, torch.tensor(1.0, device=device)) is x and torch.equal(wide, expected)
    expected[:, :-1, 3:-3] *= 0.25
    scale_(x, torch.tensor(0.25, device=device))
    assert torch.equal(wide, expected)


def test_scaling_by_one_reads_and_writes_nothing(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """Also for rows that are not contiguous: no multiplication by torch, which would read and write all of it."""
    monkeypatch.setattr(Tensor, "mul_", lambda *_: pytest.fail("a product by torch"))
    x = torch.randn(2, 4, 33, device=device)[:, :-1]
    before = x.clone()
    with triton_ops.interpreted_on_cpu(device == "cpu"):
        torch.ops.grpo_fast.scale_gradient_(x, torch.tensor(1.0, device=device))
    assert not x.is_contiguous() and torch.equal(x, before)


# ---- the loss


def test_more_tokens_than_one_program_takes(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """Several programs write totals, more than one block of the kernel that adds them."""
    for module in (kernels, grpo_loss_module):
        monkeypatch.setattr(module, "TOKENS_BLOCK", 16)
    tokens = 5 * 16 + 3
    logits, mask = normal(1, tokens, 5, seed=0, device=device), normal(1, tokens, seed=1, device=device) < 0.8
    ids, advantages = torch.arange(tokens, device=device).view(1, -1) % 5, normal(1, tokens, seed=2, device=device)
    old = normal(1, tokens, seed=3, device=device) * 0.3 - 1.6
    call: dict[str, Any] = {"old_logprobs": old, "ref_logprobs": old, "mask": mask, "config": gf.LossConfig(loss_type="grpo", beta=0.1)}
    out = gf.grpo_loss(logits, ids, advantages, **call)
    with gf.use_backend("reference"):
        truth = gf.grpo_loss(logits.double(), ids, advantages, **call)
    assert out.loss.item() == pytest.approx(truth.loss.item(), rel=1e-5, abs=1e-7)
    for name, value in truth.metrics.items():
        assert out.metrics[name].item() == pytest.approx(value.item(), rel=1e-5), name


def test_ids_out_of_range_turn_the_loss_and_their_gradient_into_nan(device: str) -> None:
    logits, one = torch.randn(1, 3, 300, device=device), torch.tensor(1.0, device=device)
    ids, mask = torch.tensor([[5, 300, -1]], device=device), torch.ones(1, 3, dtype=torch.bool, device=device)
    settings = loss_settings(gf.LossConfig())
    arguments = (logits, ids, mask, one.view(1, 1), one, *[None] * 5, 1.0, 0.0, 1.0, 1.0, settings, False)
    loss, logprobs, _, _, gradient = torch.ops.grpo_fast.grpo_loss(*arguments, True)
    assert loss.isnan() and logprobs[0, 0].isfinite() and logprobs[0, 1:].isnan().all()
    assert gradient[0, 0].isfinite().all() and gradient[0, 1:].isnan().all()


@pytest.mark.parametrize("name", ["beta", "entropy_coef", "squared_log_ratio_coef"])
def test_a_term_of_every_token_keeps_tokens_without_advantage(name: str, device: str) -> None:
    with torch.device(device):
        test_grpo_loss.test_a_term_of_every_token_keeps_tokens_without_advantage(name)


@pytest.mark.parametrize("loss_type", ["dapo", "cispo", "sapo", "gspo", "gmpo", "dppo_tv", "dppo_kl", "reinforce"])
def test_huge_log_ratios_stay_finite(loss_type: str, device: str) -> None:
    with torch.device(device):
        for log_ratio in (200.0, -200.0):
            test_grpo_loss.test_huge_log_ratios_stay_finite(loss_type, log_ratio)


@pytest.mark.parametrize("shape", [(0, 4, 10), (2, 0, 10)])
def test_empty_batches(shape: tuple[int, int, int], device: str) -> None:
    with torch.device(device):
        test_grpo_loss.test_empty_batches(shape, "dapo")


def test_a_fully_masked_batch_gives_zero(device: str) -> None:
    with torch.device(device):
        test_grpo_loss.test_a_fully_masked_batch_gives_zero("dapo")


@pytest.mark.parametrize("config", [gf.LossConfig(), gf.LossConfig(loss_type="gspo")], ids=["one_pass", "sequence"])
def test_inplace_writes_over_the_logits_and_tells_autograd(config: gf.LossConfig, device: str) -> None:
    with torch.device(device):
        test_grpo_loss.test_inplace_writes_over_the_logits_and_tells_autograd(config)


def test_an_upstream_gradient_other_than_one(device: str) -> None:
    vocabulary = 5 * kernels.BLOCK - 120  # 5000 on a GPU
    call = big(20, vocabulary, torch.float32, device)
    loss = gf.grpo_loss(**call).loss
    once = torch.autograd.grad(loss, call["logits"], retain_graph=True)[0]
    kept = once.clone()
    half = torch.autograd.grad(0.5 * loss, call["logits"], retain_graph=True)[0]
    assert torch.equal(half, 0.5 * kept) and torch.equal(once, kept)
    fourfold = torch.autograd.grad(loss.expand(4).sum(), call["logits"])[0]
    assert torch.equal(fourfold, 4 * kept)
    view = (call["logits"] * 1).view(4, 5, vocabulary)[:, :-1]  # overwritten in place, with gaps between the rows
    rest = (call["token_ids"].view(4, 5)[:, :-1], call["advantages"].view(4, 5)[:, :-1])
    expected = torch.autograd.grad(gf.grpo_loss(view, *rest).loss, call["logits"], retain_graph=True)[0]
    found = torch.autograd.grad(0.5 * gf.grpo_loss(view, *rest, inplace=True).loss, call["logits"])[0]
    assert torch.equal(found, 0.5 * expected)


def test_autocast(device: str) -> None:
    call = big(7, 300, torch.float32, device)
    expected = gf.grpo_loss(**call).loss
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(gf.grpo_loss(**call).loss, expected)


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_bfloat16_gradient_of_float32_logits(device: str, softcap: float) -> None:
    check_bfloat16_gradient(device, softcap)


def test_opcheck(device: str) -> None:
    logits = normal(2, 3, 13, seed=0, device=device)
    ids, mask = torch.tensor([[3, 0], [12, 7]], device=device), torch.tensor([[True, False], [True, True]], device=device)
    per_token, weight = normal(2, 2, seed=1, device=device) - 3, torch.tensor(0.2, device=device)
    tensors = (normal(2, 1, seed=2, device=device), weight, weight, per_token, per_token.clone(), None, None)
    rest = (ids, mask, *tensors, 0.7, 0.0, 1.0, 1.0, loss_settings(gf.LossConfig(beta=0.1, entropy_coef=0.1)), False)
    operators = torch.ops.grpo_fast
    torch.library.opcheck(operators.grpo_loss.default, (logits.clone().requires_grad_(), *rest, True))
    torch.library.opcheck(operators.grpo_loss_.default, (logits.clone(), *rest))
    scoring = (ids, mask, torch.full((1, 1), 0.7, device=device), 1.0, 5.0, 0.5)
    torch.library.opcheck(operators.token_logprobs.default, (logits.clone().requires_grad_(), *scoring))
    statistics = operators.token_logprobs(logits, *scoring)
    for operator in (operators.token_logprobs_backward.default, operators.token_logprobs_backward_.default):
        torch.library.opcheck(operator, (torch.ones(1, 1, device=device).expand(2, 2), per_token, logits.clone(), *scoring, *statistics))
