"""The Triton kernels in Triton's interpreter, on CPU tensors, against the float64 reference.

Whether a kernel is interpreted is decided when it is defined, so test_triton.py runs this file in a process of its own. By hand:
TRITON_INTERPRET=1 python -m pytest tests/triton_interpreter.py
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before Python starts; tests/test_triton.py sees to it", allow_module_level=True)

import compare
import test_grpo_loss
import test_linear
from cases import random_case
from test_triton import far_apart

import grpo_fast as gf
from grpo_fast import reference, triton_ops
from grpo_fast.kernels import grpo_loss as grpo_loss_module
from grpo_fast.kernels import token_logprobs as kernels
from grpo_fast.kernels.scale import BLOCK as SCALE_BLOCK
from grpo_fast.kernels.scale import scale_
from grpo_fast.kernels.token_logprobs import Rows, Scoring, token_gradient, token_logprobs_bwd, token_logprobs_fwd
from grpo_fast.ops import loss_settings

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SEEDS = range(25)
BLOCK = 256  # small, so that a small vocabulary has plain blocks, the target's and a partial one
EPSILON = 2.0**-24

# Triton's interpreter cuts a float32 off to a bfloat16 where hardware rounds: up to one unit in the last place, not half of one.
ALLOWANCE = {**compare.ALLOWANCE, torch.bfloat16: 2.0**-7 + 2.0**-19}


@pytest.fixture(autouse=True)
def in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("BLOCK", "SOFTCAP_BLOCK"):
        monkeypatch.setattr(kernels, name, BLOCK)
    monkeypatch.setattr(grpo_loss_module, "TOTAL_BLOCK", 2)
    monkeypatch.setattr(compare, "ALLOWANCE", ALLOWANCE)
    with gf.use_backend("triton"):
        yield


@pytest.fixture
def split(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Force the number of programs per row."""

    def force(parts: int) -> None:
        monkeypatch.setattr(kernels, "parts_of", lambda *_: parts)

    return force


# ---- the loss, over every option


