"""The Triton kernels: in the interpreter everywhere, and on the hardware where there is some."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_grpo_loss
import torch
from cases import KEPT, Case, random_case
from hang import HANG
from launches import parts_for, small_blocks, splitter
from packaging.version import Version
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from vocabulary_cases import VOCABULARIES, assert_true, big, loss_and_gradient, with_options

import grpo_fast as gf

HERE = Path(__file__).parent


def why_no_interpreter() -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    triton, numpy = (Version(importlib.metadata.version(name)) for name in ("triton", "numpy"))
    if triton < Version("3.7") and numpy >= Version("2.4"):
        return f"the interpreter of triton {triton} does not work with numpy {numpy}: its loops need a scalar where it has an array"
    return ""


def interpret(*arguments: str) -> None:
    """Run the interpreter's tests in a process of their own: a kernel is interpreted or compiled from its definition on."""
    if reason := why_no_interpreter():
        pytest.skip(reason)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore",
        *arguments,
        str(HERE / "triton_interpreter.py"),
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=HERE.parent)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.slow
def test_in_the_interpreter() -> None:
    interpret("-m", "not sweep")


@pytest.mark.sweep
def test_in_the_interpreter_at_length() -> None:
    interpret("-m", "sweep")


def far_apart(logits: Tensor) -> Tensor:
    """A copy of [1, 2, V] of a 16-bit type whose rows lie 2^31 elements apart, in memory of which nothing else is touched."""
    if logits.is_cuda:
        memory = torch.empty(2**31 + logits.shape[2], dtype=torch.int16, device=logits.device)
    else:
        import numpy

        memory = torch.from_numpy(numpy.empty(2**31 + logits.shape[2], numpy.int16))  # torch's own would be filled with NaN
    return memory.view(logits.dtype).as_strided(logits.shape, (1, 2**31, 1)).copy_(logits)


# ---- no synchronization with the device


