"""The CPU's matrix products with a float32 result: against float64, and the same bits whatever else is in the call."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from grpo_fast.ops import extension
from grpo_fast.ops.product import SUM_BLOCK

pytestmark = pytest.mark.skipif(not extension.load(), reason=f"the extension is not loaded: {extension.status().why}")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(1, 1, 1), (3, 5, 7), (17, 33, 49), (34, 130, 200), (33, 600, 97), (8, 64, 96), (5, 0, 3), (0, 4, 3), (4, 4, 0)]  # M, K, N
TILES = (300, 520, 1000)  # several tiles of the result both ways, and several blocks of K


def product(a: Tensor, b: Tensor, *, bias: Tensor | None = None, into: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """a @ b into rows that are padded with NaN, which must stay."""
    memory = torch.full((a.shape[0], b.shape[1] + 3), math.nan, dtype=dtype)
    out = memory[:, : b.shape[1]]
    if into is not None:
        out.copy_(into)
    torch.ops.grpo_fast.product_(out, a, b, bias, into is not None)
    assert memory[:, b.shape[1] :].isnan().all()
    return out


def strided(x: Tensor, layout: str) -> Tensor:
    """x with other strides, among NaN."""
    rows, columns = x.shape
    if layout == "transposed":
        memory = x.new_full((columns, rows + 5), math.nan)
        view = memory[:, :rows].t()
    elif layout == "sparse":
        view = x.new_full((2 * rows, 3 * columns), math.nan)[::2, ::3]
    else:
        view = x.new_full((rows, columns + 5), math.nan)[:, :columns]
    return view.copy_(x)


@pytest.mark.parametrize("dtypes", [(x, x) for x in DTYPES] + [(torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)], ids=str)
def test_against_float64(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    for m, k, n in SHAPES:
        a, b = torch.randn(m, k).to(dtypes[0]), torch.randn(k, n).to(dtypes[1])
        bias, start = torch.randn(n), torch.randn(m, n)
        truth, plain = a.double() @ b.double(), product(a, b)
        bound = 2.0**-20 * (a.double().abs() @ b.double().abs() + 4)
        assert ((plain - truth).abs() <= bound).all(), (m, k, n)
        assert ((product(a, b, bias=bias) - truth - bias).abs() <= bound).all()
        assert ((product(a, b, into=start) - truth - start).abs() <= bound).all()
        for layout_a in ("padded", "transposed", "sparse"):
            for layout_b in ("padded", "transposed", "sparse"):
                assert torch.equal(product(strided(a, layout_a), strided(b, layout_b)), plain), (m, k, n, layout_a, layout_b)


@pytest.mark.parametrize("result", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_result_of_16_bits_is_rounded_once(dtype: torch.dtype, result: torch.dtype) -> None:
    for m, k, n in [*SHAPES, TILES]:
        a, b, bias, start = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype), torch.randn(n), torch.randn(m, n).to(result)
        assert torch.equal(product(a, b, dtype=result), product(a, b).to(result)), (m, k, n)
        assert torch.equal(product(a, b, bias=bias, dtype=result), product(a, b, bias=bias).to(result))
        assert torch.equal(product(a, b, into=start, dtype=result), product(a, b, into=start.float()).to(result))
    lost = torch.tensor([[math.nan, -math.nan, math.inf, 1e38, -3e-45]])
    assert torch.equal(product(torch.ones(1, 1), lost, dtype=result).isnan(), lost.isnan())
    assert product(torch.ones(1, 1), lost[:, 2:], dtype=result).tolist() == lost[:, 2:].to(result).tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_operands_that_are_too_large_to_be_packed_at_once(dtype: torch.dtype) -> None:
    large, small = torch.randn(17_000, 256).to(dtype), torch.randn(256, 500).to(dtype)
    rows = [0, 255, 256, 9_001, 16_999]
    assert torch.equal(product(large, small)[rows], product(large[rows], small))
    assert torch.equal(product(small.t(), large.t())[:, rows], product(small.t(), large[rows].t()))


def test_logits_of_a_head_are_accurate() -> None:
    """Log-probabilities are within 1e-5 of float64 at D = 896 and logits up to about 16."""
    hidden, weight = torch.randn(32, 896).bfloat16(), (torch.randn(5000, 896) * 4 / 896**0.5).bfloat16()
    truth = hidden.double() @ weight.double().t()
    assert truth.abs().max() > 14
    logits = product(hidden, weight.t())
    error = (logits.double().log_softmax(-1) - truth.log_softmax(-1)).abs()
    assert error.max() < 1e-5
    assert error.mean() < 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_the_tile(dtype: torch.dtype) -> None:
    m, k, n = TILES
    a, b = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
    truth, whole = a.double() @ b.double(), product(a, b)
    assert ((whole - truth).abs() <= 2.0**-20 * (a.double().abs() @ b.double().abs() + 4)).all()
    for rows, columns in ((slice(0, 3), slice(0, n)), (slice(254, 258), slice(470, 490)), (slice(0, m), slice(959, 961))):
        assert torch.equal(product(a[rows], b[:, columns]), whole[rows, columns])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_the_rest_of_the_call(dtype: torch.dtype) -> None:
    a, b = torch.randn(75, 300).to(dtype), torch.randn(300, 230).to(dtype)
    whole = product(a, b)
    for rows in ([0], [74, 3], list(range(16)), list(range(7, 60)), torch.randperm(75).tolist()):
        assert torch.equal(product(a[rows], b), whole[rows])
        for columns in (slice(0, 1), slice(5, 22), slice(96, 230), slice(1, 193)):
            assert torch.equal(product(a[rows], b[:, columns]), whole[rows, columns])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            assert torch.equal(product(a, b), whole)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sum_divided_at_blocks_has_the_bits_of_one_call(dtype: torch.dtype) -> None:
    a, b = torch.randn(40, 11 * SUM_BLOCK - 9).to(dtype), torch.randn(11 * SUM_BLOCK - 9, 50).to(dtype)
    whole = product(a, b)
    for chunks in (1, 2, 3, 8):
        out = torch.zeros(40, 50)
        for begin in range(0, a.shape[1], chunks * SUM_BLOCK):
            part = slice(begin, begin + chunks * SUM_BLOCK)
            out = product(a[:, part], b[part], into=out)
        assert torch.equal(out, whole)


def test_infinities_and_nan_stay_in_their_rows() -> None:
    a, b = torch.randn(20, 40).bfloat16(), torch.randn(40, 33).bfloat16()
    expected = product(a, b)
    a[3, 7], a[19, 0] = math.inf, math.nan
    out = product(a, b)
    assert not out[3].isfinite().any() and out[19].isnan().all()
    others = [i for i in range(20) if i not in (3, 19)]
    assert torch.equal(out[others], expected[others])


def test_schema() -> None:
    for accumulate in (False, True):
        bias = None if accumulate else torch.randn(4)
        arguments = (torch.randn(3, 4), torch.randn(3, 5), torch.randn(4, 5).t(), bias, accumulate)
        torch.library.opcheck(torch.ops.grpo_fast.product_.default, arguments)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"out": torch.zeros(3, 5)}, "out has the wrong shape"),
        ({"out": torch.zeros(12)}, "out has the wrong shape"),
        ({"out": torch.zeros(3, 4).double()}, "out has the wrong dtype"),
        ({"out": torch.zeros(4, 3).t()}, "out must have contiguous rows"),
        ({"out": torch.zeros(1, 4).expand(3, 4)}, "out must have contiguous rows"),
        ({"a": torch.zeros(3, 6)}, "a is"),
        ({"a": torch.zeros(3)}, "a has 1 dimensions"),
        ({"a": torch.zeros(3, 5).double()}, "float32, bfloat16 or float16"),
        ({"b": torch.zeros(4, 4)}, "b is"),
        ({"b": torch.zeros(1, 5, 4)}, "b has 3 dimensions"),
        ({"bias": torch.zeros(3)}, "bias must be"),
        ({"bias": torch.zeros(4).half()}, "bias must be"),
        ({"bias": torch.zeros(4), "accumulate": True}, "bias is what"),
    ],
)
def test_invalid_arguments_are_refused(changed: dict[str, object], named: str) -> None:
    given = {"out": torch.zeros(3, 4), "a": torch.zeros(3, 5), "b": torch.zeros(5, 4), "bias": None, "accumulate": False} | changed
    with pytest.raises(RuntimeError, match=f"grpo_fast: .*{named}|{named}"):
        torch.ops.grpo_fast.product_(*given.values())