@pytest.mark.parametrize("seed", SEEDS)
def test_random_options(seed: int, split: Any) -> None:
    split(1 + seed // 3 % 3)
    test_grpo_loss.check(seed, DTYPES[seed % 3])


@pytest.mark.parametrize("seed", range(6))
def test_the_head(seed: int) -> None:
    """Chunks of logits from hidden states, in one pass and in two."""
    test_linear.check(seed, DTYPES[seed % 2])


def test_the_random_options_are_all_there() -> None:
    configs = [random_case(seed, torch.float32).options["config"] for seed in SEEDS]
    assert {config.surrogate for config in configs} == {"clip", "cispo", "sapo", "vespo", "reinforce"}
    assert {config.level for config in configs} == {"token", "sequence", "sequence_token"}
    assert {config.kl_estimator for config in configs if config.beta} == {"k1", "k2", "k3"}
    assert any(config.bias_corrected_kl and config.beta for config in configs) and any(config.entropy_coef for config in configs)


@pytest.mark.sweep
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_random_options(dtype: torch.dtype, split: Any) -> None:
    for seed in (*SEEDS, *range(2000, 2060)):
        split(1 + seed % 4)
        test_grpo_loss.check(seed, dtype)


@pytest.mark.parametrize("loss_type", ["dapo", "cispo", "sapo", "gspo", "reinforce"])
def test_huge_log_ratios_stay_finite(loss_type: str) -> None:
    for log_ratio in (200.0, -200.0):
        test_grpo_loss.test_huge_log_ratios_stay_finite(loss_type, log_ratio)


@pytest.mark.parametrize("shape", [(0, 4, 10), (2, 0, 10)])
def test_empty_batches(shape: tuple[int, int, int]) -> None:
    test_grpo_loss.test_empty_batches(shape, "dapo")


def test_a_fully_masked_batch_gives_zero() -> None:
    test_grpo_loss.test_a_fully_masked_batch_gives_zero("dapo")


@pytest.mark.parametrize("config", [gf.LossConfig(), gf.LossConfig(loss_type="gspo")], ids=["one_pass", "sequence"])
def test_inplace_writes_over_the_logits_and_tells_autograd(config: gf.LossConfig) -> None:
    test_grpo_loss.test_inplace_writes_over_the_logits_and_tells_autograd(config)


def test_more_tokens_than_one_program_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several programs leave totals, and these are more than one block of the kernel that adds them up."""
    for module in (kernels, grpo_loss_module):
        monkeypatch.setattr(module, "TOKENS_BLOCK", 16)
    tokens = 5 * 16 + 3
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, tokens, 5, generator=generator)
    ids = torch.randint(5, (1, tokens), generator=generator)
    advantages, mask = torch.randn(1, tokens, generator=generator), torch.rand(1, tokens, generator=generator) < 0.8
    old = torch.randn(1, tokens, generator=generator) * 0.3 - 1.6
    call: dict[str, Any] = {"old_logprobs": old, "ref_logprobs": old, "mask": mask, "config": gf.LossConfig(loss_type="grpo", beta=0.1)}
    out = gf.grpo_loss(logits, ids, advantages, **call)
    with gf.use_backend("reference"):
        truth = gf.grpo_loss(logits.double(), ids, advantages, **call)
    assert out.loss.item() == pytest.approx(truth.loss.item(), rel=1e-5, abs=1e-7)
    for name, value in truth.metrics.items():
        assert out.metrics[name].item() == pytest.approx(value.item(), rel=1e-5), name


def test_ids_out_of_range_turn_the_loss_and_their_gradient_into_nan() -> None:
    logits = torch.randn(1, 3, 300)
    ids, mask = torch.tensor([[5, 300, -1]]), torch.ones(1, 3, dtype=torch.bool)
    arguments = (
        logits,
        ids,
        mask,
        torch.ones(1, 1),
        torch.tensor(1.0),
        *[None] * 5,
        1.0,
        0.0,
        1.0,
        1.0,
        loss_settings(gf.LossConfig()),
        False,
    )
    loss, logprobs, _, _, gradient = torch.ops.grpo_fast.grpo_loss(*arguments, True)
    assert loss.isnan() and logprobs[0, 0].isfinite() and logprobs[0, 1:].isnan().all()
    assert gradient[0, 0].isfinite().all() and gradient[0, 1:].isnan().all()


# ---- one row: where it begins and ends, where the target is, who computes which part


def truth_of(rows: Rows, scoring: Scoring, g: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(logprobs, entropy, gradient) in float64."""
    leaf = rows.logits.double().requires_grad_()
    temperature = scoring.temperature if scoring.temperatures is None else scoring.temperatures.double()
    logprobs, entropy = reference.token_statistics(leaf, rows.token_ids, temperature, scoring.softcap or None, scoring.logit_scale)
    (gradient,) = torch.autograd.grad((logprobs * g + entropy * h).sum(), leaf)
    return logprobs.detach(), entropy.detach(), gradient


def check_rows(rows: Rows, scoring: Scoring, *, parts: int = 1, gradient: Tensor | None = None) -> None:
    generator = torch.Generator().manual_seed(1)
    g, h = (torch.randn(rows.token_ids.shape, generator=generator) for _ in range(2))
    true_logprobs, true_entropy, true_gradient = truth_of(rows, scoring, g, h)
    logprobs, entropy, lse = token_logprobs_fwd(rows, scoring, parts=parts)
    # A change of the temperature's last digit, and of a sum's: what float32 can know of log-probabilities of this size.
    size = 1 + true_logprobs.abs().max().item()
    assert (logprobs - true_logprobs).abs().max().item() <= 16 * EPSILON * size
    assert (entropy - true_entropy).abs().max().item() <= 64 * EPSILON * size
    if gradient is None:
        gradient = token_logprobs_bwd(g, h, rows, scoring, logprobs, entropy, lse, parts=parts)
    else:
        token_gradient(rows, scoring, g, h, logprobs, entropy, lse, gradient, parts=parts)
    size = true_gradient.abs().max().item()
    rounding = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7}[gradient.dtype]
    error = (gradient.double() - true_gradient).abs()
    assert (error <= rounding * true_gradient.abs() + 128 * EPSILON * size + 1e-7 * (rounding > 0)).all(), error.max()


