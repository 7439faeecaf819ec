"""What nvcc compiles for sm_90, executed by the PTX machine (ptx_machine.py) on CPU tensors, against the truth in float64."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ptx.cuda_arguments import layout_check
from ptx.cuda_compile import ROOT, WHY_NOT
from ptx.cuda_launch import ClusterLauncher
from ptx_cases import Batch, batch, check
from ptx_machine import Hardware

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
