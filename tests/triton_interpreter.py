"""The Triton kernels in Triton's interpreter, on CPU tensors, against the float64 reference.

Whether a kernel is interpreted is decided when it is defined, so test_triton.py runs this file in a separate process. By hand:
TRITON_INTERPRET=1 python -m pytest tests/triton_interpreter.py
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.runtime import interpreter

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before Python starts; tests/test_triton.py sets it", allow_module_level=True)

import compare
import custom_surrogate_cases
import test_grpo_loss
import test_linear
import test_operator_checks as operator_checks
from cases import KEPT, random_case
from extreme_cases import *  # noqa: F403
from launches import small_blocks, splitter
from linear_cases import random_linear_case
from row_cases import *  # noqa: F403
from support_cases import *  # noqa: F403
from test_triton import check_truth, check_vocabulary

import grpo_fast as gf
from grpo_fast.kernels import kept_products
from grpo_fast.kernels import token_logprobs as kernels
from grpo_fast.kernels.scale import scale_

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SEEDS = range(25)
BLOCK = 256  # small, so that a small vocabulary has plain blocks, the target's and a partial one

# Triton's interpreter cuts a float32 off to a bfloat16 where hardware rounds: up to one unit in the last place, not half of one.
ALLOWANCE = {**compare.ALLOWANCE, torch.bfloat16: 2.0**-7 + 2.0**-19}


_numpy_type = functools.cache(interpreter._get_np_dtype)  # which makes a table at each call


def numpy_type(of: Any) -> Any:
    """The type of numpy in which the interpreter keeps values of a type of Triton; pointers are not hashable."""
    return _numpy_type(triton.language.uint64 if of.scalar.is_ptr() else of.scalar)


PREPARED: set[str] = set()  # modules with device functions


def device_function(function: Any, *arguments: Any, **options: Any) -> Any:
    """Call a device function inside a kernel.

    Triton replaces the functions of triton.language again at each such call, which takes 40 % of the time. Once for each module is enough:
    what the launch of a kernel replaces it restores and replaces again at the next one, and the rest stays replaced.
    """
    if function.fn.__module__ not in PREPARED:
        interpreter._patch_lang(function.fn)
        PREPARED.add(function.fn.__module__)
    return function.rewrite()(*arguments, **options)


OF_LONG_ROWS = ("test_rows_that_lie_two_to_the_31_apart", "test_the_largest_vocabularies", "test_whole_vocabularies")


@pytest.fixture(autouse=True)
def in_the_interpreter(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    """Triton's interpreter computes each sum and product of integers again in 64 bits to see whether it overflows, in a third of its time:
    here only where offsets are large."""
    small_blocks(monkeypatch, BLOCK)
    if request.node.originalname not in OF_LONG_ROWS:
        unchecked = dataclasses.replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
        monkeypatch.setattr(interpreter.interpreter_builder, "options", unchecked)
    monkeypatch.setattr(interpreter, "_get_np_dtype", numpy_type)
    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", device_function)
    monkeypatch.setattr(compare, "ALLOWANCE", ALLOWANCE)
    with gf.use_backend("triton"):
        yield


@pytest.fixture
def split(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Force the number of programs per row."""
    return splitter(monkeypatch)


@pytest.fixture
def device() -> str:
    return "cpu"


# ---- the loss, over every option


@pytest.mark.parametrize("seed", [*SEEDS, *range(KEPT, KEPT + 4)])
def test_random_options(seed: int, split: Any) -> None:
    check_truth(seed, DTYPES[seed % 3], split)


@pytest.mark.parametrize(("dtype", "softcap"), [(torch.float32, 30.0), (torch.bfloat16, None), (torch.float16, 30.0)], ids=str)
def test_whole_vocabularies(dtype: torch.dtype, softcap: float | None, split: Any) -> None:
    """What is asked of a GPU with real ones: rows split and not, with and without the entropy bonus, the gradient on another offset."""
    for parts, entropy_coef, elsewhere in ((1, 0.1, False), (3, 0.0, False), (2, 0.1, True)):
        split(parts)
        check_vocabulary(3, 1307, dtype, softcap, entropy_coef=entropy_coef, elsewhere=elsewhere, device="cpu")


@pytest.mark.parametrize("seed", [*range(6), *range(KEPT, KEPT + 4)])
def test_the_head(seed: int) -> None:
    """Chunks of logits from hidden states, in one pass and in two."""
    test_linear.check(seed, DTYPES[seed % 2])


@pytest.mark.parametrize("seed", [2, KEPT + 1])
def test_a_custom_surrogate(seed: int) -> None:
    custom_surrogate_cases.test_a_repeated_formula_over_logits(seed)
    custom_surrogate_cases.test_every_input(seed, random_linear_case)


def test_the_random_options_are_all_there() -> None:
    configs = [random_case(seed, torch.float32).options["config"] for seed in SEEDS]
    assert {config.surrogate for config in configs} == {"clip", "cispo", "sapo", "vespo", "reinforce", "gmpo", "dppo_tv", "dppo_kl"}
    assert {config.level for config in configs} == {"token", "sequence", "sequence_token"}
    assert {config.kl_estimator for config in configs if config.beta} == {"k1", "k2", "k3"}
    assert any(config.bias_corrected_kl and config.beta for config in configs) and any(config.entropy_coef for config in configs)


@pytest.mark.sweep
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_random_options(dtype: torch.dtype, split: Any) -> None:
    for seed in (*SEEDS, *range(2000, 2060), *range(KEPT, KEPT + 30)):
        split(1 + seed % 4)
        test_grpo_loss.check(seed, dtype)


