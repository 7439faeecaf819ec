"""What nvcc compiles for sm_90, executed by the PTX machine (ptx_machine.py) on CPU tensors, against the truth in float64."""

from __future__ import annotations

import functools
import itertools
import math
import re
import statistics
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ptx.cuda_arguments import layout_check
from ptx.cuda_compile import ROOT, WHY_NOT
from ptx.cuda_launch import ClusterLauncher, group_advantages
from ptx_cases import Batch, batch, check
from ptx_machine import FaultError, Hardware, UnsupportedError
from torch import Tensor

import grpo_fast as gf
from grpo_fast.ops import build

needs_nvcc = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
APART = Hardware(seed=1, ranks=2)


@pytest.mark.skipif(build.cxx_compiler() is None, reason="no C++ compiler")
def test_arguments_are_laid_out_as_in_the_sources(tmp_path: Path) -> None:
    (tmp_path / "layout.cpp").write_text(layout_check())
    command = [build.cxx_compiler() or "", "-std=c++17", "-D__CUDACC__", "-D__host__=", "-D__device__=", "-D__forceinline__=inline"]
    command += ["-Wno-invalid-offsetof", "-fsyntax-only", f"-I{ROOT / 'csrc'}", "layout.cpp"]
    subprocess.run(command, cwd=tmp_path, check=True)


# ---- the cluster kernel


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> Iterator[ClusterLauncher]:
    """impl="cluster" computes CPU tensors by the machine."""
    launcher = ClusterLauncher(hardware=APART)
    library = torch.library.Library("grpo_fast", "IMPL")
    library.impl("grpo_loss_cluster", launcher.loss, "CPU")
    library.impl("grpo_loss_cluster_", launcher.loss_, "CPU")
    monkeypatch.setattr("grpo_fast.ops.impl_checks.why_no_clusters", lambda logits: "")
    yield launcher
    library._destroy()


def check_loss(given: Batch, **options: Any) -> None:
    """Forward and backward by the cluster kernel."""
    leaf = given.logits.requires_grad_()
    out = gf.grpo_loss(leaf if not options.get("inplace") else leaf * 1, **given.options, impl="cluster", **options)
    (gradient,) = torch.autograd.grad(out.loss, leaf)
    check(given, out.loss, out.logprobs, out.entropy, gradient, out.metrics)


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize(("blocks", "stages", "clusters"), [(1, 2, 1), (2, 3, 2), (4, 2, 1), (8, 2, 1)])
def test_clusters_of_every_size(blocks: int, stages: int, clusters: int, launcher: ClusterLauncher) -> None:
    """More rows than stages, on every offset."""
    launcher.blocks, launcher.stages, launcher.clusters = blocks, stages, clusters
    check_loss(batch(5, 1031, torch.bfloat16, before=1, after=2), inplace=blocks == 2)


@needs_nvcc
@pytest.mark.slow
def test_float32_rows_with_a_soft_cap(launcher: ClusterLauncher) -> None:
    launcher.hardware = Hardware()
    check_loss(batch(3, 523, torch.float32, before=3, softcap=5.0))


