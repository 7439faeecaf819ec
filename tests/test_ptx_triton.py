"""What Triton compiles for sm_90, executed by the PTX machine (ptx_machine.py) on CPU tensors, against the truth in float64.

The launchers are those of the product. Approximate instructions are off by as much as NVIDIA allows, and warps run apart.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import test_grpo_loss
import test_linear
import torch
from cases import KEPT, Case
from compare import assert_close
from hang import HANG
from launches import parts_for, small_blocks, splitter
from ptx_cases import Batch, batch, check
from ptx_machine import FaultError, Hardware
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


def without_barriers(text: str) -> str:
    return re.sub(r"bar(rier)?\.sync[^;]*;", "", text)


def with_an_inverted_mask(text: str) -> str:
    return re.sub(r"setp\.lt\.s(32|64)", r"setp.ge.s\1", text, count=1)


def with_reversed_vectors(text: str) -> str:
    return re.sub(r"(st\.global\S*v4\S* [^{]*\{) *(%\w+), (%\w+), (%\w+), (%\w+)", r"\1 \5, \4, \3, \2", text)


@pytest.mark.parametrize(
    ("kernel", "mutant", "rows", "vocabulary"),
    [
        ("_token_sums_kernel", without_barriers, 5, 3003),
        ("_grpo_loss_terms_kernel", without_barriers, 200, 40),
        ("_token_sums_kernel", with_an_inverted_mask, 5, 3003),
        ("_grpo_loss_terms_kernel", with_an_inverted_mask, 5, 3003),
        ("_grpo_loss_total_kernel", with_an_inverted_mask, 5, 3003),
        ("_token_gradient_kernel", with_reversed_vectors, 5, 3003),
    ],
)
def test_mutants(kernel: str, mutant: Callable[[str], str], rows: int, vocabulary: int, launcher: Launcher) -> None:
    """A kernel whose PTX was changed is found out: by a fault, or by what it computes."""
    edited: list[bool] = []

    def edit(name: str, text: str) -> str:
        if name != kernel:
            return text
        edited.append(mutant(text) != text)
        return mutant(text)

    launcher.edit = edit
    with pytest.raises((AssertionError, FaultError)):
        check_loss(batch(rows, vocabulary, torch.bfloat16, before=3, after=2))
    assert edited and all(edited), "the text that the mutant changes is not in the PTX"


# ---- every variant, at length


def check_rows(dtype: torch.dtype, softcap: float, want_entropy: bool, elsewhere: bool) -> None:
    """Both kernels of whole rows, by their launchers, with a temperature for each token."""
    from grpo_fast.kernels.token_logprobs import LogitRows, Scoring, token_gradient, token_logprobs_fwd

    given = batch(4, 9001, dtype, before=3, after=2)
    temperatures, (g, h) = torch.tensor([[0.5, 1.0, 0.7, 2.0]]), torch.randn(2, 1, 4)
    h = h * want_entropy
    logits = given.logits.double().requires_grad_()
    log_p = torch.log_softmax((softcap * torch.tanh(logits / softcap) if softcap else logits) / temperatures.unsqueeze(-1), -1)
    logprobs, entropy = log_p.gather(-1, given.token_ids.unsqueeze(-1)).squeeze(-1), -(log_p.exp() * log_p).sum(-1)
    (true_gradient,) = torch.autograd.grad((g * logprobs + h * entropy).sum(), logits)
    rows, scoring = LogitRows(given.logits, given.token_ids, torch.ones_like(given.mask)), Scoring(temperatures, 1.0, softcap, 1.0)
    found = token_logprobs_fwd(rows, scoring, want_entropy=want_entropy, parts=2)
    if not want_entropy:  # it is undefined
        found = (found[0], torch.zeros(1, 4), found[2])
    gradient = torch.full((1, 4, 9001 + 5), float("nan"), dtype=dtype)[..., 3 + elsewhere : 9004 + elsewhere]
    token_gradient(rows, scoring, g, h, *found, gradient, want_entropy=want_entropy, parts=2)
    size = max(1.0, softcap)  # a soft cap multiplies the errors of its tanh
    assert_close(found[0], logprobs.detach(), logprobs.detach(), "logprobs", slack=2.0**-21 * size)
    if want_entropy:
        assert_close(found[1], entropy.detach(), entropy.detach(), "entropy", slack=2.0**-21 * size)
    assert_close(gradient, true_gradient, true_gradient, "gradient", slack=2.0**-21 * size * true_gradient.abs().max().item())


def check_surrogate(name: str, everything: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss with every optional input, or with none of them, by the comparison of test_grpo_loss.py."""
    given = batch(4, 301, torch.bfloat16)
    loss_type = next(each for each, row in gf.LOSS_TYPES.items() if row.surrogate == name)
    settings: dict[str, Any] = {"loss_type": loss_type} | ({"epsilon_high": 5.0} if name == "cispo" else {})
    options: dict[str, Any] = {"config": gf.LossConfig(**settings)}
    if everything:
        beside = {"old_logprobs": given.old_logprobs, "ref_logprobs": given.old_logprobs - 0.1, "rollout_weights": torch.rand(1, 4) + 0.5}
        options["config"] = gf.LossConfig(**settings, beta=0.04, entropy_coef=0.1)
        options |= beside | {"temperature": torch.rand(1, 4) + 0.5, "softcap": 30.0}
    case = Case(given.logits, given.token_ids, given.advantages, options)
    monkeypatch.setattr(test_grpo_loss, "random_case", lambda seed, dtype: case)
    test_grpo_loss.check(0, torch.bfloat16)


