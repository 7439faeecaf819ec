"""group_advantages: every implementation against tables made by hand, exact rational arithmetic, the float64 reference and TRL.

The CUDA kernel runs here too, without a GPU: its source compiled for the CPU on the stand-in of tests/cuda_on_host.
"""

from __future__ import annotations

import ast
import doctest
import importlib.util
import itertools
import json
import math
import re
import statistics
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from advantage_cases import CSRC, NAN, Backend, assert_close, needs_compiler, needs_extension, truth
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import grpo_fast as gf
from grpo_fast.loss import advantages as advantages_module
from grpo_fast.loss.advantages import BASELINES, GroupAdvantages, group_advantages
from grpo_fast.ops import build

pytest_plugins = ["advantage_cases"]

# (scale, baseline, normalize): those of standard deviations over completions; test_advantage_estimators.py has the others
SCALES = advantages_module.SCALES[:3]
MODES = [(s, b, "sum_then_normalize") for s in SCALES for b in BASELINES] + [("group", b, "normalize_then_sum") for b in BASELINES]


# ---- the comparison


@pytest.mark.parametrize("spoil", [lambda x: x * 0, lambda x: x * 2, lambda x: x * (1 + 1e-6), lambda x: x + 1e-6])
def test_the_comparison_rejects_wrong_results(spoil):
    expected = truth(torch.tensor([0.0, 1, 2, 5]), group_size=4)
    advantages, mean, std = (x.float() for x in expected[:3])
    right = GroupAdvantages(advantages, mean, std, expected[3])
    assert_close(right, expected)
    for field in ("advantages", "mean", "std"):
        with pytest.raises(AssertionError):
            assert_close(right._replace(**{field: spoil(getattr(right, field))}), expected)
    with pytest.raises(AssertionError):
        assert_close(right._replace(degenerate=~right.degenerate), expected)


# ---- tables to be checked with a pencil: eps = 0


# mean 2, std 2 | all equal | empty | one | one unscorable, the others: mean 3, std 2
GROUPS: list[list[float]] = [[0, 2, 4], [1, 1, 1], [], [5], [NAN, 1, 3, 5]]
OFFSETS = [0, 3, 6, 6, 7, 11]
TABLE: dict[tuple[str, str], list[float]] = {  # (scale, baseline): advantages; leave-one-out is times 3/2 for three that count
    ("none", "mean"): [-2, 0, 2, 0, 0, 0, 0, 0, -2, 0, 2],
    ("none", "leave_one_out"): [-3, 0, 3, 0, 0, 0, 0, 0, -3, 0, 3],
    ("group", "mean"): [-1, 0, 1, 0, 0, 0, 0, 0, -1, 0, 1],
    ("group", "leave_one_out"): [-1.5, 0, 1.5, 0, 0, 0, 0, 0, -1.5, 0, 1.5],
}