@needs_nvcc
def test_nothing_beside_the_rows_is_touched(launcher: ClusterLauncher) -> None:
    """In place, in the middle of memory that is NaN; and a gradient on another offset than the logits, which no bulk copy can carry."""
    given = batch(3, 523, torch.bfloat16, before=5, after=3)
    calls: list[tuple[Tensor, ...]] = []
    inner = launcher.loss_to

    def seen(gradient: Tensor | None, logits: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        calls.append((logits, *arguments))
        return inner(gradient, logits, *arguments)

    launcher.loss_to = seen  # type: ignore[method-assign]
    gf.grpo_loss(given.logits, **given.options, impl="cluster")
    arguments = calls[0][1:]
    for elsewhere in (False, True):
        wide = torch.full((1, 3, 523 + 8), math.nan, dtype=torch.bfloat16)
        rows = wide[..., 5:528].copy_(given.logits)
        gradient = torch.full((1, 3, 523 + 4), math.nan, dtype=torch.bfloat16)[..., 1:524] if elsewhere else rows
        loss, logprobs, entropy, metrics = inner(gradient, rows, *arguments)
        names = ("kl", "entropy", "ratio_mean", "ratio_max")
        check(given, loss, logprobs, entropy, gradient, dict(zip(names, metrics, strict=False)))
        assert wide[..., :5].isnan().all() and wide[..., 528:].isnan().all()
        whole = gradient.as_strided((3, gradient.stride(1)), (gradient.stride(1), 1), 0)
        assert whole.isnan().sum() == 3 * (gradient.stride(1) - 523)


# ---- mutants: what the machine must not let pass


def edited(old: str, new: str, occurrence: int = 0) -> Callable[[str], str]:
    """In every cluster kernel, the occurrence of some text that begins an instruction becomes another, up to its end."""

    def edit(text: str) -> str:
        kernels = text.split(".entry ")
        for index, kernel in enumerate(kernels):
            found = [match.span() for match in re.finditer(re.escape(old) + "[^;]*;", kernel)]
            if len(found) > occurrence:
                first, last = found[occurrence]
                kernels[index] = kernel[:first] + new + kernel[last:]
        changed = ".entry ".join(kernels)
        assert changed != text, f"{old} is nowhere"
        return changed

    return edit


def reversed_packet(text: str) -> str:
    """The numbers of st.async in the wrong order."""
    return re.sub(r"(st\.async[^{]*\{)(%f\d+), (%f\d+), (%f\d+), (%f\d+)", r"\1\5, \4, \3, \2", text)


MUTANTS: dict[str, tuple[Callable[[str], str], str]] = {
    "packet reversed": (reversed_packet, "error|not finite"),
    "an arrival removed": (edited("mbarrier.arrive.release", ""), "deadlock"),
    "no fence": (edited("fence.proxy.async", ""), "without fence.proxy.async"),
    "no barrier of the cluster": (edited("barrier.cluster.wait", ""), "no mbarrier was initialized|deadlock"),
}


@needs_nvcc
@pytest.mark.parametrize("mutant", ["packet reversed", "an arrival removed", "no fence", "no barrier of the cluster"])
def test_mutants_of_the_cluster_kernel(mutant: str, launcher: ClusterLauncher) -> None:
    """In one of a few orders of the warps."""
    launcher.edit, what = MUTANTS[mutant]
    seen = []
    for seed in range(6):
        launcher.hardware = Hardware(seed=seed, ranks=2)
        try:
            check_loss(batch(3, 523, torch.bfloat16))
        except (AssertionError, FaultError) as error:
            seen.append(str(error))
            break
    assert seen and re.search(what, seen[0]), seen


@needs_nvcc
@pytest.mark.sweep
@pytest.mark.parametrize("occurrence", range(20))
def test_every_arrival_is_needed(occurrence: int, launcher: ClusterLauncher) -> None:
    """Those that this batch executes: of the others nothing can be seen."""
    launcher.stages, launcher.hardware = 2, APART
    given = batch(5, 1031, torch.bfloat16, before=1, after=2)
    executed: list[str] = []
    try:
        launcher.edit = edited("mbarrier.arrive.release", "trap;", occurrence)
        check_loss(given)
    except UnsupportedError as error:
        executed.append(str(error))
    except AssertionError:
        pytest.skip("the kernel has no more arrivals")
    if not executed:
        return
    launcher.edit = edited("mbarrier.arrive.release", "", occurrence)
    with pytest.raises(FaultError, match="deadlock"):
        check_loss(given)


# ---- at length


@needs_nvcc
@pytest.mark.sweep
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_options(dtype: torch.dtype, launcher: ClusterLauncher, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every option of the loss by the comparison of test_grpo_loss.py, in clusters of every size."""
    import test_cluster

    computed = 0
    for seed in range(60):
        launcher.blocks, launcher.stages, launcher.clusters = 2 ** (seed % 4), 2 + seed % 3, 1 + seed % 2
        launcher.hardware = Hardware(seed=seed, ranks=1 + seed % 3, error=float(seed % 2))
        computed += test_cluster.check(seed, dtype, monkeypatch)
    assert computed >= 15
    assert len(launcher.launched) == 2, "with a soft cap and without"


@needs_nvcc
@pytest.mark.sweep
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [2, 9, 255, 2049, 9001])
def test_vocabularies(vocabulary: int, dtype: torch.dtype, launcher: ClusterLauncher) -> None:
    for seed, (blocks, softcap) in enumerate(((1, None), (2, 30.0), (4, None), (8, 5.0))):
        launcher.blocks, launcher.stages, launcher.hardware = blocks, 2 + seed % 2, Hardware(seed=seed, ranks=1 + seed % 2)
        check_loss(batch(5, vocabulary, dtype, before=seed, after=1, softcap=softcap, seed=seed), inplace=seed % 2 == 1)


# ---- the advantages of groups


def advantages_truth(rewards: Tensor, groups: list[int], scale: str, eps: float) -> Tensor:
    """By Python's statistics, in float64."""
    values = rewards.double().tolist()
    first, result = 0, []
    for size in groups:
        group = values[first : first + size]
        deviation = statistics.stdev(group) if size > 1 else 0.0
        of_batch = statistics.stdev(values)
        divisor = {"none": 1.0, "group": deviation + eps, "batch": of_batch + eps}[scale]
        result += [(x - statistics.fmean(group)) / divisor if deviation > 0 else 0.0 for x in group]
        first += size
    return torch.tensor(result, dtype=torch.float64)


@pytest.fixture
def on_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator group_advantages is that of the machine."""
    monkeypatch.setattr(torch.ops.grpo_fast, "group_advantages", functools.partial(group_advantages, hardware=APART))


@needs_nvcc
@pytest.mark.parametrize("scale", ["none", "group", "batch"])
def test_group_advantages(scale: str, on_machine: None) -> None:
    """Short groups, which a warp takes each, and a long one, which a block takes."""
    for groups in ([3, 5, 1, 4, 40], [700, 20]):
        rewards = torch.randn(sum(groups))
        rewards[:3] = 0.25  # equal: no advantage, whatever the rounding of their mean
        offsets = torch.tensor([0, *torch.tensor(groups).cumsum(0).tolist()])
        with gf.use_backend("cpu"):
            found = gf.group_advantages(rewards, group_offsets=offsets, scale=scale, eps=1e-4)
        expected = advantages_truth(rewards, groups, scale, 1e-4)
        torch.testing.assert_close(found.advantages.double(), expected, rtol=2e-7, atol=1e-7)
        assert groups[0] != 3 or not found.advantages[:3].any()


@needs_nvcc
@pytest.mark.sweep
@pytest.mark.parametrize("scale", ["none", "group", "batch", "mean", "tokens"])
def test_group_advantages_with_every_option(scale: str, on_machine: None) -> None:
    import advantage_cases

    generator = torch.Generator().manual_seed(0)
    for baseline, rewards_count, size in itertools.product(("mean", "leave_one_out"), (1, 3), (8, 600)):
        rewards = torch.rand(4 * size, rewards_count, generator=generator, dtype=torch.float64 if size == 8 else torch.float32)
        rewards[torch.rand(rewards.shape, generator=generator) < 0.1] = math.nan
        options: dict[str, Any] = {"scale": scale, "baseline": baseline, "group_size": size}
        if scale == "tokens":
            options["lengths"] = torch.randint(1, 9, (4 * size,), generator=generator)
        ways = [options, options | {"exclude_degenerate": True}]
        if scale == "group":
            ways.append(options | {"normalize": "normalize_then_sum"})
        if scale in ("none", "group") and baseline == "mean":
            ways.append(options | {"pass_at_k": 4})
        for given in ways:
            with gf.use_backend("cpu"):
                found = gf.group_advantages(rewards, **given)
            advantage_cases.assert_close(found, advantage_cases.truth(rewards, **given))