@pytest.mark.parametrize("vocabulary", [2, 4096, 32000, 152064, 262144])
def test_no_program_is_without_a_block(vocabulary: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And there are as many programs as keep the device busy, as far as there are blocks."""
    monkeypatch.setattr(kernels, "multiprocessors", lambda device: 132)
    blocks = triton.cdiv(vocabulary, kernels.BLOCK)
    for rows in (1, 2, 15, 16, 17, 64, 100, 132, 300, 528, 600, 5000):
        parts = kernels.parts_of(rows, vocabulary, kernels.BLOCK, torch.device("cpu"), None)
        each = triton.cdiv(blocks, parts)  # as row_slice divides them
        assert 1 <= parts <= blocks and (parts - 1) * each < blocks <= parts * each, (rows, parts)
        assert rows * parts >= min(132 * kernels.PROGRAMS_PER_MULTIPROCESSOR, rows * blocks), (rows, parts)


# ---- what bench/gpu_bench.py times on a GPU


def test_the_implementations_of_the_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them but torch.compile and the clusters, past the gate."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "bench"))
    import gpu_bench

    results = gpu_bench.Results(tmp_path / "gpu.json", "bench", "cpu")
    gpu_bench.one_shape(4, 301, gpu_bench.Timer("cpu", 1), "cpu", float("inf"), results)
    found = {(entry["step"], entry["name"]): entry for entry in results.whole["bench"]}
    steps = {("loss", "ours"), ("loss", "ours_inplace"), ("logprobs", "ours"), ("logprobs+entropy", "ours"), ("gradient", "ours")}
    if gpu_bench.imported("liger_kernel.ops.grpo_loss", "GrpoLossFunction"):
        steps |= {("loss", "liger")}
    if gpu_bench.imported("trl.trainer.utils", "selective_log_softmax_and_entropy"):
        steps |= {("loss", "trl"), ("loss", "trl_entropy"), ("logprobs", "trl")}
    wrong = {key: entry for key, entry in found.items() if "error" in entry}
    assert steps <= set(found) and not wrong, wrong


def test_what_tuning_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every launch passes the gate, runs the kernels with its own shape, and the fastest is reported."""
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
    assert {(kernels.BLOCK, kernels.WARPS, 2), (64, 1, 3), (128, 2, 3)} <= set(launched)  # parts of as many blocks each
    assert "expected an NVIDIA GPU" in entries["loss", "2x3 clusters"]["error"]
    report = gpu_tune.fastest(results.whole["tune"]).splitlines()
    assert [line.split(",")[0] for line in report] == ["logprobs", "logprobs+entropy", "gradient"]


# ---- as operators


def test_the_operators_refuse_what_would_be_read_out_of_bounds() -> None:
    """As the C++ operators do: test_operator_checks.py."""
    for name, change, named in operator_checks.WRONG:
        wrong = {name: change(operator_checks.arguments()[name])}
        for call in (
            operator_checks.logprobs,
            functools.partial(operator_checks.logprobs_backward, False),
            functools.partial(operator_checks.logprobs_backward, True),
            functools.partial(operator_checks.loss, False),
            functools.partial(operator_checks.loss, True),
        ):
            with pytest.raises(RuntimeError, match=named):
                call(**wrong)
    for shape in ((2, 2), (3, 3), (2,)):
        for name in operator_checks.FLOATS:
            with pytest.raises(RuntimeError, match=f"{name} has the wrong"):
                operator_checks.loss(True, **{name: torch.rand(*shape)})
        for name in ("g", "h", "logprobs", "entropy", "lse"):
            with pytest.raises(RuntimeError, match=r"grpo_fast: \w+ has the wrong"):
                operator_checks.logprobs_backward(True, **{name: torch.rand(*shape)})
    with pytest.raises(RuntimeError, match="lse has the wrong layout"):
        operator_checks.logprobs_backward(False, lse=torch.rand(1, 1))
    with pytest.raises(RuntimeError, match="1 settings given"):
        operator_checks.loss(False, settings=[0.0])


def test_the_launchers_refuse_what_would_be_read_out_of_bounds() -> None:
    hidden, weight, columns = torch.randn(2, 8), torch.randn(5, 8), torch.tensor([[1, 2, -1], [0, 4, 3]])
    gradient, into = torch.randn(2, 3), torch.zeros(5, 8)
    for call, named in (
        (lambda: scale_(torch.ones(4), torch.ones(2)), "factor is"),
        (lambda: scale_(torch.ones(4, 4).T, torch.tensor(1.0)), "x has strides"),
        (lambda: scale_(torch.ones(4, dtype=torch.int32), torch.tensor(1.0)), "x is torch.int32"),
        (lambda: kept_products.kept_logits(hidden[:1], weight, columns), "hidden has the wrong shape"),
        (lambda: kept_products.kept_logits(hidden, weight, columns.int()), "columns has the wrong dtype"),
        (lambda: kept_products.kept_logits(hidden, weight.T.contiguous().T, columns), "weight has strides"),
        (lambda: kept_products.kept_hidden_gradient(gradient[:, :2], weight, columns), "gradient has the wrong shape"),
        (lambda: kept_products.kept_hidden_gradient(gradient, weight[0], columns), "weight has the wrong shape"),
        (lambda: kept_products.add_kept_weight_gradient(into[:, :7], gradient, hidden, columns), "hidden has the wrong shape"),
        (lambda: kept_products.add_kept_weight_gradient(into, gradient.half(), hidden, columns), "gradient has the wrong dtype"),
        (lambda: kept_products.add_kept_weight_gradient(into, gradient, hidden, columns.T), "columns has strides"),
    ):
        with pytest.raises(RuntimeError, match=named):
            call()


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