@pytest.mark.parametrize("offsets_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("scale", "baseline"), TABLE)
def test_table_of_groups(backend, scale, baseline, offsets_dtype):
    offsets = torch.tensor(OFFSETS, dtype=offsets_dtype)
    result = backend(torch.tensor(list(itertools.chain(*GROUPS))), group_offsets=offsets, scale=scale, baseline=baseline, eps=0)
    expected: tuple[Any, ...] = TABLE[scale, baseline], [2.0, 1, 0, 5, 3], [2.0, 0, 0, 0, 2], [False, True, True, True, False]
    assert_close(result, tuple(torch.tensor(x) if isinstance(x[0], bool) else torch.tensor(x).double() for x in expected))


def test_table_of_batch_scale(backend):
    # 1, 3 | 1, 5 | 5: the five have mean 3 and centred squares 4 + 0 + 4 + 4 + 4 = 16 = 4 * 2^2, so the batch's std is 2
    result = backend(torch.tensor([1.0, 3, 1, 5, 5]), group_offsets=torch.tensor([0, 2, 4, 5]), scale="batch", eps=0)
    assert result.advantages.tolist() == [-0.5, 0.5, -1, 1, 0]
    assert result.mean.tolist() == [2, 3, 5]
    assert result.degenerate.tolist() == [False, False, True]


def test_table_of_several_rewards(backend):
    # weights 1 and 2; "does not apply" is left out of the sum; the fourth has nothing to be scored by
    rewards = torch.tensor([[0.0, 0], [NAN, 1], [4, NAN], [NAN, NAN]])  # sums 0, 2, 4 and none: mean 2, std 2
    result = backend(rewards, group_size=4, reward_weights=[1, 2], eps=0)
    assert result.advantages.tolist() == [-1, 0, 1, 0]
    assert (result.mean.item(), result.std.item(), result.degenerate.item()) == (2, 2, False)


def test_table_of_gdpo(backend):
    # first group: A gives -1, 0, 1 and B, all equal, nothing. Second: B gives 1, 0, -1 (times its weight 3), A nothing.
    # y = -1, 0, 1, 3, 0, -3: squares 20 = 5 * 2^2, so the batch's std is 2
    rewards = torch.tensor([[0.0, 3], [2, 3], [4, 3], [1, 4], [1, 2], [1, 0]])
    result = backend(rewards, group_size=3, normalize="normalize_then_sum", reward_weights=torch.tensor([1.0, 3]), eps=0)
    assert result.advantages.tolist() == [-0.5, 0, 0.5, 1.5, 0, -1.5]
    assert result.mean.tolist() == [11, 7]  # of the weighted sums, for logging: 9, 11, 13 and 13, 7, 1
    assert result.std.tolist() == [2, 6]
    assert result.degenerate.tolist() == [False, False]


def test_gdpo_keeps_the_signal_of_equal_sums(backend):
    rewards = torch.tensor([[0.0, 3], [2, 2], [4, 1], [9, 0], [9, 0], [9, 0]])
    arguments = {"group_size": 3, "reward_weights": [1, 2], "eps": 0}
    summed = backend(rewards, **arguments)  # 6, 6, 6 and 9, 9, 9
    assert (summed.advantages == 0).all()
    assert summed.degenerate.all()
    # A gives -1, 0, 1 and B 1, 0, -1 times 2: y = 1, 0, -1 and zeros, squares 2 = 5 * 0.4
    decoupled = backend(rewards, normalize="normalize_then_sum", **arguments)
    expected = torch.tensor([1.0, 0, -1, 0, 0, 0]).double() / math.sqrt(0.4)
    assert_close(decoupled, (expected, torch.tensor([6.0, 9]).double(), torch.zeros(2).double(), torch.tensor([False, True])))


# ---- where others fail


# 0.1 and friends have no exact mean in floating point; the last ones are where float32 has steps of 0.06 and 8
NASTY = [0.7, 0.1, 100.1, 1 / 3, -0.3, 1e-3, 1e6 + 0.1, 1e-30, 12345.678, 3.3333e20, 999999.9, 1.1e8]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("scale", "baseline", "normalize"), MODES)
def test_equal_rewards_give_exactly_zero(backend, scale, baseline, normalize, dtype):
    sizes = range(1, 65) if backend.name != "cuda_on_host" else (1, 2, 3, 7, 8, 12, 24, 31, 32, 33, 64)
    groups = [torch.full((size,), value, dtype=dtype) for size in sizes for value in NASTY]
    for group in groups[1::2]:  # half of them with unscorable members, some with no other
        group[torch.arange(len(group)) % 3 == 0] = NAN
    offsets = torch.tensor([0, *itertools.accumulate(map(len, groups))])
    result = backend(torch.cat(groups), group_offsets=offsets, scale=scale, baseline=baseline, normalize=normalize, eps=1e-9)
    assert (result.advantages == 0).all()
    assert (result.std == 0).all()
    assert result.degenerate.all()


@pytest.mark.parametrize("eps", [0, 1e-4])
@pytest.mark.parametrize(("scale", "baseline", "normalize"), MODES)
def test_equal_groups_are_zero_beside_others(backend, scale, baseline, normalize, eps):
    rewards = torch.tensor([[0.7] * 8, [100.1] * 8, [0, 1, 0.3, 0.7, 0.1, NAN, 1, 0]]).flatten()
    weighted = torch.stack([rewards, rewards], 1)
    for x, weights in ((rewards, None), (weighted, [0.3, 0.9])):
        result = backend(x, group_size=8, scale=scale, baseline=baseline, normalize=normalize, eps=eps, reward_weights=weights)
        assert (result.advantages[:16] == 0).all()
        assert result.advantages[16:].isfinite().all()
        assert (result.advantages[16:] != 0).sum() == 7
        assert result.degenerate.tolist() == [True, True, False]


@pytest.mark.parametrize(("scale", "baseline", "normalize"), MODES)
@pytest.mark.parametrize("value", [0.7, NAN])
def test_a_batch_of_equal_rewards_without_eps(backend, scale, baseline, normalize, value):
    result = backend(torch.full((24,), value), group_size=8, scale=scale, baseline=baseline, normalize=normalize, eps=0)
    assert (result.advantages == 0).all()
    assert result.degenerate.all()


def exact(values: list[float], eps: float) -> list[float]:
    """(x - mean) / (std + eps), the mean in rational numbers."""
    fractions = [Fraction(v) for v in values]
    mean = sum(fractions) / len(fractions)
    std = math.sqrt(sum((x - mean) ** 2 for x in fractions) / (len(fractions) - 1))
    assert math.isclose(std, statistics.stdev(values), rel_tol=1e-9)
    return [float(x - mean) / (std + eps) for x in fractions]