class ValuesAskedFor(TorchDispatchMode):
    """Counts reads of a tensor's value, and copies between host and device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        options = options or {}
        moved = function is torch.ops.aten._to_copy.default and torch.device(options.get("device") or arguments[0].device)
        if function is torch.ops.aten._local_scalar_dense.default or (moved and moved.type != arguments[0].device.type):
            self.found.append(str(function))
        return function(*arguments, **options)


@pytest.fixture
def no_values(monkeypatch: pytest.MonkeyPatch) -> str:
    """A device whose tensors have no values, so that reading one is an error. The operators run their fake implementations there."""
    monkeypatch.setattr(importlib.import_module("grpo_fast.ops.backends"), "_default", lambda device_type: "triton")
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # knows no such device
    for name in ("tensor", "as_tensor"):
        original = getattr(torch, name)

        def made(data: Any, *rest: Any, original: Any = original, device: Any = None, **options: Any) -> Tensor:
            assert device is None or isinstance(data, Tensor), "a number is made on the host and copied, and the host waits: torch.full"
            return original(data, *rest, device=device, **options)

        monkeypatch.setattr(torch, name, made)
    return "meta"


def test_a_synchronization_is_detected(no_values: str) -> None:
    with ValuesAskedFor() as asked:
        torch.ones(3).sum().item()
        torch.ones(3).to(no_values)
        torch.ones(3, device=no_values).to(torch.float16)
    assert asked.found == ["aten._local_scalar_dense.default", "aten._to_copy.default"]
    with pytest.raises(AssertionError, match="the host waits"):
        torch.as_tensor(1.0, device=no_values)
    with pytest.raises(RuntimeError, match="meta"):
        torch.ones((), device=no_values).item()


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("loss_type", list(gf.LOSS_TYPES))
def test_no_value_is_asked_for(loss_type: str, inplace: bool, no_values: str) -> None:
    """Forward and backward, padded and packed, with every option: no .item(), no bool(), no nonzero()."""
    logits = torch.randn(2, 4, 100, device=no_values, requires_grad=True)
    ids, per_token = torch.randint(100, (2, 3), device=no_values), torch.randn(2, 3, device=no_values)
    constants: dict[str, Any] = {"old_logprobs": per_token, "ref_logprobs": per_token, "rollout_weights": per_token}
    config = gf.LossConfig(loss_type=loss_type, beta=0.1, entropy_coef=0.1, max_completion_length=3)
    settings: dict[str, Any] = {"config": config, "inplace": inplace}
    with ValuesAskedFor() as asked:
        padded: dict[str, Any] = {
            "mask": per_token > 0,
            "temperature": torch.ones(2, device=no_values),
            "num_items": torch.ones((), device=no_values),
        }
        out = gf.grpo_loss(logits * 1, ids, per_token[:, 0], **constants, **padded, **settings)
        (0.5 * out.loss).backward()
        flat: dict[str, Any] = {name: x.flatten() for name, x in constants.items()}
        bounds = torch.zeros(3, dtype=torch.int32, device=no_values)
        flat |= {"cu_seqlens": bounds, "num_items": 100}
        packed = gf.grpo_loss(logits[:, 1:].flatten(0, 1) * 1, ids.flatten(), per_token.flatten(), **flat, **settings)
        packed.loss.backward()
        statistics = gf.token_logprobs(logits, ids, mask=per_token > 0, softcap=5.0, temperature=0.7)
        (statistics.logprobs + statistics.entropy).sum().backward()
    assert not asked.found


# ---- on a GPU


def on_gpu(x: Any) -> Any:
    return x.to("cuda") if isinstance(x, (Tensor, gf.Support)) else x


def gpu_case(seed: int, dtype: torch.dtype) -> Case:
    case = random_case(seed, dtype)
    return Case(on_gpu(case.logits), on_gpu(case.token_ids), on_gpu(case.advantages), {k: on_gpu(v) for k, v in case.options.items()})


@pytest.fixture
def triton_backend() -> None:
    status = gf.backends()["triton"]
    assert status.usable, status.why


def check_truth(seed: int, dtype: torch.dtype, split: Callable[[int], None]) -> None:
    """A random case with its rows in a drawn number of parts."""
    split(parts_for(seed))
    test_grpo_loss.check(seed, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", test_grpo_loss.DTYPES, ids=str)
def test_the_float64_truth(dtype: torch.dtype, triton_backend: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks of which these vocabularies have more than one."""
    monkeypatch.setattr(test_grpo_loss, "random_case", gpu_case)
    small_blocks(monkeypatch, 1024)
    split = splitter(monkeypatch)
    for seed in (*range(100), *range(KEPT, KEPT + 40)):
        check_truth(seed, dtype, split)


def check_vocabulary(
    rows: int,
    vocabulary: int,
    dtype: torch.dtype,
    softcap: float | None,
    *,
    entropy_coef: float = 0.1,
    elsewhere: bool = False,
    device: str = "cuda",
) -> None:
    """Each row and column against the float64 truth; elsewhere: the gradient lies on another offset than the logits."""
    call = with_options(big(rows, vocabulary, dtype, device), entropy_coef=entropy_coef, softcap=softcap)
    assert_true(call, *loss_and_gradient(call, elsewhere=elsewhere))


@pytest.mark.gpu
@pytest.mark.parametrize(("vocabulary", "dtype", "softcap"), VOCABULARIES, ids=str)
@pytest.mark.parametrize("rows", [3, 300])
def test_real_vocabularies(rows: int, vocabulary: int, dtype: torch.dtype, softcap: float | None, triton_backend: None) -> None:
    """As they are launched. Few rows are split over programs; odd vocabularies put every row on another offset."""
    check_vocabulary(rows, vocabulary, dtype, softcap)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", test_grpo_loss.DTYPES, ids=str)