def rows_with_targets(vocabulary: int, targets: list[int], dtype: torch.dtype, shift: int = 0) -> Rows:
    """One row per target; the first row begins ``shift`` elements after a 16-byte boundary, and all around it is NaN."""
    generator = torch.Generator().manual_seed(vocabulary)
    memory = torch.full((16 + len(targets) * vocabulary + 16,), float("nan"), dtype=dtype)
    logits = memory[shift : shift + len(targets) * vocabulary].view(1, len(targets), vocabulary)
    logits.copy_(torch.randn(logits.shape, generator=generator) * 3)
    return Rows(logits, torch.tensor([targets]), torch.ones(1, len(targets), dtype=torch.bool))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocabulary", [2, 3, 7, 8, 9, 16, 17, 255, 256, 257, 264, 1037])
def test_every_place_of_the_target_and_of_the_row(vocabulary: int, dtype: torch.dtype) -> None:
    """Edges, plain blocks, the partial one, the boundaries between them: odd vocabularies put each row on another offset."""
    targets = sorted({t for t in (0, 1, 6, 7, 8, 9, 254, 255, 256, 263, 264, 512, 1031, 1032) if t < vocabulary} | {vocabulary - 1})
    for shift, parts in ((0, 1), (3, 2), (5, 7)):
        check_rows(rows_with_targets(vocabulary, targets, dtype, shift), Scoring(None, 0.7, 0.0, 1.0), parts=parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_soft_cap_scale_and_temperatures(dtype: torch.dtype) -> None:
    rows = rows_with_targets(523, [0, 100, 300, 511, 522], dtype, 2)
    temperatures = torch.tensor([[0.3, 0.7, 1.0, 1.3, 2.0]])
    for softcap, logit_scale, own in itertools.product((0.0, 2.0, 30.0), (1.0, 0.25), (None, temperatures, torch.full((1, 1), 0.6))):
        check_rows(rows, Scoring(own, 0.8, softcap, logit_scale), parts=2)


def test_the_gradient_goes_where_the_logits_lie_or_anywhere_else() -> None:
    rows = rows_with_targets(523, [0, 100, 300, 511, 522], torch.float32, 2)
    scoring = Scoring(None, 0.9, 0.0, 1.0)
    statistics = token_logprobs_fwd(rows, scoring)
    g, h = torch.randn(1, 5), torch.zeros(1, 1)
    expected = token_logprobs_bwd(g, h, rows, scoring, *statistics)
    assert not kernels.same_phase(rows.logits, expected), "the case is of no use: the rows are to lie on other offsets than the gradient's"
    for parts in (1, 3):
        copied = Rows(rows_with_targets(523, [0] * 5, torch.float32, 2).logits.copy_(rows.logits), *rows[1:])
        assert token_logprobs_bwd(g, h, copied, scoring, *statistics, inplace=True, parts=parts) is copied.logits
        torch.testing.assert_close(copied.logits, expected, rtol=1e-6, atol=1e-9)
    padded = torch.full((1, 5, 600), float("nan"))
    token_gradient(rows, scoring, g, h, *statistics, padded[..., 7:530])
    torch.testing.assert_close(padded[..., 7:530], expected, rtol=1e-6, atol=1e-9)
    assert padded[..., :7].isnan().all() and padded[..., 530:].isnan().all()


def test_rows_without_a_gradient_are_cleared_and_not_read() -> None:
    rows = rows_with_targets(300, [0, 5, 299, 7], torch.float32, 1)
    rows.logits[:, :3] = float("nan")
    rows.token_ids[0, 0] = -100
    rows.mask[0, 0] = False
    g, h = torch.tensor([[float("nan"), 0.0, 0.0, 1.0]]), torch.zeros(1, 4)
    statistics = (torch.full((1, 4), -5.0), torch.ones(1, 4), torch.full((1, 4), 5.0))
    for parts in (1, 3):
        gradient = token_logprobs_bwd(g, h, rows, Scoring(None, 1.0, 0.0, 1.0), *statistics, parts=parts)
        assert (gradient[:, :3] == 0).all() and gradient[:, 3].isfinite().all() and (gradient[:, 3] != 0).any()


def test_without_the_entropy_the_rest_is_the_same() -> None:
    rows = rows_with_targets(1037, [3, 1000], torch.bfloat16)
    scoring = Scoring(None, 0.6, 0.0, 1.0)
    logprobs, _, lse = token_logprobs_fwd(rows, scoring)
    quick_logprobs, _, quick_lse = token_logprobs_fwd(rows, scoring, want_entropy=False)
    assert torch.equal(logprobs, quick_logprobs) and torch.equal(lse, quick_lse)


def test_rows_that_lie_two_to_the_31_apart() -> None:
    """The same bits as of rows side by side; the gradient where the logits lie, scaled there."""
    rows, scoring = rows_with_targets(528, [100, 527], torch.float16), Scoring(None, 0.7, 0.0, 1.0)
    g, h = torch.tensor([[0.7, -0.3]]), torch.tensor([[0.1, 0.2]])
    results = []
    for logits in (rows.logits.clone(), far_apart(rows.logits)):
        own = Rows(logits, *rows[1:])
        statistics = token_logprobs_fwd(own, scoring, parts=2)
        gradient = scale_(token_logprobs_bwd(g, h, own, scoring, *statistics, inplace=True, parts=2), torch.tensor(0.5))
        results.append((*statistics, gradient))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_largest_vocabularies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "BLOCK", 4096)
    for vocabulary in (2**18, 2**18 + 1):
        check_rows(rows_with_targets(vocabulary, [7, vocabulary - 1], torch.bfloat16), Scoring(None, 0.7, 0.0, 1.0), parts=3)