def key_of(variant: Any) -> tuple[Any, ...]:
    """A variant of tools/compile_triton.py as the launcher names it."""
    source = variant.source()
    return variant.kernel.fn.__name__, tuple(source.signature.items()), tuple(source.constants.items()), variant.warps


@pytest.mark.sweep
def test_every_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each that tools/compile_triton.py compiles, as it is launched: with the blocks of the product."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    import compile_triton
    from ptx.triton_launch import Launcher, triton_on_cpu

    from grpo_fast.loss.config import SURROGATES

    launcher = Launcher(APART)
    with triton_on_cpu(launcher):
        for dtype in DTYPES:
            for softcap in (0.0, 30.0):
                for want_entropy, elsewhere in itertools.product((False, True), (False, True)):
                    check_rows(dtype, softcap, want_entropy, elsewhere)
            kept_products(dtype, 136)
            kept_products(dtype, 37)
            scaled(dtype)
        for surrogate, everything in itertools.product(SURROGATES, (False, True)):
            if surrogate != "vespo":  # which reaches the kernels as REINFORCE
                check_surrogate(surrogate, everything, monkeypatch)
    missing = {variant.name for variant in compile_triton.variants() if key_of(variant) not in launcher.variants}
    assert not missing


@pytest.mark.sweep
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_options(dtype: torch.dtype, launcher: Launcher, split: Callable[[int], None]) -> None:
    """Every option of the loss by the comparison of test_grpo_loss.py, with kept sets too."""
    for seed in (*range(40), *range(KEPT, KEPT + 10)):
        split(parts_for(seed))
        launcher.hardware = Hardware(seed=seed, ranks=1 + seed % 3, error=float(seed % 2))
        test_grpo_loss.check(seed, dtype)


@pytest.mark.sweep
@pytest.mark.parametrize("seed", [*range(6), *range(KEPT, KEPT + 6)])
def test_the_head(seed: int, launcher: Launcher) -> None:
    """Chunks of logits from hidden states, with bfloat16 gradients of float32 logits, and the products of kept sets."""
    test_linear.check(seed, DTYPES[seed % 3])


OTHERS = os.environ.get("GRPO_FAST_TEST_TRITONS", "").split(os.pathsep)


@pytest.mark.sweep
@pytest.mark.parametrize("folder", [pytest.param(folder, id=Path(folder).name or "none") for folder in OTHERS])
def test_another_triton(folder: str) -> None:
    """Folders of other versions: pip install --no-deps --target FOLDER triton==3.6.0, then GRPO_FAST_TEST_TRITONS=FOLDER:..."""
    if not folder:
        pytest.skip("GRPO_FAST_TEST_TRITONS names no folder with another version of Triton")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([folder, str(ROOT)]), "GRPO_FAST_TEST_TRITONS": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", str(Path(__file__))]
    check_version = f"import triton; assert triton.__file__.startswith({str(Path(folder).resolve())!r}), triton.__file__"
    subprocess.run([sys.executable, "-c", check_version], env=environment, check=True)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=ROOT, timeout=HANG)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
