"""The kernels against the float64 reference: value, gradient, log-probabilities, entropy and metrics, over every option."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import KEPT, random_case
from compare import assert_close, of_two_ulps
from hang import HANG

import grpo_fast as gf
from grpo_fast.loss.kernel_settings import loss_settings

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SEEDS = range(60)


def check(seed: int, dtype: torch.dtype) -> None:
    """One random case on the backend in force."""
    case = random_case(seed, dtype)
    out, gradient = case.run()
    with gf.use_backend("reference"):
        truth, true_gradient = case.run(case.logits.double(), inplace=False)
        naive, naive_gradient = case.run(inplace=False)
    # Log-probabilities are float32, so what depends on their small differences is known to an ulp of them, not of the difference: a loss
    # whose terms cancel, the KL near its minimum, VESPO's weight (k and lambda times as sensitive).
    config, steep = case.options["config"], 4 if case.options["config"].surrogate == "vespo" else 1
    loss_scale = steep * (truth.loss.abs().item() + true_gradient.abs().sum().item())
    gradient_scale = steep * true_gradient.abs().max().item() + config.beta * case.options["loss_scale"] * truth.logprobs.abs().max().item()
    ulps = of_two_ulps(truth.logprobs)
    assert_close(out.loss, truth.loss.double(), naive.loss, "loss", scale=loss_scale, slack=ulps * loss_scale)
    assert_close(gradient, true_gradient.double(), naive_gradient, "gradient", scale=gradient_scale, slack=ulps * gradient_scale)
    assert_close(out.logprobs, truth.logprobs, naive.logprobs, "logprobs")
    assert_close(out.entropy, truth.entropy, naive.entropy, "entropy")
    assert torch.equal(out.active, truth.active)
    assert set(out.metrics) == set(truth.metrics)
    for name, value in out.metrics.items():
        assert value.dtype == torch.float32 and value.dim() == 0
        size = max(1.0, truth.metrics[name].abs().item())
        assert_close(value, truth.metrics[name].double(), naive.metrics[name], f"metrics[{name!r}]", scale=size, slack=ulps * size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", SEEDS)
def test_random_options(seed: int, dtype: torch.dtype) -> None:
    check(seed, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(KEPT, KEPT + 30))
def test_random_options_with_kept_sets(seed: int, dtype: torch.dtype) -> None:
    check(seed, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("first", [1000, pytest.param(1100, marks=pytest.mark.sweep), pytest.param(1250, marks=pytest.mark.sweep)])
def test_many_random_options(first: int, dtype: torch.dtype) -> None:
    count = 100 if first == 1000 else 150
    for seed in (*range(first, first + count), *range(KEPT + first, KEPT + first + count // 2)):
        check(seed, dtype)


@pytest.mark.parametrize("isa", ["0", "1"])
def test_the_other_instruction_sets(isa: str) -> None:
    """The variants that this machine would not choose: the instruction set is read once per process, so in another one."""
    code = "import sys, torch; sys.path.insert(0, sys.argv[1]); torch.set_num_threads(1); from test_grpo_loss import check\n"
    code += "for dtype in (torch.float32, torch.bfloat16, torch.float16):\n"
    code += f"    for seed in (*range(25), *range({KEPT}, {KEPT} + 10)): check(seed, dtype)\n"
    code += "print('isa', torch.ops.grpo_fast.cpu_isa())"
    environment = {**os.environ, "GRPO_FAST_ISA": isa}
    done = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent)], env=environment, capture_output=True, text=True, check=False, timeout=HANG
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[-1]) <= int(isa)


def test_the_cases_carry_a_signal() -> None:
    """Were the ratios all inside the band, or the gradients all zero, the sweep above would prove little."""
    seen = {"clip_low": 0, "clip_high": 0, "inactive": 0, "confident": 0, "gradient": 0, "masked": 0}
    for seed in SEEDS:
        case = random_case(seed, torch.float32)
        out, gradient = case.run()
        seen["clip_low"] += out.metrics["clip_low"].item() > 0
        seen["clip_high"] += out.metrics["clip_high"].item() > 0
        seen["inactive"] += out.metrics["active_fraction"].item() < 1
        seen["confident"] += bool(((out.logprobs > -1e-3) & (out.logprobs < 0)).any())
        seen["gradient"] += gradient.abs().max().item() > 1e-4
        seen["masked"] += not out.active.all().item()
    assert min(seen.values()) >= 8, seen
    assert seen["gradient"] >= 50, seen


def test_the_comparison_rejects_a_zeroed_and_a_doubled_gradient() -> None:
    case = random_case(3, torch.bfloat16)
    with gf.use_backend("reference"):
        _, truth = case.run(case.logits.double(), inplace=False)
        _, naive = case.run(inplace=False)
    assert truth.abs().max() > 0
    for wrong in (torch.zeros_like(naive), 2 * naive):
        with pytest.raises(AssertionError, match="error"):
            assert_close(wrong, truth, naive, "gradient")


@pytest.mark.parametrize("name", ["beta", "entropy_coef", "squared_log_ratio_coef"])
def test_a_term_of_every_token_keeps_tokens_without_advantage(name: str) -> None:
    """Called with only_active, the operator computes them too."""
    logits, ids = torch.randn(1, 3, 300), torch.tensor([[5, 7, 9]])
    mask, one = torch.ones(1, 3, dtype=torch.bool), torch.ones(1, 1)
    old = torch.full((1, 3), -3.0)
    coefficient: dict[str, Any] = {name: 0.5}
    settings = loss_settings(gf.LossConfig(**coefficient))
    policy = (0.0 * one, one, one, old, old, None, None, 1.0, 0.0, 1.0, 1.0, settings)
    found = [torch.ops.grpo_fast.grpo_loss(logits, ids, mask, *policy, only_active, True) for only_active in (False, True)]
    assert found[0][0].abs() > 0.1 and found[0][4].abs().max() > 1e-3
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


@pytest.mark.parametrize("margin", [9.5, 14.0, 30.0, 60.0])
def test_confident_tokens_are_exact(margin: float) -> None:
    """At a margin of 14 nats s_y - lse rounds to 0 in float32; log-probability and gradient must keep their digits."""
    logits = torch.zeros(1, 1, 1000)
    logits[0, 0, 7] = margin + torch.tensor(999.0).log()  # so that p(others) / p(target) = exp(-margin)
    odds = torch.exp(logits[0, 0, 7].double()).reciprocal() * 999
    logits.requires_grad_()
    out = gf.grpo_loss(logits, torch.tensor([[7]]), torch.tensor([1.0]))
    out.loss.backward()
    assert logits.grad is not None
    expected = -torch.log1p(odds)
    assert abs(out.logprobs.item() / expected.item() - 1) < 1e-6
    assert out.logprobs.item() < 0
    target = -(odds / (1 + odds))  # d loss / d z_y = -A (1 - p_y)
    assert abs(logits.grad[0, 0, 7].item() / target.item() - 1) < 1e-6
    assert abs(logits.grad[0, 0, 8].item() / (-target.item() / 999) - 1) < 2e-6


@pytest.mark.parametrize("log_ratio", [200.0, -200.0])
@pytest.mark.parametrize("loss_type", list(gf.LOSS_TYPES))
def test_huge_log_ratios_stay_finite(loss_type: str, log_ratio: float) -> None:
    """On masked tokens, on tokens without an advantage, and on those that count: exp of it would overflow."""
    torch.manual_seed(0)
    logits = torch.randn(3, 4, 50, requires_grad=True)
    token_ids = torch.randint(50, (3, 4))
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 1, 1]])
    with torch.no_grad():
        old = gf.token_logprobs(logits, token_ids).logprobs - log_ratio
    config = gf.LossConfig(loss_type=loss_type, max_completion_length=4, beta=0.1)
    out = gf.grpo_loss(logits, token_ids, torch.tensor([0.0, 1.0, -1.0]), config=config, old_logprobs=old, ref_logprobs=old, mask=mask)
    out.loss.backward()
    assert logits.grad is not None
    assert torch.isfinite(out.loss) and torch.isfinite(logits.grad).all()
    assert (logits.grad[mask == 0] == 0).all()
    assert all(torch.isfinite(value) for value in out.metrics.values())


@pytest.mark.parametrize("shape", [(0, 4, 10), (2, 0, 10), (0, 0, 10)])
@pytest.mark.parametrize("loss_type", ["dapo", "gspo", "vespo"])
def test_empty_batches(shape: tuple[int, int, int], loss_type: str) -> None:
    logits = torch.zeros(shape, requires_grad=True)
    out = gf.grpo_loss(logits, torch.zeros(shape[:2], dtype=torch.long), torch.zeros(shape[0]), config=gf.LossConfig(loss_type=loss_type))
    out.loss.backward()
    assert out.loss.item() == 0
    assert logits.grad is not None and logits.grad.shape == shape


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "gspo", "vespo"])
def test_a_fully_masked_batch_gives_zero(loss_type: str) -> None:
    logits = torch.full((2, 3, 10), float("nan"), requires_grad=True)
    ids, mask = torch.full((2, 3), -100), torch.zeros(2, 3)
    out = gf.grpo_loss(logits, ids, torch.ones(2), mask=mask, config=gf.LossConfig(loss_type=loss_type, entropy_coef=0.1))
    out.loss.backward()
    assert logits.grad is not None
    assert out.loss.item() == 0 and (logits.grad == 0).all() and not any(value.item() for value in out.metrics.values())


def test_the_same_numbers_whatever_the_threads_and_the_run() -> None:
    case = random_case(5, torch.float32)
    case.options["inplace"] = False
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        out, gradient = case.run()
        results.append((out.loss, out.logprobs, out.entropy, *out.metrics.values(), gradient))
    torch.set_num_threads(1)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("config", [gf.LossConfig(), gf.LossConfig(loss_type="gspo")], ids=["one_pass", "sequence"])
def test_inplace_writes_over_the_logits_and_tells_autograd(config: gf.LossConfig) -> None:
    torch.manual_seed(0)
    leaf = torch.randn(2, 3, 40, requires_grad=True)
    ids, advantages = torch.randint(40, (2, 3)), torch.tensor([1.0, -2.0])
    expected = torch.autograd.grad(gf.grpo_loss(leaf, ids, advantages, config=config).loss, leaf)[0]
    hidden = leaf * 1
    out = gf.grpo_loss(hidden, ids, advantages, config=config, inplace=True)
    gradient = torch.autograd.grad(out.loss, hidden)[0]
    assert gradient.data_ptr() == hidden.data_ptr()
    assert torch.equal(gradient, expected)
    # exp saves its output for backward: writing over it must be noticed, not computed with
    hidden = leaf.exp()
    out = gf.grpo_loss(hidden, ids, advantages, config=config, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.loss.backward()


def test_an_upstream_gradient_other_than_one() -> None:
    case = random_case(7, torch.float32)
    case.options["inplace"] = False
    leaf = case.logits.clone().requires_grad_()
    options = {name: value for name, value in case.options.items() if name != "strided"}
    loss = gf.grpo_loss(leaf, case.token_ids, case.advantages, **options).loss
    once = torch.autograd.grad(loss, leaf, retain_graph=True)[0]
    half = torch.autograd.grad(0.5 * loss, leaf, retain_graph=True)[0]
    expanded = torch.autograd.grad(loss.expand(4).sum(), leaf)[0]  # an upstream gradient with stride 0
    assert torch.equal(half, 0.5 * once) and torch.equal(expanded, 4 * once)


def test_no_temporary_of_the_size_of_the_logits() -> None:
    """Beyond the gradient, memory is proportional to the number of tokens."""
    logits = torch.randn(64, 20000, requires_grad=True)
    ids = torch.randint(20000, (64,))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        out = gf.grpo_loss(logits, ids, torch.randn(64))
        out.loss.backward()
    sizes = sorted((event.self_cpu_memory_usage for event in profile.key_averages()), reverse=True)
    gradient_bytes = logits.numel() * 4
    assert gradient_bytes <= sizes[0] < 1.01 * gradient_bytes
    assert sum(size for size in sizes[1:] if size > 0) < 64 * 1024
