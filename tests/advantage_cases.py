"""The backends of group_advantages, the CUDA kernel without a GPU among them, and the comparison with the float64 reference."""

from __future__ import annotations

import math
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from compare import labelled
from torch import Tensor
from torch.utils import cpp_extension

import grpo_fast as gf
from grpo_fast.loss import advantages as advantages_module
from grpo_fast.loss import reference
from grpo_fast.loss.advantages import GroupAdvantages, group_advantages
from grpo_fast.ops import build, extension

NAN = math.nan
HERE = Path(__file__).resolve().parent
CSRC = HERE.parent / "csrc"

needs_extension = pytest.mark.skipif(not extension.load(), reason=f"the extension is not loaded: {extension.status().why}")
needs_compiler = pytest.mark.skipif(build.cxx_compiler() is None, reason="no C++ compiler")
BACKENDS = [
    "reference",
    pytest.param("cpu", marks=needs_extension),
    pytest.param("cuda_on_host", marks=[needs_extension, needs_compiler]),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


# ---- the backends


@pytest.fixture(scope="session")
def cuda_on_host(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The operators of tests/cuda_on_host: csrc/cuda/group_advantages_cuda.cu, compiled by the C++ compiler."""
    folder = tmp_path_factory.mktemp("cuda_on_host")
    source, launches = re.subn(
        r"([\w:]+<[\w, ]+>)<<<(.+?)>>>\(", r"cuda_on_host::launch(\1, \2, ", (CSRC / "cuda" / "group_advantages_cuda.cu").read_text()
    )
    assert launches == 2, "the kernel launches of the .cu file are not where they were"
    (folder / "kernel.cpp").write_text(source.replace('"../group_advantages.h"', '"group_advantages.h"'))
    compiler, library = build.cxx_compiler(), folder / "cuda_on_host.so"
    assert compiler is not None
    folders = [f"-I{HERE / 'cuda_on_host'}", f"-I{CSRC}"]
    subprocess.run([compiler, "-O1", "-std=c++17", "-fPIC", "-D__CUDACC__", *folders, "-c", "kernel.cpp"], cwd=folder, check=True)
    torch_flags = [build.TARGET_TORCH, *(f"-I{each}" for each in cpp_extension.include_paths())]
    operator = HERE / "cuda_on_host" / "group_advantages_op.cpp"
    libraries = [*(f"-L{each}" for each in cpp_extension.library_paths()), "-lc10", "-ltorch", "-ltorch_cpu"]
    command: list[str | Path] = [
        compiler,
        "-O1",
        "-std=c++17",
        "-fPIC",
        "-shared",
        *folders,
        *torch_flags,
        operator,
        "kernel.o",
        "-o",
        library,
        *libraries,
    ]
    subprocess.run(command, cwd=folder, check=True)
    torch.ops.load_library(library)
    return torch.ops.grpo_fast_cuda_on_host


class Backend:
    """group_advantages of one backend, for CPU tensors in and out."""

    def __init__(self, name: str):
        self.name = name

    def __call__(self, rewards: Tensor, **arguments: Any) -> GroupAdvantages:
        if self.name != "cuda":
            with gf.use_backend("reference" if self.name == "reference" else "cpu"):
                return group_advantages(rewards, **arguments)
        on_gpu: dict[str, Any] = {name: x.cuda() if isinstance(x, Tensor) else x for name, x in arguments.items()}
        return GroupAdvantages(*(x.cpu() for x in group_advantages(rewards.cuda(), **on_gpu)))


@pytest.fixture
def cuda_kernel() -> None:
    """Checks that the kernel computes tensors on a GPU. Without it the reference would compute them, and every test would pass."""
    assert advantages_module._has_kernel("cuda"), f"the CUDA kernel is not there: {extension.status()}"
    assert advantages_module._operator_computes(torch.device("cuda")), "the kernel is there, and is not what computes"


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    if request.param == "cuda_on_host":
        operators = request.getfixturevalue("cuda_on_host")
        monkeypatch.setattr(torch.ops.grpo_fast, "group_advantages", operators.group_advantages)
    if request.param == "cuda":
        request.getfixturevalue("cuda_kernel")
    return Backend(request.param)


# ---- comparing


def assert_close(actual: GroupAdvantages, expected: tuple[Tensor, ...]) -> None:
    """Within a rounding to float32 of the float64 truth (2e-7 relative), and 1e-7 for what cancels; a zero is a zero; types and shapes."""
    names = GroupAdvantages._fields
    for name, got, want in zip(names, actual, expected, strict=True):
        want = torch.as_tensor(want)
        assert got.dtype == (torch.bool if name == "degenerate" else torch.float32), name
        assert not got.requires_grad, name
        torch.testing.assert_close(got.to(want.dtype), want, rtol=2e-7, atol=1e-7, msg=labelled(name))
        if want.dtype.is_floating_point:
            assert (got[want == 0] == 0).all(), f"{name}: not exactly 0 where the truth is"


def truth(rewards: Tensor, **arguments: Any) -> tuple[Tensor, ...]:
    return reference.group_advantages(rewards, **arguments)