# ---- the reference of the sums is a guess: rows on which it is wrong


def far_ahead(logits: Tensor) -> None:
    logits[..., 1500] += 500.0  # nothing that the guess looks at is near it


def far_behind(logits: Tensor) -> None:
    logits += torch.linspace(0, -3000, logits.shape[-1])


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
def test_rows_on_which_the_guess_is_wrong(change: Any, parts: int) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(1, 1, 1600, generator=generator)
    change(logits)
    rows = Rows(logits, torch.tensor([[1450]]), torch.ones(1, 1, dtype=torch.bool))
    scoring, g, h = Scoring(None, 1.0, 0.0, 1.0), torch.tensor([[0.7]]), torch.tensor([[0.2]])
    finite = torch.where(logits == float("-inf"), -1e30, logits)  # the reference's gradient knows no -inf
    true_logprobs, true_entropy, true_gradient = truth_of(Rows(finite, *rows[1:]), scoring, g, h)
    logprobs, entropy, lse = token_logprobs_fwd(rows, scoring, parts=parts)
    assert logprobs.item() == pytest.approx(true_logprobs.item(), rel=1e-5, abs=1e-30)
    assert entropy.item() == pytest.approx(true_entropy.item(), rel=1e-5, abs=1e-5)
    gradient = token_logprobs_bwd(g, h, rows, scoring, logprobs, entropy, lse, parts=parts)
    tolerance = 1e-5 * max(1.0, lse.abs().item() * 8 * EPSILON / 1e-5)  # lse is one float32
    torch.testing.assert_close(gradient.double(), true_gradient, rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("margin", [9.5, 14.0, 30.0, 60.0, 80.0])
def test_confident_tokens_keep_their_digits(margin: float) -> None:
    logits = torch.zeros(1, 1, 1000)
    logits[0, 0, 7] = margin + torch.tensor(999.0).log()
    odds = torch.exp(logits[0, 0, 7].double()).reciprocal() * 999
    rows, scoring = Rows(logits, torch.tensor([[7]]), torch.ones(1, 1, dtype=torch.bool)), Scoring(None, 1.0, 0.0, 1.0)
    statistics = token_logprobs_fwd(rows, scoring)
    relative = 8 * EPSILON * (margin + 10)  # of an exponential of such an argument
    assert abs(statistics[0].item() / -torch.log1p(odds).item() - 1) < relative
    gradient = token_logprobs_bwd(torch.ones(1, 1), torch.zeros(1, 1), rows, scoring, *statistics)
    assert abs(gradient[0, 0, 7].item() / (odds / (1 + odds)).item() - 1) < relative
    assert abs(gradient[0, 0, 8].item() / (-odds / (1 + odds) / 999).item() - 1) < relative


def test_a_row_is_the_same_bits_alone_and_among_others() -> None:
    rows, scoring = rows_with_targets(1040, [0, 700, 1039], torch.float32), Scoring(None, 0.6, 0.0, 1.0)
    together = token_logprobs_fwd(rows, scoring)
    for i in range(3):
        alone = token_logprobs_fwd(Rows(rows.logits[:, i : i + 1], rows.token_ids[:, i : i + 1], rows.mask[:, i : i + 1]), scoring, parts=1)
        again = token_logprobs_fwd(rows, scoring, parts=1)
        assert all(torch.equal(a[0, i], b[0, 0]) for a, b in zip(again, alone, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(together, token_logprobs_fwd(rows, scoring), strict=True))


# ---- the upstream gradient


@pytest.mark.parametrize("count", [1, 100, SCALE_BLOCK, 2 * SCALE_BLOCK + 17])
def test_scaling_in_place(count: int) -> None:
    x = torch.randn(count)
    expected = x.clone()
    assert scale_(x, torch.tensor(1.0)) is x and torch.equal(x, expected)
    assert torch.equal(scale_(x, torch.tensor(0.25)), 0.25 * expected)


@pytest.mark.parametrize("shape", [(1, 1, SCALE_BLOCK + 5), (3, 2, 7), (2, 5, 133)])
def test_scaling_of_rows_that_lie_apart(shape: tuple[int, int, int]) -> None:
    """The gradient in place of logits that are a view: rows on every offset, and what lies between them stays."""
    wide = torch.randn(shape[0], shape[1] + 1, shape[2] + 6, dtype=torch.bfloat16 if shape[2] == 7 else torch.float32)
    expected = wide.clone()
    x = wide[:, :-1, 3:-3]
    assert scale_(x, torch.tensor(1.0)) is x and torch.equal(wide, expected)
    expected[:, :-1, 3:-3] *= 0.25
    scale_(x, torch.tensor(0.25))
    assert torch.equal(wide, expected)


def test_what_is_scaled_by_one_is_not_walked_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it lies apart: no product by torch, which would read and write it all."""
    monkeypatch.setattr(triton_ops, "_on_its_device", lambda launch: launch)  # the CPU is no device to be on
    monkeypatch.setattr(Tensor, "mul_", lambda *_: pytest.fail("a product by torch"))
    x = torch.randn(2, 4, 33)[:, :-1]
    assert not x.is_contiguous() and triton_ops.scaled_(x, torch.tensor(1.0)) is x


# ---- what bench/gpu_bench.py times on a GPU


def test_the_contestants_of_the_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them but torch.compile and the clusters, past the gate."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "bench"))
    import gpu_bench

    results = gpu_bench.Results(tmp_path / "gpu.json", "bench", "cpu")
    gpu_bench.one_shape(12, 301, gpu_bench.Timer("cpu", 1), "cpu", float("inf"), results)
    found = {(entry["step"], entry["name"]): entry for entry in results.whole["bench"]}
    steps = {("loss", "ours"), ("loss", "ours_inplace"), ("logprobs", "ours"), ("logprobs+entropy", "ours"), ("gradient", "ours")}
    if gpu_bench.imported("liger_kernel.ops.grpo_loss", "GrpoLossFunction"):
        steps |= {("loss", "liger")}
    if gpu_bench.imported("trl.trainer.utils", "selective_log_softmax_and_entropy"):
        steps |= {("loss", "trl"), ("loss", "trl_entropy"), ("logprobs", "trl")}
    wrong = {key: entry for key, entry in found.items() if "error" in entry and not key[1].startswith("ours_cluster")}
    assert steps <= set(found) and not wrong, wrong
    assert "expected an NVIDIA GPU" in found["loss", "ours_cluster"]["error"]


def test_what_tuning_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every launch past the gate, really by the kernels as they are launched then, and the fastest told."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "bench"))
    import gpu_bench
    import gpu_tune

    monkeypatch.setattr(gpu_tune, "PROGRAMS", ((64, 1), (128, 2)))
    monkeypatch.setattr(gpu_tune, "PER_MULTIPROCESSOR", (8,))
    monkeypatch.setattr(gpu_tune, "CLUSTERS", ("2x3",))
    launched = []
    original = kernels.parts_of

    def seen(rows: int, vocabulary: int, block: int, device: torch.device, parts: int | None) -> int:
        launched.append((block, kernels.WARPS, found := original(rows, vocabulary, block, device, parts)))
        return found

    monkeypatch.setattr(kernels, "parts_of", seen)
    results = gpu_bench.Results(tmp_path / "gpu.json", "tune", "cpu")
    gpu_tune.tune([(3, 301)], gpu_bench.Timer("cpu", 1), "cpu", float("inf"), results)
    entries = {(entry["step"], entry["launch"]): entry for entry in results.whole["tune"] if "launch" in entry}
    launches = ("now", "64 columns, 1 warps", "128 columns, 2 warps", "8 programs per multiprocessor")
    for step in ("logprobs", "logprobs+entropy", "gradient"):
        assert all(entries[step, launch]["error_of_allowed"] <= 1 for launch in launches), entries
    assert {(kernels.BLOCK, kernels.WARPS, 2), (64, 1, 2), (128, 2, 2)} <= set(launched)
    assert "expected an NVIDIA GPU" in entries["loss", "2x3 clusters"]["error"]
    told = gpu_tune.fastest(results.whole["tune"]).splitlines()
    assert [line.split(",")[0] for line in told] == ["logprobs", "logprobs+entropy", "gradient"]


# ---- as operators


def test_opcheck() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 37, generator=generator)
    ids, mask = torch.randint(37, (2, 3), generator=generator), torch.tensor([[True, True, False], [True, True, True]])
    per_token, weight = torch.randn(2, 3, generator=generator) - 3, torch.tensor(0.2)
    config = gf.LossConfig(beta=0.1, entropy_coef=0.1)
    tensors = (torch.randn(2, 1), weight, weight, per_token, per_token.clone(), None, None)
    rest = (ids, mask, *tensors, 0.7, 0.0, 1.0, 1.0, loss_settings(config), False)
    operators = torch.ops.grpo_fast
    torch.library.opcheck(operators.grpo_loss.default, (logits.clone().requires_grad_(), *rest, True))
    torch.library.opcheck(operators.grpo_loss_.default, (logits.clone(), *rest))
    scoring = (ids, mask, torch.full((1, 1), 0.7), 1.0, 5.0, 0.5)
    torch.library.opcheck(operators.token_logprobs.default, (logits.clone().requires_grad_(), *scoring))
    statistics = operators.token_logprobs(logits, *scoring)
    for operator in (operators.token_logprobs_backward.default, operators.token_logprobs_backward_.default):
        torch.library.opcheck(operator, (torch.ones(1, 1).expand(2, 3), per_token, logits.clone(), *scoring, *statistics))


def test_compile_without_graph_breaks() -> None:
    logits = torch.randn(2, 3, 50, requires_grad=True)
    ids, advantages = torch.randint(50, (2, 3)), torch.tensor([1.0, -1.0])

    def step(x: Tensor) -> Tensor:
        return gf.grpo_loss(x * 2, ids, advantages, temperature=0.6).loss

    eager = torch.autograd.grad(step(logits), logits)[0]
    compiled = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(logits), logits)[0]
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-7)


def test_the_cpu_kernels_are_back_afterwards() -> None:
    logits, ids, mask = torch.randn(1, 2, 9), torch.tensor([[1, 2]]), torch.ones(1, 2, dtype=torch.bool)
    seen = []
    original = kernels.token_sums

    def counted(*arguments: Any, **options: Any) -> Tensor:
        seen.append(1)
        return original(*arguments, **options)

    kernels.token_sums, before = counted, original
    try:
        gf.token_logprobs(logits, ids, mask=mask)
        assert len(seen) == 1
        with gf.use_backend("reference"):
            gf.token_logprobs(logits, ids, mask=mask)
        if gf.backends()["cpu"].usable:
            with gf.use_backend("cpu"):
                gf.token_logprobs(logits, ids, mask=mask)
        assert len(seen) == 1
        gf.token_logprobs(logits, ids, mask=mask)
        assert len(seen) == 2
    finally:
        kernels.token_sums = before