ILL_CONDITIONED = [
    [1000.0, 1000.1, 1000.2, 1000.3],
    [1e6, 1e6 + 0.25, 1e6 + 0.5, 1e6],
    [1e-8, 2e-8, 4e-8],
    [-3e30, 1e30, 0, 1],
    [0.0, 1.0] * 50,
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("values", ILL_CONDITIONED)
def test_ill_conditioned_groups(backend, values, dtype):
    rewards = torch.tensor(values, dtype=dtype)
    result = backend(rewards, group_size=len(values), eps=1e-12)
    torch.testing.assert_close(result.advantages.double(), torch.tensor(exact(rewards.tolist(), 1e-12)).double(), rtol=2e-7, atol=1e-9)


def test_float64_rewards_keep_their_digits(backend):
    rewards = torch.tensor([1e9, 1e9 + 1, 1e9 + 2, 1e9 + 3], dtype=torch.float64)  # all equal in float32
    assert_close(backend(rewards, group_size=4), (torch.tensor(exact(rewards.tolist(), 1e-4)).double(), *truth(rewards, group_size=4)[1:]))
    integers = torch.tensor([2**24, 2**24 + 1, 2**24 + 2])  # the middle one does not exist in float32
    assert backend(integers, group_size=3, eps=0).advantages.tolist() == [-1, 0, 1]


def test_leave_one_out_has_one_scale_within_a_group(backend):
    # One sample whose siblings are all equal: a std without the sample itself would be 0 for it and not for them.
    rewards = torch.tensor([0.0] + [0.35] * 7)
    group, mean = (backend(rewards, group_size=8, baseline=b, scale="group").advantages.double() for b in ("leave_one_out", "mean"))
    torch.testing.assert_close(group, mean * 8 / 7, rtol=3e-7, atol=0)
    plain = backend(rewards, group_size=8, baseline="leave_one_out", scale="none").advantages
    torch.testing.assert_close(plain, torch.tensor([-0.35] + [0.05] * 7), rtol=1e-6, atol=0)


# ---- TRL's own arithmetic


def trl_advantages(rewards_per_func: Tensor, num_generations: int, weights: Tensor, scale: str, normalize: str) -> Tensor:
    """Run the lines of TRL's GRPOTrainer that make the advantages, with TRL's nanstd, out of the installed files."""
    spec = importlib.util.find_spec("trl")
    if spec is None or spec.origin is None:
        pytest.skip("trl is not installed")
    folder = Path(spec.origin).parent / "trainer"
    utils = (folder / "utils.py").read_text()
    nanstd = next(node for node in ast.parse(utils).body if isinstance(node, ast.FunctionDef) and node.name == "nanstd")
    trainer = (folder / "grpo_trainer.py").read_text()
    first, last = r"unscorable_mask = torch\.isnan\(rewards_per_func\)", r"advantages = torch\.nan_to_num\(advantages, nan=0\.0\)\n"
    lines = re.search(rf"\n( +{first}.*?{last})", trainer, re.S)
    assert lines is not None, "TRL's advantages are not where they were in 1.16: read them again"
    names: dict[str, Any] = {
        "torch": torch,
        "rewards_per_func": rewards_per_func,
        "num_generations": num_generations,
        "device": rewards_per_func.device,
        "self": SimpleNamespace(
            reward_weights=weights, scale_rewards=scale, multi_objective_aggregation=normalize, reward_funcs=[None] * len(weights)
        ),
    }
    function = ast.get_source_segment(utils, nanstd)
    assert function is not None
    exec(function, names)
    exec("if True:\n" + lines.group(1), names)
    return names["advantages"]


@pytest.mark.parametrize("num_rewards", [1, 3])
@pytest.mark.parametrize("group_size", [1, 2, 8])
@pytest.mark.parametrize(
    ("scale", "normalize"), [(s, "sum_then_normalize") for s in SCALES] + [("group", "normalize_then_sum")], ids=lambda x: x
)
def test_parity_with_trl(backend, scale, normalize, group_size, num_rewards, generator):
    rewards = torch.randint(0, 4, (6 * group_size, num_rewards), generator=generator).double() / 3 + 0.123
    rewards[torch.rand(rewards.shape, generator=generator) < 0.2] = NAN
    rewards[1] = NAN  # unscorable
    rewards[-group_size:] = 0.7  # degenerate
    weights = torch.tensor([1.0, 0.3, 2.0][:num_rewards], dtype=torch.float64)
    expected = trl_advantages(rewards, group_size, weights, scale, normalize)
    got = backend(rewards, group_size=group_size, reward_weights=weights, scale=scale, normalize=normalize).advantages
    torch.testing.assert_close(got.double(), expected, rtol=2e-7, atol=1e-9)
    assert group_size == 1 or (got != 0).sum() > group_size  # there was something to compare


# ---- every implementation against the float64 reference


@pytest.mark.parametrize("num_rewards", [0, 1, 3], ids=["1d", "R=1", "R=3"])
@pytest.mark.parametrize("equal_groups", [True, False])
@pytest.mark.parametrize(("scale", "baseline", "normalize"), MODES)
def test_random_batches(backend, scale, baseline, normalize, equal_groups, num_rewards, generator):
    rewards = torch.randn(96, *[num_rewards] * bool(num_rewards), generator=generator)
    rewards[torch.rand(rewards.shape, generator=generator) < 0.15] = NAN
    groups: dict = {"group_size": 8} if equal_groups else {"group_offsets": torch.tensor([0, 0, 1, 3, 40, 40, 94, 96, 96])}
    arguments = groups | {"scale": scale, "baseline": baseline, "normalize": normalize}
    if num_rewards == 3:
        arguments["reward_weights"] = torch.tensor([0.5, -1.0, 0.0])  # one counts against, one is only logged
    result = backend(rewards, **arguments)
    assert_close(result, truth(rewards, **arguments))
    assert (result.advantages != 0).sum() > 70


# Numbers that tie, numbers that cancel, numbers far apart
NUMBERS = st.sampled_from([0.0, 1.0, 0.7, -0.7, 100.1, 1000.0, 1000.1, NAN]) | st.floats(-1e4, 1e4, width=32)


@needs_extension
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_extension_equals_reference(data):
    sizes = data.draw(st.lists(st.integers(0, 9), max_size=6))
    num_rewards = data.draw(st.integers(1, 3))
    numbers = data.draw(st.lists(NUMBERS, min_size=sum(sizes) * num_rewards, max_size=sum(sizes) * num_rewards))
    rewards = torch.tensor(numbers, dtype=torch.float32).reshape(sum(sizes), num_rewards)
    scale, baseline, normalize = data.draw(st.sampled_from(MODES))
    arguments: dict = {
        "group_offsets": torch.tensor([0, *itertools.accumulate(sizes)]),
        "scale": scale,
        "baseline": baseline,
        "normalize": normalize,
        "eps": data.draw(st.sampled_from([1e-4, 1e-2, 1.0])),
        "reward_weights": torch.tensor(data.draw(st.lists(st.floats(-2, 2), min_size=num_rewards, max_size=num_rewards))).double(),
    }
    result = Backend("cpu")(rewards, **arguments)
    assert all(x.isfinite().all() for x in result[:3])  # finite in, finite out
    assert_close(result, truth(rewards, **arguments))


@pytest.mark.parametrize(("scale", "baseline", "normalize"), MODES)
def test_permutations_carry_over(backend, scale, baseline, normalize, generator):
    rewards = torch.randn(40, 2, generator=generator)
    arguments = {"group_size": 8, "scale": scale, "baseline": baseline, "normalize": normalize}
    plain = backend(rewards, **arguments).advantages
    within = torch.cat([g * 8 + torch.randperm(8, generator=generator) for g in range(5)])
    torch.testing.assert_close(backend(rewards[within], **arguments).advantages, plain[within], rtol=2e-7, atol=1e-7)
    across = torch.randperm(5, generator=generator)
    of_groups = backend(rewards.view(5, 8, 2)[across].flatten(0, 1), **arguments).advantages
    torch.testing.assert_close(of_groups, plain.view(5, 8)[across].flatten(), rtol=2e-7, atol=0)


@pytest.mark.parametrize("sizes", [[3000], [1, 1999, 0, 1], [3] * 150], ids=["one", "mixed", "many"])
@pytest.mark.parametrize(("scale", "baseline", "normalize"), [mode for mode in MODES if mode[1] == "mean"])
def test_group_sizes(backend, sizes, scale, baseline, normalize, generator):
    # On the GPU: a block per group, a block for each of groups of which most are short, a warp per group
    rewards = torch.randn(sum(sizes), generator=generator) + 100
    offsets = torch.tensor([0, *itertools.accumulate(sizes)])
    arguments = {"group_offsets": offsets, "scale": scale, "baseline": baseline, "normalize": normalize}
    assert_close(backend(rewards, **arguments), truth(rewards, **arguments))


@needs_extension
@pytest.mark.parametrize(("scale", "baseline", "normalize"), MODES)
def test_a_million_rewards_whatever_the_threads(scale, baseline, normalize, generator):
    rewards = torch.randn(1_000_000, generator=generator)
    sizes = [1] * 1000 + [500_000] + [7] * ((1_000_000 - 501_000) // 7)
    sizes.append(1_000_000 - sum(sizes))
    offsets = torch.tensor([0, *itertools.accumulate(sizes)])
    arguments = {"group_offsets": offsets, "scale": scale, "baseline": baseline, "normalize": normalize}
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(Backend("cpu")(rewards, **arguments))
    finally:
        torch.set_num_threads(before)
    assert_close(results[0], truth(rewards, **arguments))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# ---- the CUDA kernel


@needs_extension
@needs_compiler
@pytest.mark.parametrize(("scale", "baseline", "normalize"), MODES)
@pytest.mark.parametrize("group_size", [8, 600], ids=["warp per group", "block per group"])
def test_cuda_kernel_launches_once_and_does_not_race(cuda_on_host, monkeypatch, group_size, scale, baseline, normalize):
    rewards = torch.randn(group_size * 20 if group_size < 32 else group_size * 2, 2, dtype=torch.float64)
    arguments = (rewards, None, group_size, None, SCALES.index(scale), baseline == "leave_one_out", normalize == "normalize_then_sum", 1e-4)
    before = cuda_on_host.launches()
    forward = cuda_on_host.group_advantages(*arguments)
    assert cuda_on_host.launches() == before + 1
    monkeypatch.setenv("CUDA_ON_HOST_REVERSED", "1")  # the threads take turns in the opposite order
    backward = cuda_on_host.group_advantages(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(forward, backward, strict=True))


@needs_extension
@needs_compiler
@pytest.mark.parametrize(("scale", "launches"), [("none", 1), ("group", 1), ("batch", 2)])
def test_cuda_kernel_on_a_large_batch(cuda_on_host, scale, launches):
    rewards = torch.randn(16 * 600)  # more than one block takes for both stages
    before = cuda_on_host.launches()
    result = cuda_on_host.group_advantages(rewards, None, 16, None, SCALES.index(scale), False, False, 1e-4)
    assert cuda_on_host.launches() == before + launches
    assert_close(GroupAdvantages(*result), truth(rewards, group_size=16, scale=scale))


@needs_extension
@needs_compiler
@pytest.mark.parametrize("offsets", [[2, 4, 8], [0, 4, 6], [0, 6, 4, 8], [-5, 4, 99], [9, 9, 9], [0, -3, 8]])
@pytest.mark.parametrize("scale", [1, 2])
def test_cuda_kernel_survives_nonsense_offsets(cuda_on_host, offsets, scale):
    """On a GPU, values are not checked: no access is out of bounds, every output is written, and the error is visible."""
    rewards = torch.randn(24)[8:16]  # neighbours to step on
    result = GroupAdvantages(*cuda_on_host.group_advantages(rewards, torch.tensor(offsets), 0, None, scale, False, False, 1e-4))
    assert result.advantages.isnan().any() or result.mean.isnan().any()


@pytest.mark.skipif(build.find_cuda_home() is None, reason="no CUDA toolkit")
def test_cuda_kernel_compiles_without_spills(tmp_path):
    """What `make check` has compiled already is not compiled again."""
    report = tmp_path / "kernels.json"
    subprocess.run([sys.executable, CSRC.parent / "tools" / "nvcc_check.py", "--json", report], check=True)
    kernels = [kernel for kernel in json.loads(report.read_text()) if "_group_advantages_kernel" in kernel["kernel"]]
    assert sorted(kernel["arch"] for kernel in kernels) == ["sm_100", "sm_100", "sm_80", "sm_80", "sm_90", "sm_90"]
    assert not [kernel for kernel in kernels if kernel["spilled"]]


@pytest.mark.gpu
@pytest.mark.parametrize(("scale", "baseline", "normalize"), MODES)
@pytest.mark.parametrize("group_size", [8, 1000, 100_000])
@pytest.mark.usefixtures("cuda_kernel")
def test_gpu_repeats_bitwise(scale, baseline, normalize, group_size):
    rewards = torch.randn(100_000, device="cuda")
    arguments = {"group_size": group_size, "scale": scale, "baseline": baseline, "normalize": normalize}
    first = group_advantages(rewards, **arguments)
    for _ in range(10):
        assert all(torch.equal(a, b) for a, b in zip(first, group_advantages(rewards, **arguments), strict=True))
    assert_close(GroupAdvantages(*(x.cpu() for x in first)), truth(rewards.cpu(), **arguments))


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda_kernel")
def test_gpu_does_not_synchronise():
    rewards, offsets = torch.randn(24, 2, device="cuda"), torch.tensor([0, 8, 8, 24], device="cuda")
    weights = torch.tensor([1.0, 0.5], device="cuda")
    group_advantages(rewards, group_offsets=offsets)  # the extension is loaded now
    for scale, baseline, normalize in MODES:
        torch.cuda.set_sync_debug_mode("error")
        try:
            arguments: dict[str, Any] = {"scale": scale, "baseline": baseline, "normalize": normalize, "reward_weights": weights}
            group_advantages(rewards, group_offsets=offsets, **arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")


# ---- inputs of every kind


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64", "int64", "int32", "uint8", "bool"])
def test_dtypes(backend, dtype, generator):
    rewards = torch.randint(0, 5, (24,), generator=generator).to(getattr(torch, dtype))
    assert_close(backend(rewards, group_size=8), truth(rewards.double(), group_size=8))


def test_numbers_of_numpy(backend):
    rewards = torch.tensor([1.0, 0.0, 0.5, 0.25])
    expected = backend(rewards, group_size=2, eps=0.5)
    got = backend(rewards, group_size=np.int64(2), eps=np.float32(0.5))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_strided_views(backend, generator):
    wide = torch.randn(32, 6, generator=generator)
    for view in (wide[:, 2], wide[::2, 1:5:2], wide.T[:, :4].contiguous().T.t(), wide[:, :1].expand(-1, 3), wide[0, 0].expand(16)):
        size = 4 if view.shape[0] % 4 == 0 else 3
        result = backend(view, group_size=size)
        assert_close(result, truth(view.clone(), group_size=size))
    offsets = torch.tensor([0, 9, 8, 9, 32, 9])[::2]
    assert_close(backend(wide[:, 0], group_offsets=offsets), truth(wide[:, 0], group_offsets=offsets.clone()))


def test_the_rewards_are_not_written_to(backend):
    rewards = torch.tensor([[1.0, NAN], [0, 2], [NAN, NAN], [3, 1]])
    before = rewards.clone()
    backend(rewards, group_size=2, normalize="normalize_then_sum")
    torch.testing.assert_close(rewards, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", [(0,), (0, 3)])
@pytest.mark.parametrize(("scale", "baseline", "normalize"), MODES)
def test_empty_batch(backend, scale, baseline, normalize, shape):
    arguments = {"scale": scale, "baseline": baseline, "normalize": normalize}
    no_group, three_empty = {"group_offsets": torch.tensor([0])}, {"group_offsets": torch.zeros(4).int()}
    for groups, num_groups in (({"group_size": 8}, 0), (no_group, 0), (three_empty, 3)):
        result = backend(torch.empty(shape), **groups, **arguments)
        assert result.advantages.shape == (0,)
        assert result.mean.tolist() == result.std.tolist() == [0.0] * num_groups
        assert result.degenerate.tolist() == [True] * num_groups


def test_no_gradient(backend):
    rewards = torch.tensor([0.0, 1, 2], requires_grad=True)
    assert not backend(rewards, group_size=3).advantages.requires_grad
    with torch.no_grad():
        assert backend(rewards, group_size=3, eps=0).advantages.tolist() == [-1, 0, 1]
    with torch.inference_mode():
        assert backend(rewards, group_size=3, eps=0).advantages.tolist() == [-1, 0, 1]


def test_autocast_changes_nothing(backend, generator):
    rewards = torch.randn(16, 2, generator=generator)
    plain = backend(rewards, group_size=8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = backend(rewards, group_size=8)
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))


# ---- the operator


def operator_arguments() -> list[tuple]:
    rewards, two = torch.randn(12), torch.randn(12, 2, dtype=torch.float64)
    offsets, weights = torch.tensor([0, 5, 5, 12]), torch.tensor([1.0, 2.0], dtype=torch.float64)
    return [
        (rewards, None, 4, None, 1, False, False, 1e-4),
        (two, offsets, 0, weights, 2, True, False, 1e-4),
        (two, offsets.int(), 0, weights, 1, False, True, 1e-4),
        (rewards[:0], None, 4, None, 0, False, False, 0.0),
        (two, offsets, 0, weights, 4, False, False, 1e-4, torch.arange(12.0).double(), True, 0),
        (rewards, None, 4, None, 1, False, False, 1e-4, None, False, 2),
    ]


@needs_extension
@pytest.mark.parametrize("case", range(6))
def test_opcheck(case):
    torch.library.opcheck(torch.ops.grpo_fast.group_advantages.default, operator_arguments()[case])


@needs_extension
@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({0: torch.zeros(12, dtype=torch.float16)}, "float32 or float64"),
        ({0: torch.zeros(24)[::2]}, "contiguous"),
        ({0: torch.zeros(3, 2, 2)}, "got 3 dimensions"),
        ({2: 5}, "12 rows, not a multiple of group_size = 5"),
        ({2: 0}, "not a multiple of group_size = 0"),
        ({1: torch.zeros(2)}, "int32 or int64"),
        ({1: torch.zeros(2, 2, dtype=torch.int64)}, "must be contiguous and"),
        ({1: torch.zeros(1, dtype=torch.int64)}, "no group"),
        ({3: torch.ones(2, dtype=torch.float64)}, "reward_weights"),
        ({4: 5}, "scale must be"),
        ({6: True, 4: 2}, "normalize_then_sum needs the scale 1"),
        ({4: 4}, "lengths belong to the scale 4"),
        ({8: torch.ones(12, dtype=torch.float64)}, "lengths belong to the scale 4"),
        ({4: 4, 8: torch.ones(11, dtype=torch.float64)}, "lengths must be contiguous float64"),
        ({10: -1}, "pass_at_k must be"),
        ({10: 2, 4: 2}, "pass_at_k needs the scale 0"),
        ({10: 2, 5: True}, "pass_at_k needs the scale 0"),
        ({7: NAN}, "eps must be"),
    ],
)
def test_the_operator_checks_by_itself(replaced, message):
    arguments = [*operator_arguments()[0], None, False, 0]
    for position, value in replaced.items():
        arguments[position] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.grpo_fast.group_advantages(*arguments)


@needs_extension
def test_the_operator_never_reads_outside_on_nonsense_offsets():
    result = torch.ops.grpo_fast.group_advantages(torch.randn(8), torch.tensor([-5, 4, 99]), 0, None, 1, False, False, 1e-4)
    assert result[1].isnan().all()


@pytest.mark.parametrize(
    ("name", "scale", "baseline", "normalize"),
    [
        ("reference", "group", "leave_one_out", "normalize_then_sum"),
        pytest.param("cpu", "group", "mean", "sum_then_normalize", marks=needs_extension),
        pytest.param("cpu", "batch", "leave_one_out", "sum_then_normalize", marks=needs_extension),
    ],
)
def test_compiles_into_one_graph(name, scale, baseline, normalize, generator):
    torch._dynamo.reset()
    compiled = torch.compile(group_advantages, fullgraph=True, backend="aot_eager")
    arguments: dict = {"scale": scale, "baseline": baseline, "normalize": normalize}
    with gf.use_backend(name):
        for rewards in (torch.randn(24, generator=generator), torch.randn(40, generator=generator)):
            assert_close(compiled(rewards, group_size=8, **arguments), truth(rewards, group_size=8, **arguments))
        rewards, offsets = torch.randn(24, 2, generator=generator), torch.tensor([0, 5, 5, 24])
        arguments["reward_weights"] = (1.0, 0.5)
        result = compiled(rewards, group_offsets=offsets, **arguments)
        arguments["reward_weights"] = torch.tensor([1.0, 0.5])
        assert_close(result, truth(rewards, group_offsets=offsets, **arguments))
        assert compiled(torch.tensor([math.inf, 1.0]), group_size=2).mean.isinf().all()  # values are not looked at while compiled


def test_docstring_example():
    finder = doctest.DocTestFinder().find(group_advantages, "group_advantages", globs={"group_advantages": group_advantages})
    results = [doctest.DocTestRunner().run(test) for test in finder]
    assert sum(r.attempted for r in results) >= 3
    assert sum(r.failed for r in results) == 0


# ---- bad arguments, one by one


def bad(error: type[Exception], message: str, **arguments: Any) -> Any:
    """Arguments that differ from good ones in one respect, and what the message says: argument, got, expected."""
    if "offsets" in arguments:
        arguments |= {"group_size": None, "group_offsets": arguments.pop("offsets")}
    return pytest.param(error, message, arguments, id=re.sub(r"\W+", " ", message)[:60])


NEGATIVE = torch.tensor([0.0, 1, 2, 3, 4, -1, 6, 7])
BAD = [
    bad(TypeError, r"rewards is a list; expected a tensor: torch.tensor\(rewards\)", rewards=[0.0, 1.0]),
    bad(TypeError, r"rewards has dtype torch.complex64; expected a real dtype", rewards=torch.zeros(8, dtype=torch.complex64)),
    bad(ValueError, r"rewards is of shape \(2, 2, 2\); expected \[B\] or \[B, R\]", rewards=torch.zeros(2, 2, 2)),
    bad(ValueError, r"rewards is of shape \(\); expected \[B\] or \[B, R\]", rewards=torch.tensor(1.0)),
    bad(ValueError, r"rewards is of shape \(8, 0\); expected at least one reward", rewards=torch.zeros(8, 0)),
    bad(ValueError, r"rewards\[2\] is inf; expected finite values", rewards=torch.tensor([0, NAN, math.inf, 1])),
    bad(ValueError, r"rewards\[1, 1\] is -inf; expected finite values", rewards=torch.tensor([[0, 1], [1, -math.inf], [0, 0], [0, 0]])),
    bad(
        ValueError,
        r"rewards\[0\] is 1e\+39; expected finite values within float32's range",
        rewards=torch.tensor([1e39, 0], dtype=torch.float64),
    ),
    bad(ValueError, r"group_size and group_offsets are both missing; expected exactly one", group_size=None),
    bad(ValueError, r"group_size and group_offsets are both given; expected exactly one", group_offsets=torch.tensor([0, 8])),
    bad(TypeError, r"group_size is 4.0 \(float\); expected an int", group_size=4.0),
    bad(TypeError, r"group_size is True \(bool\); expected an int", group_size=True),
    bad(ValueError, r"group_size is 0; expected at least 1", group_size=0),
    bad(ValueError, r"group_size is -4; expected at least 1", group_size=-4),
    bad(ValueError, r"group_size is 3 and rewards has 8 rows; expected a divisor of it; use group_offsets", group_size=3),
    bad(TypeError, r"group_offsets is a list; expected a tensor \[G\+1\]", offsets=[0, 8]),
    bad(TypeError, r"group_offsets has dtype torch.float32; expected int32 or int64", offsets=torch.tensor([0.0, 8.0])),
    bad(ValueError, r"group_offsets is of shape \(1, 2\); expected \[G\+1\]", offsets=torch.tensor([[0, 8]])),
    bad(ValueError, r"group_offsets is of shape \(0,\); expected \[G\+1\]", offsets=torch.zeros(0).long()),
    bad(ValueError, r"group_offsets is of one element, no group, and rewards has 8 rows", offsets=torch.tensor([0])),
    bad(ValueError, r"group_offsets is on meta; expected rewards' device cpu", offsets=torch.zeros(3, device="meta").long()),
    bad(ValueError, r"group_offsets\[0\] is 1; expected 0", offsets=torch.tensor([1, 8])),
    bad(ValueError, r"group_offsets\[-1\] is 7; expected 8, the rows of rewards", offsets=torch.tensor([0, 4, 7])),
    bad(ValueError, r"group_offsets\[2\] is 4 after 5; expected offsets that never decrease", offsets=torch.tensor([0, 5, 4, 8])),
    bad(TypeError, r"scale is True \(bool\); expected one of the names none, group, batch", scale=True),
    bad(ValueError, r"scale is 'std'; expected one of none, group, batch, mean, tokens", scale="std"),
    bad(ValueError, r"the weighted sum of rewards\[5\] is -1.0; expected at least 0 with scale='mean'", rewards=NEGATIVE, scale="mean"),
    bad(ValueError, r"lengths is missing with scale='tokens'; expected \[B\], the tokens", scale="tokens"),
    bad(ValueError, r"lengths is given with scale='group'; expected None", lengths=torch.ones(8)),
    bad(TypeError, r"lengths is a list; expected a tensor \[B\]", scale="tokens", lengths=[1] * 8),
    bad(
        TypeError, r"lengths has dtype torch.complex64; expected a real dtype", scale="tokens", lengths=torch.ones(8, dtype=torch.complex64)
    ),
    bad(ValueError, r"lengths is of shape \(7,\); expected \[B = 8\]", scale="tokens", lengths=torch.ones(7)),
    bad(ValueError, r"lengths is on meta; expected rewards' device cpu", scale="tokens", lengths=torch.ones(8, device="meta")),
    bad(ValueError, r"lengths\[5\] is -1.0; expected a number of tokens of at least 0", scale="tokens", lengths=NEGATIVE),
    bad(ValueError, r"lengths\[2\] is nan; expected a number of tokens", scale="tokens", lengths=torch.tensor([1, 1, NAN, 1, 1, 1, 1, 1])),
    bad(TypeError, r"exclude_degenerate is 1 \(int\); expected True or False", exclude_degenerate=1),
    bad(TypeError, r"pass_at_k is 2.0 \(float\); expected an int, or None", pass_at_k=2.0),
    bad(TypeError, r"pass_at_k is True \(bool\); expected an int, or None", pass_at_k=True),
    bad(ValueError, r"pass_at_k is 0; expected at least 1, or None", pass_at_k=0),
    bad(ValueError, r"pass_at_k is 4; expected less than group_size = 4, since .* Fix: a smaller k", pass_at_k=4),
    bad(ValueError, r"scale is 'batch'; expected 'group' or 'none' with pass_at_k", pass_at_k=2, scale="batch"),
    bad(ValueError, r"baseline is 'leave_one_out'; expected 'mean' with pass_at_k", pass_at_k=2, baseline="leave_one_out"),
    bad(ValueError, r"normalize is 'normalize_then_sum'; expected 'sum_then_normalize' with", pass_at_k=2, normalize="normalize_then_sum"),
    bad(TypeError, r"baseline is None \(NoneType\); expected one of the names mean, leave_one_out", baseline=None),
    bad(ValueError, r"baseline is 'rloo'; expected one of mean, leave_one_out", baseline="rloo"),
    bad(ValueError, r"normalize is 'gdpo'; expected one of sum_then_normalize, normalize_then_sum", normalize="gdpo"),
    bad(ValueError, r"scale is 'batch'; expected 'group' with normalize=", normalize="normalize_then_sum", scale="batch"),
    bad(TypeError, r"eps is '1e-4' \(str\); expected a number", eps="1e-4"),
    bad(ValueError, r"eps is -1e-06; expected a finite number of at least 0", eps=-1e-6),
    bad(ValueError, r"eps is nan; expected a finite number of at least 0", eps=NAN),
    bad(ValueError, r"eps is inf; expected a finite number of at least 0", eps=math.inf),
    bad(TypeError, r"reward_weights is 'one'; expected a tensor \[R = 1\]", reward_weights="one"),
    bad(TypeError, r"reward_weights has dtype torch.complex64", reward_weights=torch.ones(1, dtype=torch.complex64)),
    bad(ValueError, r"reward_weights is of shape \(2,\); expected \[R = 1\]", reward_weights=[1.0, 2.0]),
    bad(ValueError, r"reward_weights is of shape \(\); expected \[R = 1\]", reward_weights=2.0),
    bad(ValueError, r"reward_weights is on meta; expected rewards' device cpu", reward_weights=torch.ones(1, device="meta")),
    bad(ValueError, r"reward_weights is \[nan\]; expected numbers", reward_weights=[NAN]),
    bad(ValueError, r"reward_weights\[0\] is inf; expected finite values", reward_weights=[math.inf]),
]


@pytest.mark.parametrize(("error", "message", "replaced"), BAD)
def test_bad_arguments(error, message, replaced):
    arguments = {"rewards": torch.arange(8.0), "group_size": 2 if "rewards" in replaced else 4} | replaced
    with pytest.raises(error, match=rf"^group_advantages: {message}"):
        group_advantages(**arguments)


def test_good_arguments_pass():
    """What the list above departs from is itself in order."""
    assert group_advantages(torch.arange(8.0), group_size=4).degenerate.tolist() == [False, False]


def test_other_devices_get_the_reference():
    result = group_advantages(torch.zeros(8, 2, device="meta"), group_size=4, normalize="normalize_then_sum")
    assert [(x.device.type, tuple(x.shape)) for x in result] == [("meta", (8,)), *[("meta", (2,))] * 3]


def test_a_missing_cuda_kernel_is_an_error(monkeypatch, request):
    """And not a GPU's tests computed by the reference."""
    monkeypatch.setattr(advantages_module, "_has_kernel", lambda device_type: False)
    with pytest.raises(AssertionError, match="the CUDA kernel is not there"):
        request.getfixturevalue("cuda_kernel")


def test_values_are_not_read_where_that_would_synchronise(monkeypatch):
    monkeypatch.setattr(advantages_module, "value_checks_wanted", lambda tensor: False)  # as on a GPU without GRPO_FAST_CHECK=1
    with gf.use_backend("reference"):
        assert group_advantages(torch.tensor([math.inf, 1.0]), group_size=2).mean.isinf().all()
