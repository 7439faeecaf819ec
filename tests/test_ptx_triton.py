"""What Triton compiles for sm_90, executed by the PTX machine (ptx_machine.py) on CPU tensors, against the truth in float64.

The launchers are those of the product. Approximate instructions are off by as much as NVIDIA allows, and warps run apart.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from compare import assert_close
from launches import small_blocks, splitter
from ptx_cases import Batch, batch, check
from ptx_machine import Hardware
from torch import Tensor

import grpo_fast as gf

if TYPE_CHECKING:
    from ptx.triton_launch import Launcher

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1: the kernels are interpreted, not compiled"),
]
ROOT = Path(__file__).resolve().parents[1]
BLOCK = 1024  # small, so that a small vocabulary has plain blocks, and so that compilation is fast
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
APART = Hardware(seed=1, ranks=2)


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launcher]:
    """The backend "triton" computes CPU tensors by the machine."""
    from ptx.triton_launch import Launcher, triton_on_cpu

    small_blocks(monkeypatch, BLOCK)
    launcher = Launcher(APART)
    with triton_on_cpu(launcher):
        yield launcher


@pytest.fixture
def split(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Force the number of programs per row."""
    return splitter(monkeypatch)


def check_loss(given: Batch, **options: Any) -> Tensor:
    """Forward and backward by the backend in force. Returns the gradient."""
    leaf = given.logits.requires_grad_()
    out = gf.grpo_loss(leaf * 1 if options.get("inplace") else leaf, **given.options, **options)
    (gradient,) = torch.autograd.grad(out.loss, leaf)
    check(given, out.loss, out.logprobs, out.entropy, gradient, out.metrics)
    return gradient


# ---- a quick selection


@pytest.mark.slow
def test_the_loss_and_its_gradient(launcher: Launcher, split: Callable[[int], None]) -> None:
    """Rows on every offset, whole and in parts, on a GPU whose warps go on together and on one whose warps run apart."""
    results = []
    for parts, hardware in ((1, Hardware()), (3, APART), (3, Hardware(seed=5, ranks=3, error=0.0))):
        split(parts)
        launcher.hardware = hardware
        results.append(check_loss(batch(5, 3003, torch.bfloat16, before=3, after=2)))
    assert torch.equal(results[0][0, 2], torch.zeros(3003)), "the masked row"
    kernels = {"_token_sums_kernel", "_grpo_loss_terms_kernel", "_grpo_loss_total_kernel", "_token_gradient_kernel"}
    assert launcher.kernels == kernels and launcher.launches == 4 * len(results)


@pytest.mark.slow
def test_log_probabilities_of_a_capped_policy(launcher: Launcher, split: Callable[[int], None]) -> None:
    """float32 logits with a soft cap and a temperature for each token."""
    split(2)
    given = batch(4, 1051, torch.float32, before=1, softcap=5.0)
    temperatures = torch.tensor([[0.5, 1.0, 0.7, 2.0]])
    exact = given.logits.double().requires_grad_()
    log_p = torch.log_softmax(5 * torch.tanh(exact / 5) / temperatures.unsqueeze(-1), -1)
    logprobs, entropy = log_p.gather(-1, given.token_ids.unsqueeze(-1)).squeeze(-1), -(log_p.exp() * log_p).sum(-1)
    (true_gradient,) = torch.autograd.grad((2 * logprobs + entropy).sum(), exact)
    leaf = given.logits.requires_grad_()
    out = gf.token_logprobs(leaf, given.token_ids, temperature=temperatures, softcap=5.0)
    (gradient,) = torch.autograd.grad((2 * out.logprobs + out.entropy).sum(), leaf)
    for name, found, true in (
        ("logprobs", out.logprobs, logprobs),
        ("entropy", out.entropy, entropy),
        ("gradient", gradient, true_gradient),
    ):
        assert_close(found, true.detach(), true.detach(), name)
    assert launcher.kernels == {"_token_sums_kernel", "_token_logprobs_kernel", "_token_gradient_kernel"}


def kept_products(dtype: torch.dtype, size: int) -> None:
    """The products of a head at the ids of kept sets, with ids that are left out and ids that several tokens have."""
    from grpo_fast.kernels.kept_products import add_kept_weight_gradient, kept_hidden_gradient, kept_logits

    generator = torch.Generator().manual_seed(size)
    hidden, weight = (torch.randn(rows, size, generator=generator).to(dtype) for rows in (3, 40))
    columns = torch.randint(40, (3, 21), generator=generator)
    columns[:, 5], columns[1, ::3], columns[2, 7] = 13, -1, 40
    kept = (columns >= 0) & (columns < 40)
    rows = weight.double()[columns.clamp(0, 39)] * kept.unsqueeze(-1)
    gradient, into = torch.randn(3, 21, generator=generator), torch.randn(40, size, generator=generator)
    logits = torch.einsum("nd,nkd->nk", hidden.double(), rows)
    of_hidden = torch.einsum("nk,nkd->nd", gradient.double(), rows)
    contributions = gradient.double().unsqueeze(-1) * hidden.double().unsqueeze(1) * kept.unsqueeze(-1)
    of_weight = into.double().index_add(0, columns.clamp(0, 39).flatten(), contributions.flatten(0, 1))
    assert_close(kept_logits(hidden, weight, columns), logits, logits, "logits")
    assert_close(kept_hidden_gradient(gradient, weight, columns), of_hidden, of_hidden, "gradient of hidden")
    add_kept_weight_gradient(into, gradient, hidden, columns)
    assert_close(into, of_weight, of_weight, "gradient of weight")


@pytest.mark.slow
def test_products_of_kept_sets(launcher: Launcher) -> None:
    kept_products(torch.bfloat16, 136)
    assert launcher.kernels == {"_kept_logits_kernel", "_kept_hidden_gradient_kernel", "_add_kept_weight_gradient_kernel"}


def scaled(dtype: torch.dtype) -> None:
    from grpo_fast.kernels.scale import scale_

    x = torch.randn(9003, generator=torch.Generator().manual_seed(0)).to(dtype)[3:]
    expected = (x.float() * 0.37).to(dtype)
    assert torch.equal(scale_(x, torch.tensor(0.37)), expected)
    assert torch.equal(scale_(x, torch.tensor(1.0)), expected)


# ---- mutants: what the machine must not let pass


def gradient_of_capped(launcher: Launcher) -> None:
    check_loss(batch(5, 3003, torch.bfloat16, before=3, after=2))


def removed(pattern: str, occurrence: int = 0) -> Callable[[str, str], str]:
    return changed(pattern, "", occurrence)


def changed(old: str, new: str, occurrence: int = 0) -> Callable[[str, str], str]:
    """An edit of all kernels that have it: the occurrence of this text becomes another."""

    def edit(name: str, text: str) -> str:
        pieces = text.split(old)
        if len(pieces) <= occurrence + 1:
            return text
        return old.join(pieces[: occurrence + 1]) + new + old.join(pieces[occurrence + 1 :])

    return edit
