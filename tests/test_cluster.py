"""The CUDA cluster kernel: its source compiled for the CPU on the stand-in of tests/cuda_on_host, against the float64 truth; what nvcc
makes of it; and, on a GPU that has clusters, the kernel itself."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import test_grpo_loss
import torch
from cases import Case, random_case
from torch import Tensor
from torch.utils import cpp_extension
from vocabulary_cases import VOCABULARIES, assert_true, big, loss_and_gradient, with_options

import grpo_fast as gf
from grpo_fast.loss import checks
from grpo_fast.loss.kernel_settings import loss_settings
from grpo_fast.ops import build
from grpo_fast.ops.impl_checks import why_no_clusters

HERE = Path(__file__).parent
CSRC, TOOLS = HERE.parent / "csrc", HERE.parent / "tools"

needs_compiler = pytest.mark.skipif(
    build.cxx_compiler() is None or sys.platform != "linux", reason="needs a C++ compiler, and Linux for the fibers"
)


# ---- the kernel on the CPU


@pytest.fixture(scope="session")
def on_host(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """csrc/cuda/grpo_loss_cluster.cu, compiled by the C++ compiler with two consumer warps: torch.ops.grpo_fast_cluster_on_host."""
    folder = tmp_path_factory.mktemp("cluster_on_host")
    source = (CSRC / "cuda" / "grpo_loss_cluster.cu").read_text()
    (folder / "kernel.cpp").write_text(source.replace('"grpo_loss_cluster.h"', '"cuda/grpo_loss_cluster.h"'))
    compiler, library = build.cxx_compiler(), folder / "cluster_on_host.so"
    flags = ["-O1", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-U_FORTIFY_SOURCE", f"-I{HERE / 'cuda_on_host'}", f"-I{CSRC}"]
    small = ["-DGF_CONSUMER_WARPS=2", "-DGF_TOTAL_THREADS=64"]
    assert compiler is not None
    subprocess.run([compiler, *flags, *small, "-c", "kernel.cpp"], cwd=folder, check=True)
    torch_flags = [build.TARGET_TORCH, *(f"-I{each}" for each in cpp_extension.include_paths())]
    libraries = [*(f"-L{each}" for each in cpp_extension.library_paths()), "-lc10", "-ltorch", "-ltorch_cpu"]
    operator = HERE / "cuda_on_host" / "grpo_loss_cluster_op.cpp"
    subprocess.run([compiler, *flags, "-shared", *torch_flags, operator, "kernel.o", "-o", library, *libraries], cwd=folder, check=True)
    torch.ops.load_library(library)
    return torch.ops.grpo_fast_cluster_on_host


@pytest.fixture
def cluster(on_host: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """impl="cluster" computes CPU tensors by the kernel on the stand-in. Yields a function that sets how it runs."""
    library = torch.library.Library("grpo_fast", "IMPL")
    library.impl("grpo_loss_cluster", on_host.loss, "CPU")
    library.impl("grpo_loss_cluster_", lambda logits, *rest: on_host.loss_to(logits, logits, *rest), "CPU")
    monkeypatch.setattr("grpo_fast.ops.impl_checks.why_no_clusters", lambda logits: "")

    def run_with(cluster: int = 0, stages: int = 0, **settings: int) -> None:
        monkeypatch.setenv("GRPO_FAST_CLUSTER", f"{cluster}x{stages}")
        for name, value in settings.items():
            monkeypatch.setenv(f"CUDA_ON_HOST_{name.upper()}", str(value))

    yield run_with
    library._destroy()


def one_pass_case(seed: int, dtype: torch.dtype) -> Case | None:
    """The common random case, by the cluster kernel; None where its loss needs whole sequences."""
    case = random_case(seed, dtype)
    config = case.options["config"]
    if config.level != "token" or config.surrogate == "vespo":
        return None
    return case


def check(seed: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> bool:
    """The comparison of test_grpo_loss with the kernel's answers; False where the case is not for it."""
    if one_pass_case(seed, dtype) is None:
        return False
    run = Case.run

    def run_by_cluster(self: Case, logits: Tensor | None = None, **changed: Any) -> Any:
        # test_grpo_loss gives `inplace` or logits to the reference's runs only
        return run(self, logits, **changed) if changed else run(self, logits, impl="cluster")

    monkeypatch.setattr(Case, "run", run_by_cluster)
    test_grpo_loss.check(seed, dtype)
    monkeypatch.setattr(Case, "run", run)
    return True