@pytest.mark.parametrize("rows", [3, 300])
def test_a_gradient_on_another_offset_than_the_logits(rows: int, dtype: torch.dtype, triton_backend: None) -> None:
    check_vocabulary(rows, 50257, dtype, None, elsewhere=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", test_grpo_loss.DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_few_rows_without_an_entropy_bonus(softcap: float | None, dtype: torch.dtype, triton_backend: None) -> None:
    check_vocabulary(3, 128257, dtype, softcap, entropy_coef=0.0)


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31(triton_backend: None) -> None:
    vocabulary = 2**18
    rows = 2**31 // vocabulary + 3
    if torch.cuda.mem_get_info()[0] < 3 * rows * vocabulary * 2:
        pytest.skip("needs 13 GB of free GPU memory")
    call = big(rows, vocabulary)
    out = gf.grpo_loss(**call)
    out.loss.backward()
    last = {name: value[-2:].detach() for name, value in call.items()}
    last["logits"].requires_grad_()
    few = gf.grpo_loss(**last, num_items=rows)
    few.loss.backward()
    torch.testing.assert_close(out.logprobs[-2:], few.logprobs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(call["logits"].grad[-2:], last["logits"].grad, rtol=1e-2, atol=1e-14)


@pytest.mark.gpu
def test_more_rows_than_a_grid_dimension_but_x_holds(triton_backend: None) -> None:
    call = big(70001, 32, torch.float32)
    out = gf.grpo_loss(**call)
    out.loss.backward()
    truth = torch.log_softmax(call["logits"].detach().double(), -1).gather(1, call["token_ids"][:, None])[:, 0]
    assert (out.logprobs - truth).abs().max() < 1e-5
    assert (call["logits"].grad.abs().sum(1) > 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [5, 700])
def test_the_same_bits_from_run_to_run(rows: int, triton_backend: None) -> None:
    call = big(rows, 152064)
    results = []
    for _ in range(5):
        out = gf.grpo_loss(**call, temperature=0.7)
        results.append((*torch.autograd.grad(out.loss, call["logits"]), out.loss, out.entropy, *out.metrics.values()))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("loss_type", ["dapo", "gspo"])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_nothing_waits_for_the_gpu(loss_type: str, scale: float, triton_backend: None) -> None:
    logits = torch.randn(4, 9, 1000, device="cuda", requires_grad=True)
    ids, advantages = torch.randint(1000, (4, 9), device="cuda"), torch.randn(4, device="cuda")
    call: dict[str, Any] = {"config": gf.LossConfig(loss_type=loss_type), "old_logprobs": torch.randn(4, 9, device="cuda") - 7}
    (gf.grpo_loss(logits * 1, ids, advantages, **call, inplace=True).loss * scale).backward()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            (gf.grpo_loss(logits * 1, ids, advantages, **call, inplace=True).loss * scale).backward()
            (gf.grpo_loss(logits, ids, advantages, **call).loss * scale).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not [event.key for event in profile.key_averages() if event.key in ("aten::_local_scalar_dense", "aten::item")]


@pytest.mark.gpu
def test_cuda_graph(triton_backend: None) -> None:
    call = big(64, 32000)
    fixed = {**call, "inplace": False}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            torch.autograd.grad(gf.grpo_loss(**fixed).loss, call["logits"])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = gf.grpo_loss(**fixed)
        (gradient,) = torch.autograd.grad(out.loss, call["logits"])
    for seed in range(3):
        with torch.no_grad():
            call["logits"].copy_(torch.randn(call["logits"].shape, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        eager = gf.grpo_loss(**fixed)
        (expected,) = torch.autograd.grad(eager.loss, call["logits"])
        assert torch.equal(out.loss, eager.loss) and torch.equal(gradient, expected)


@pytest.mark.gpu
def test_streams(triton_backend: None) -> None:
    """On the current stream: ordered after what was enqueued there, whatever the default stream does."""
    call = big(200, 50000)
    expected = torch.autograd.grad(gf.grpo_loss(**call).loss, call["logits"])[0]
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        late = call["logits"].detach().clone().requires_grad_()
        found = torch.autograd.grad(gf.grpo_loss(**{**call, "logits": late}).loss, late)[0]
    stream.synchronize()
    assert torch.equal(found, expected)


@pytest.mark.gpu
def test_the_device_of_the_logits_need_not_be_the_current_one(triton_backend: None) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    logits = torch.randn(2, 3, 100, device="cuda:1", requires_grad=True)
    out = gf.grpo_loss(logits, torch.randint(100, (2, 3), device="cuda:1"), torch.ones(2, device="cuda:1"))
    out.loss.backward()
    assert logits.grad is not None and logits.grad.device == out.loss.device == torch.device("cuda:1")


@pytest.mark.gpu
@pytest.mark.parametrize("loss_type", ["dapo", "gspo"])
def test_compile(loss_type: str, triton_backend: None) -> None:
    torch._dynamo.reset()
    ids, advantages = torch.randint(1000, (3, 5), device="cuda"), torch.randn(3, device="cuda")
    weight = (torch.randn(1000, 64, device="cuda") / 8).bfloat16().requires_grad_()  # logits of standard deviation 1
    hidden = torch.randn(3, 5, 64, device="cuda", dtype=torch.bfloat16)

    def step(x: Tensor) -> Tensor:
        config = gf.LossConfig(loss_type=loss_type, entropy_coef=0.01)
        return gf.grpo_loss(x @ weight.T, ids, advantages, config=config, temperature=0.6, inplace=True).loss

    eager = torch.autograd.grad(step(hidden), weight)[0]
    compiled = torch.autograd.grad(torch.compile(step, fullgraph=True)(hidden), weight)[0]
    torch.testing.assert_close(compiled, eager, rtol=2e-2, atol=1e-4)


SANITIZER_SECONDS = HANG


def sanitizer(tool: str, code: str, *options: str) -> tuple[int, str]:
    """(exit code, output) of Python code under a tool of compute-sanitizer: 9 where that finds something. Skips where there is
    none, or none for this GPU."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        pytest.skip("compute-sanitizer is not installed")
    always = ["--tool", tool, "--error-exitcode", "9", "--target-processes", "application-only"]  # not Triton's assembler
    always += ["--report-api-errors", "no"]  # libraries ask for what a driver may not have, and go on without it
    if tool == "racecheck":
        always += ["--racecheck-detect-level", "error"]
    command = [program, *always, *options, sys.executable, "-c", f"{code}\nprint('computed')"]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    ) as process:
        try:
            output, _ = process.communicate(timeout=SANITIZER_SECONDS)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)  # its child too, which may hold the GPU
            output, _ = process.communicate()
            if isinstance(error, subprocess.TimeoutExpired):
                pytest.fail(f"{tool} did not finish within {SANITIZER_SECONDS} s: {output[-3000:]}", pytrace=False)
            raise
    if "Device not supported" in output:
        pytest.skip(f"compute-sanitizer does not know this GPU: {output[-1000:]}")
    return process.returncode, output


def sanitized(tool: str, code: str, *options: str) -> None:
    """Nothing is to be found."""
    status, output = sanitizer(tool, code, *options)
    assert status == 0 and "computed" in output, output[-4000:]


SANITIZED = """
import torch, grpo_fast as gf
for dtype in (torch.float32, torch.bfloat16):
    for rows, vocabulary in ((3, 9001), (600, 131)):
        z = torch.randn(rows, vocabulary, device="cuda", dtype=dtype, requires_grad=True)
        ids, advantages = torch.randint(vocabulary, (rows,), device="cuda"), torch.ones(rows, device="cuda")
        (0.5 * gf.grpo_loss(z * 1, ids, advantages, inplace=True, config=gf.LossConfig(entropy_coef=0.1)).loss).backward()
gf.group_advantages(torch.randn(24, device="cuda"), group_size=8)
torch.cuda.synchronize()
"""


@pytest.mark.gpu
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(tool: str, triton_backend: None) -> None:
    """Rows split over programs and whole ones, in place, scaled afterwards; and the advantages of groups."""
    sanitized(tool, SANITIZED)