# (cluster, stages, resident clusters, seed of the threads' order): 0: by the row's length; the order: warp by warp.
SHAPES = [(1, 2, 1, 0), (2, 3, 2, 0), (4, 2, 1, 1), (4, 3, 1, 2), (8, 3, 3, 3), (0, 0, 2, 4)]


@needs_compiler
@pytest.mark.parametrize("dtype", test_grpo_loss.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_float64_truth(
    shape: tuple[int, int, int, int], dtype: torch.dtype, cluster: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster(cluster=shape[0], stages=shape[1], clusters=shape[2], seed=shape[3])
    first = SHAPES.index(shape) * 20
    assert sum(check(seed, dtype, monkeypatch) for seed in range(first, first + 20)) >= 5  # the others need whole sequences


@needs_compiler
@pytest.mark.sweep
@pytest.mark.parametrize("dtype", test_grpo_loss.DTYPES, ids=str)
def test_the_float64_truth_at_length(dtype: torch.dtype, cluster: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(1000, 1600):
        cluster(cluster=2 ** (seed % 4), stages=2 + seed % 3, clusters=1 + seed % 3, seed=seed)
        check(seed, dtype, monkeypatch)


# ---- rows of every kind, on the CPU, against the C++ kernels


def call(rows: int, vocabulary: int, dtype: torch.dtype, **changed: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(vocabulary)
    logits = (torch.randn(1, rows, vocabulary, generator=generator) * 2.5).to(dtype)
    ids = torch.randint(vocabulary, (1, rows), generator=generator)
    ids[0, :2] = torch.tensor([0, vocabulary - 1])  # the edges' columns
    given = {"logits": logits, "token_ids": ids, "advantages": torch.randn(1, rows, generator=generator), "temperature": 0.8}
    given["config"] = gf.LossConfig(entropy_coef=0.1)
    return {**given, **changed}


def both(given: dict[str, Any], **options: Any) -> tuple[Any, Any]:
    """((out, gradient) by the cluster kernel, the same by the C++ kernels); the logits are a view of memory that is not a leaf."""
    results = []
    for impl in ("cluster", None):
        leaf = given["logits"].detach().clone().requires_grad_()
        view = options.get("view", lambda x: x)(leaf * 1)
        out = gf.grpo_loss(**{**given, "logits": view}, impl=impl, inplace=options.get("inplace", False))
        out.loss.backward()
        results.append((out, leaf.grad))
    return results[0], results[1]


def assert_same(given: dict[str, Any], **options: Any) -> None:
    (out, gradient), (expected, true_gradient) = both(given, **options)
    torch.testing.assert_close(out.logprobs, expected.logprobs, rtol=1e-6, atol=5e-6, equal_nan=True)
    torch.testing.assert_close(out.entropy, expected.entropy, rtol=1e-6, atol=5e-6, equal_nan=True)
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-5, atol=1e-6, equal_nan=True)
    eps = torch.finfo(gradient.dtype).eps
    scale = true_gradient[~true_gradient.isnan()].abs().max().item()
    torch.testing.assert_close(gradient, true_gradient, rtol=2 * eps, atol=1e-5 * scale, equal_nan=True)


@needs_compiler
@pytest.mark.parametrize("dtype", test_grpo_loss.DTYPES, ids=str)
@pytest.mark.parametrize("inplace", [False, True])
def test_rows_on_every_offset(inplace: bool, dtype: torch.dtype, cluster: Callable[..., None]) -> None:
    """Odd vocabularies put each row on another 16-byte offset; slices that are short or empty; one vector more or less."""
    cluster(cluster=4, stages=3, clusters=2, seed=5)
    for vocabulary in (2, 7, 9, 255, 263, 1031, 2049):
        assert_same(call(9, vocabulary, dtype), inplace=inplace)


@needs_compiler
@pytest.mark.parametrize("dtype", test_grpo_loss.DTYPES, ids=str)
def test_gradient_on_another_offset_than_the_logits(dtype: torch.dtype, cluster: Callable[..., None]) -> None:
    """Padded logits and a contiguous gradient: bulk copies cannot carry it."""
    cluster(cluster=2, stages=3, clusters=1, seed=6)
    assert_same(call(5, 1001, dtype), view=lambda x: torch.nn.functional.pad(x, (1, 2))[..., 1:-2])


@needs_compiler
def test_nothing_beside_the_rows_is_touched(cluster: Callable[..., None], on_host: Any) -> None:
    cluster(cluster=2, stages=2, clusters=2, seed=7)
    given = call(6, 523, torch.bfloat16)
    wide = torch.full((1, 6, 540), 7.0, dtype=torch.bfloat16)
    wide[..., 5:528] = given["logits"]
    leaf = given["logits"].clone().requires_grad_()
    storage = wide.clone()
    ones = torch.ones(1, 6)
    settings = loss_settings(given["config"])
    rest = (given["token_ids"], ones.bool(), given["advantages"], ones, ones, None, None, None, None, 0.8, 0.0, 1.0, 1.0, settings, False)
    on_host.loss_to(storage[..., 5:528], storage[..., 5:528], *rest)
    gradient = torch.ops.grpo_fast.grpo_loss(leaf.detach(), *rest, True)[-1]
    torch.testing.assert_close(storage[..., 5:528], gradient, rtol=2.0**-7, atol=1e-6)
    storage[..., 5:528] = 7.0
    assert (storage == 7).all()


@needs_compiler
def test_rows_that_lie_two_to_the_31_apart(cluster: Callable[..., None], on_host: Any) -> None:
    from test_triton import far_apart

    cluster(cluster=2, stages=2, clusters=1, seed=11)
    given = call(2, 528, torch.float16)
    ones, settings = torch.ones(1, 2), loss_settings(given["config"])
    rest = (given["token_ids"], ones.bool(), given["advantages"], ones, ones, None, None, None, None, 0.8, 0.0, 1.0, 1.0, settings, False)
    results = []
    for logits in (given["logits"].clone(), far_apart(given["logits"])):
        results.append((*on_host.loss_to(logits, logits, *rest), logits))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@needs_compiler
def test_extreme_rows(cluster: Callable[..., None]) -> None:
    """A largest logit that the estimate misses, a target far above and far below the rest, -inf columns, a constant offset."""
    cluster(cluster=4, stages=3, clusters=1, seed=8)
    given = call(8, 2100, torch.float32)
    z, ids = given["logits"][0], given["token_ids"][0]
    z[0, 1999] = 90.0
    z[1, 3] = 400.0
    z[2, ids[2]] = 300.0
    z[3, ids[3]] = -300.0
    z[4, ::2] = float("-inf")
    z[4, ids[4]] = 1.0
    z[5] += 1000.0
    z[6] = float("-inf")
    z[6, ids[6]] = 0.5
    assert_same(given)


@needs_compiler
@pytest.mark.parametrize("dtype", test_grpo_loss.DTYPES, ids=str)
def test_an_id_outside_the_vocabulary(dtype: torch.dtype, on_host: Any) -> None:
    """NaN in its row and nowhere else; the check in front of the kernel reads CPU tensors only."""
    given, ones = call(4, 515, dtype), torch.ones(1, 4)
    settings = loss_settings(gf.LossConfig())
    for outside in (-1, 515, 2**40):
        given["token_ids"][0, 3] = outside
        rest = (
            given["token_ids"],
            ones.bool(),
            given["advantages"],
            ones,
            None,
            None,
            None,
            None,
            None,
            0.8,
            0.0,
            1.0,
            1.0,
            settings,
            False,
        )
        found, expected = on_host.loss(given["logits"], *rest, True), torch.ops.grpo_fast.grpo_loss(given["logits"], *rest, True)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-5, equal_nan=True)
        assert found[0].isnan() and found[4][0, 3].isnan().all() and not found[4][0, :3].isnan().any()


@needs_compiler
def test_the_same_bits_in_every_order(cluster: Callable[..., None]) -> None:
    """Whatever the order in which warps run and copies land, and however many clusters there are."""
    given = call(10, 1999, torch.bfloat16, config=gf.LossConfig(entropy_coef=0.1, loss_type="cispo", epsilon_high=1.05))
    results = []
    for seed in range(1, 7):
        cluster(cluster=4, stages=3, clusters=1 + seed % 3, seed=seed)
        out, gradient = both(given)[0]
        results.append((out.loss, out.logprobs, out.entropy, gradient, *out.metrics.values()))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_compiler
@pytest.mark.parametrize("vocabulary", [1024, 1999])
@pytest.mark.parametrize("inplace", [False, True])
def test_shared_memory_is_fenced_before_it_is_copied_out(inplace: bool, vocabulary: int, cluster: Callable[..., None]) -> None:
    """The copy engine is not ordered with ordinary stores to shared memory: the writer must fence, which no order of threads tests."""
    rows = torch.tensor([[True, False, True, True, True, True]])
    given = call(6, vocabulary, torch.bfloat16, mask=rows)
    for seed in (0, 12):
        cluster(cluster=2, stages=3, clusters=1, seed=seed, proxies=1)
        assert_same(given, inplace=inplace)


@needs_compiler
def test_without_a_gradient(cluster: Callable[..., None]) -> None:
    cluster(cluster=2, stages=2, clusters=1, seed=9)
    given = call(5, 600, torch.bfloat16)
    before = given["logits"].clone()
    out, expected = gf.grpo_loss(**given, impl="cluster"), gf.grpo_loss(**given)
    torch.testing.assert_close(out.logprobs, expected.logprobs, rtol=1e-6, atol=5e-6)
    assert torch.equal(before, given["logits"])


@needs_compiler
@pytest.mark.parametrize("impl", ["cluster", None])
def test_a_nan_ratio_shows(impl: str | None, cluster: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where finite ratios follow, in sums and in maxima. (On a GPU, values are not checked beforehand.)"""
    monkeypatch.setattr(checks, "value_checks_wanted", lambda tensor: False)
    given = call(6, 130, torch.float32)
    old = gf.token_logprobs(given["logits"], given["token_ids"], temperature=0.8).logprobs - 0.1
    old[0, 2] = float("nan")
    metrics = gf.grpo_loss(**given, old_logprobs=old, impl=impl).metrics
    assert metrics["ratio_max"].isnan() and metrics["ratio_mean"].isnan() and metrics["entropy"].isfinite()


@needs_compiler
def test_a_peak_that_comes_late(cluster: Callable[..., None]) -> None:
    """The entropy of a row whose largest logit is not the target's, at any column: an estimated reference of the sums lost 1e-6 here."""
    cluster(cluster=2, stages=2, clusters=1, seed=10)
    given = call(8, 3001, torch.float32, temperature=0.6)
    given["logits"] *= 0.6
    for row, column in enumerate((1, 300, 700, 1200, 1600, 2100, 2900, 2999)):
        given["logits"][0, row, column] = 11.0
    out = gf.grpo_loss(**given, impl="cluster")
    with gf.use_backend("reference"):
        truth = gf.grpo_loss(**{**given, "logits": given["logits"].double()})
    assert ((out.entropy - truth.entropy).abs() <= 2.0**-21 * (1 + truth.entropy)).all()


@needs_compiler
def test_real_vocabularies(cluster: Callable[..., None]) -> None:
    """The cluster that the launcher chooses for them: 1, 4, 4 and 8 blocks."""
    cluster(clusters=1)
    for vocabulary in (32000, 128256, 151643, 262144):
        assert_same(call(2, vocabulary, torch.bfloat16))


# ---- the operators as PyTorch sees them


def operator_arguments(device: str) -> tuple[Any, ...]:
    """Everything behind the logits, which are [2, 4, 523]."""
    generator = torch.Generator().manual_seed(0)
    ids, mask = torch.randint(523, (2, 3), generator=generator), torch.tensor([[True, True, False], [True, True, True]])
    per_token, weight = torch.randn(2, 3, generator=generator) - 6, torch.tensor(0.2)
    tensors = (torch.randn(2, 1, generator=generator), weight, weight, per_token, per_token.clone(), None, torch.full((2, 1), 0.7))
    settings = loss_settings(gf.LossConfig(beta=0.1, entropy_coef=0.1))
    moved = [x if x is None else x.to(device) for x in (ids, mask, *tensors)]
    return *moved, 1.0, 0.0, 1.0, 1.0, settings, False


def check_operators(device: str) -> None:
    rest, logits = operator_arguments(device), torch.randn(2, 4, 523, generator=torch.Generator().manual_seed(1)).to(device)
    torch.library.opcheck(torch.ops.grpo_fast.grpo_loss_cluster.default, (logits.clone().requires_grad_(), *rest, True))
    torch.library.opcheck(torch.ops.grpo_fast.grpo_loss_cluster.default, (logits.clone(), *rest, False))
    torch.library.opcheck(torch.ops.grpo_fast.grpo_loss_cluster_.default, (logits.clone(), *rest))


def check_compiled(device: str, backend: str) -> None:
    """In a training step, without a graph break."""
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(523, 16, generator=generator).to(device).requires_grad_()
    hidden, advantages = torch.randn(2, 3, 16, generator=generator).to(device), torch.randn(2, generator=generator).to(device)
    ids = torch.randint(523, (2, 3), generator=generator).to(device)

    def step(x: Tensor) -> Tensor:
        return gf.grpo_loss(x @ weight.T, ids, advantages, temperature=0.6, impl="cluster", inplace=True).loss

    eager = torch.autograd.grad(step(hidden), weight)[0]
    compiled = torch.autograd.grad(torch.compile(step, fullgraph=True, backend=backend)(hidden), weight)[0]
    torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-5)


@needs_compiler
def test_a_shape_for_measuring(cluster: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """GRPO_FAST_CLUSTER sets the number of blocks: the sums have other parts; a number that the GPU does not have raises an error."""
    given = call(8, 4001, torch.float32)
    entropies = []
    for blocks in (1, 4):
        cluster(cluster=blocks, stages=3)
        entropies.append(gf.grpo_loss(**given, impl="cluster").entropy)
    torch.testing.assert_close(*entropies, rtol=1e-6, atol=1e-6)
    assert not torch.equal(*entropies)
    for stages in (1, 100):
        cluster(cluster=1, stages=stages)
        with pytest.raises(RuntimeError, match="GRPO_FAST_CLUSTER names a shape that this GPU does not support; unset it"):
            gf.grpo_loss(**given, impl="cluster")
    for text in ("auto", "4", "4x3x2", "-1x2", "3x3"):
        monkeypatch.setenv("GRPO_FAST_CLUSTER", text)
        with pytest.raises(RuntimeError, match=f"GRPO_FAST_CLUSTER is '{text}'; expected blocks by stages, such as 4x3, and 1, 2, 4 or 8"):
            gf.grpo_loss(**given, impl="cluster")


@needs_compiler
def test_opcheck(cluster: Callable[..., None]) -> None:
    cluster(cluster=2, stages=2, clusters=1)
    check_operators("cpu")


@needs_compiler
def test_compile_without_graph_breaks(cluster: Callable[..., None]) -> None:
    cluster(cluster=2, stages=2, clusters=1)
    check_compiled("cpu", "aot_eager")


# ---- the choice


def test_impl_is_rejected_where_it_is_not_available() -> None:
    given = call(3, 20, torch.float32)
    with pytest.raises(ValueError, match="impl is 'cuda'; expected None or one of"):
        gf.grpo_loss(**given, impl="cuda")
    with pytest.raises(RuntimeError, match="the logits are on cpu; expected an NVIDIA GPU of compute capability"):
        gf.grpo_loss(**given, impl="cluster")
    with gf.use_backend("reference"), pytest.raises(RuntimeError, match="computed by the backend 'reference'"):
        gf.grpo_loss(**given, impl="triton")
    with pytest.raises(ValueError, match="float64"):
        gf.grpo_loss(**{**given, "logits": given["logits"].double()}, impl="cluster")
    old = torch.zeros(1, 3)
    with pytest.raises(ValueError, match="single tokens"):
        gf.grpo_loss(**{**given, "config": gf.LossConfig(loss_type="gspo")}, old_logprobs=old, impl="cluster")


# ---- what nvcc makes of it


needs_nvcc = pytest.mark.skipif(build.find_cuda_home() is None, reason="no CUDA toolkit")


@needs_nvcc
def test_no_spills(tmp_path: Path) -> None:
    """608 threads leave 104 registers for each."""
    file = tmp_path / "cluster.json"
    subprocess.run([sys.executable, TOOLS / "nvcc_check.py", "--json", file], check=True)
    found = {(k["kernel"], k["arch"]): k for k in json.loads(file.read_text())}
    clusters = {name: k for name, k in found.items() if "_cluster_kernel" in name[0] and name[1] == "sm_90"}
    assert len(clusters) == 6
    for k in clusters.values():
        assert k["spilled"] == 0 and k["registers"] <= 104, k


@needs_nvcc
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton, which brings the disassembler, is not installed")
def test_few_instructions(tmp_path: Path) -> None:
    """Per logit, all passes together, in the machine code for sm_90: the bytes of 16-bit logits leave time for 27.6 on an H200.

    A soft cap is bound by arithmetic: two tanh for each logit.
    """
    file = tmp_path / "passes.json"
    subprocess.run([sys.executable, TOOLS / "sass.py", CSRC / "cuda" / "grpo_loss_cluster.cu", "--json", file], check=True)
    passes = json.loads(file.read_text())
    bounds = {"bf16": 12.5, "fp16": 12.5, "fp32": 12.0, "bf16+softcap": 52.0, "fp16+softcap": 52.0, "fp32+softcap": 52.0}
    assert set(passes) == set(bounds)
    for name, each in passes.items():
        assert each["maximum"] + each["sums"] + each["gradient"] <= bounds[name], (name, each)
        assert each["gradient+entropy"] <= each["gradient"] + 2, (name, each)
        assert each["fences"] == 2, (name, each)  # at the first and the last meeting of the cluster: none for a row
        assert each["invalidations"] == 5, (name, each)  # there, and in the wait for the other blocks: not in every wait


# ---- on a GPU with clusters


def none_here(why: str) -> NoReturn:
    """Skip on older GPUs, which have no clusters. On a GPU that has them, a skipped test would hide a missing kernel."""
    capability = torch.cuda.get_device_capability()
    if torch.version.hip is None and capability >= (9, 0):
        pytest.fail(f"a GPU of compute capability {capability} has clusters, but {why}", pytrace=False)
    pytest.skip(why)


def test_clusters_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for hip, capability, outcome in (
        (None, (9, 0), pytest.fail.Exception),
        (None, (8, 6), pytest.skip.Exception),
        ("7.0", (9, 4), pytest.skip.Exception),
    ):
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        with pytest.raises(outcome, match="of a reason"):
            none_here("of a reason")


@pytest.fixture
def gpu() -> None:
    logits = torch.zeros(1, 1, 32, device="cuda", dtype=torch.bfloat16)
    if why := why_no_clusters(logits):
        none_here(why)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", test_grpo_loss.DTYPES, ids=str)
def test_gpu_the_float64_truth(dtype: torch.dtype, gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """In clusters of every size: by default, vocabularies as small as these use one block."""
    from test_triton import gpu_case

    monkeypatch.setattr(test_grpo_loss, "random_case", gpu_case)
    computed = 0
    for seed in range(200):
        monkeypatch.setenv("GRPO_FAST_CLUSTER", "0x0" if seed % 5 == 0 else f"{2 ** (seed % 4)}x{2 + seed % 3}")
        computed += check(seed, dtype, monkeypatch)
    assert computed > 60


def check_vocabulary(call: dict[str, Any], *, inplace: bool = False, elsewhere: bool = False, runs: int = 3) -> None:
    """Against the float64 truth, and the same bits each time."""
    out, gradient = loss_and_gradient(call, impl="cluster", inplace=inplace, elsewhere=elsewhere)
    assert_true(call, out, gradient)
    for _ in range(runs - 1):
        again, its_gradient = loss_and_gradient(call, impl="cluster", inplace=inplace, elsewhere=elsewhere)
        assert torch.equal(gradient, its_gradient)
        assert all(torch.equal(a, b) for a, b in zip(out[:3], again[:3], strict=True))


@needs_compiler
@pytest.mark.parametrize("dtype", test_grpo_loss.DTYPES, ids=str)
def test_whole_vocabularies(dtype: torch.dtype, cluster: Callable[..., None]) -> None:
    """The requirements of the tests below on the GPU."""
    cluster(cluster=2, stages=2, clusters=1, seed=12)
    for entropy_coef, softcap, inplace, elsewhere in ((0.1, None, True, False), (0.1, 30.0, False, False), (0.0, None, False, True)):
        call = with_options(big(3, 3001, dtype, "cpu"), entropy_coef=entropy_coef, softcap=softcap)
        check_vocabulary(call, inplace=inplace, elsewhere=elsewhere, runs=2)


@pytest.mark.gpu
@pytest.mark.parametrize(("vocabulary", "dtype", "softcap"), VOCABULARIES, ids=str)
@pytest.mark.parametrize("inplace", [False, True])
def test_gpu_real_vocabularies(inplace: bool, vocabulary: int, dtype: torch.dtype, softcap: float | None, gpu: None) -> None:
    check_vocabulary(with_options(big(700, vocabulary, dtype), entropy_coef=0.1, softcap=softcap), inplace=inplace)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", test_grpo_loss.DTYPES, ids=str)
@pytest.mark.parametrize("rows", [3, 300])
def test_gpu_a_gradient_on_another_offset_than_the_logits(rows: int, dtype: torch.dtype, gpu: None) -> None:
    check_vocabulary(with_options(big(rows, 50257, dtype), entropy_coef=0.0, softcap=None), elsewhere=True)


@pytest.mark.gpu
def test_gpu_offsets_beyond_two_to_the_31(gpu: None) -> None:
    vocabulary = 2**18
    rows = 2**31 // vocabulary + 3
    if torch.cuda.mem_get_info()[0] < 3 * rows * vocabulary * 2:
        pytest.skip("needs 13 GB of free GPU memory")
    given = big(rows, vocabulary)
    out = gf.grpo_loss(**given, impl="cluster")
    out.loss.backward()
    last = {name: value[-2:].detach() for name, value in given.items()}
    few = gf.grpo_loss(**last, num_items=rows)
    torch.testing.assert_close(out.logprobs[-2:], few.logprobs, rtol=1e-5, atol=1e-6)
    assert (given["logits"].grad[-2:].abs().sum(1) > 0).all()


@pytest.mark.gpu
def test_gpu_graphs_streams_and_no_synchronisation(gpu: None) -> None:
    given = {**big(64, 32000), "impl": "cluster"}
    expected = torch.autograd.grad(gf.grpo_loss(**given).loss, given["logits"])[0]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        gf.grpo_loss(**given).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        late = given["logits"].detach().clone().requires_grad_()
        found = torch.autograd.grad(gf.grpo_loss(**{**given, "logits": late}).loss, late)[0]
    stream.synchronize()
    assert torch.equal(found, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (captured,) = torch.autograd.grad(gf.grpo_loss(**given).loss, given["logits"])
    graph.replay()
    assert torch.equal(captured, expected)


@pytest.mark.gpu
def test_gpu_opcheck_and_compile(gpu: None) -> None:
    check_operators("cuda")
    check_compiled("cuda", "inductor")


@pytest.mark.gpu
def test_gpu_the_device_of_the_logits_need_not_be_the_current_one(gpu: None) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    given: dict[str, Any] = {name: x.to("cuda:1") if isinstance(x, Tensor) else x for name, x in call(9, 1031, torch.bfloat16).items()}
    found = gf.grpo_loss(**given, impl="cluster")
    torch.testing.assert_close(found.logprobs, gf.grpo_loss(**given).logprobs, rtol=1e-5, atol=1e-5)
    assert found.loss.device == torch.device("cuda:1")


SANITIZED = """
import torch, grpo_fast as gf
for dtype in (torch.float32, torch.bfloat16):
    for vocabulary in (1031, 40009):
        z = torch.randn(5, vocabulary, device="cuda", dtype=dtype, requires_grad=True)
        ids = torch.randint(vocabulary, (5,), device="cuda")
        gf.grpo_loss(z, ids, torch.ones(5, device="cuda"), impl="cluster").loss.backward()
torch.cuda.synchronize()
"""


BARRIERS = ("--num-cuda-barriers", "64")  # more than a block has; the kernel uses no cuda::barrier from which the tool could count them


@pytest.mark.gpu
@pytest.mark.parametrize("tool", ["memcheck", "synccheck"])
def test_gpu_compute_sanitizer(tool: str, gpu: None) -> None:
    from test_triton import sanitized

    sanitized(tool, SANITIZED, *BARRIERS)


@pytest.mark.gpu
def test_gpu_racecheck_is_heard(gpu: None) -> None:
    """What it says is kept for a reader, and not judged: it knows no order between warps that meet at mbarriers by the instructions
    themselves, nor between a bulk copy and who waits for it there, and so may call each row's hand-over a race."""
    from test_triton import sanitizer

    _, output = sanitizer("racecheck", SANITIZED, *BARRIERS)
    print(output)
    if folder := os.environ.get("OUT"):
        (Path(folder) / "racecheck_cluster.log").write_text(output)
    assert "computed" in output
