"""The products of an LM head at the ids of kept sets: logits, and the gradients of hidden states and weight from theirs.

``columns`` is int64 [n, K], the rows of the weight that token n needs; a column that is negative, or not a row of the weight, is left out.
The rows of the weight are read where they stand: for K ids a token reads 2 K D numbers, and nothing of the size of the vocabulary exists
but the gradient of the weight. Sums are float32 in a fixed order, without atomics: bitwise the same result from run to run.
"""

import triton
import triton.language as tl
from torch import Tensor, empty, float32, int64

from .checks import check_matrix
from .rowwise import kernel

__all__ = ["add_kept_weight_gradient", "kept_hidden_gradient", "kept_logits"]

BLOCK_K, BLOCK_D, WARPS = 16, 128, 4


@triton.jit
def rows_at(matrix_ptr, row, stride, ALIGNED: tl.constexpr):
    """Pointers to the beginning of rows, [BLOCK_K, 1]; aligned to 16 bytes if ALIGNED, so that they are read in whole vectors."""
    row_ptr = matrix_ptr + row[:, None] * stride
    if ALIGNED:
        row_ptr = tl.multiple_of(row_ptr, (16, 16))
    return row_ptr


@triton.jit
def whole_vectors(size, ALIGNED: tl.constexpr):
    """The length of a row, known to be a multiple of 8 elements if ALIGNED."""
    if ALIGNED:
        size = size // 8 * 8
    return size


@kernel
def _kept_logits_kernel(
    hidden_ptr, weight_ptr, columns_ptr, out_ptr,
    size: tl.int32, vocabulary: tl.int64, count: tl.int32, blocks: tl.int32,
    hidden_stride: tl.int64, weight_stride: tl.int64,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    size = whole_vectors(size, ALIGNED)
    program = tl.program_id(0).to(tl.int64)
    token, place = program // blocks, (program % blocks).to(tl.int32) * BLOCK_K + tl.arange(0, BLOCK_K)
    column = tl.load(columns_ptr + token * count + place, mask=place < count, other=-1)
    valid = (column >= 0) & (column < vocabulary)
    row_ptr = rows_at(weight_ptr, tl.where(valid, column, 0), weight_stride, ALIGNED)
    lane = tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    for first in tl.range(0, size, BLOCK_D):
        inside = first + lane < size
        hidden = tl.load(hidden_ptr + token * hidden_stride + first + lane, mask=inside, other=0.0).to(tl.float32)
        weight = tl.load(row_ptr + (first + lane)[None, :], mask=valid[:, None] & inside[None, :], other=0.0).to(tl.float32)
        total += weight * hidden[None, :]
    tl.store(out_ptr + token * count + place, tl.sum(total, 1), mask=place < count)


@kernel
def _kept_hidden_gradient_kernel(
    g_ptr, weight_ptr, columns_ptr, out_ptr,
    size: tl.int32, vocabulary: tl.int64, count: tl.int32, blocks: tl.int32, weight_stride: tl.int64,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    size = whole_vectors(size, ALIGNED)
    program = tl.program_id(0).to(tl.int64)
    token, lane = program // blocks, (program % blocks).to(tl.int32) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = lane < size
    total = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    for first in tl.range(0, count, BLOCK_K):
        place = first + tl.arange(0, BLOCK_K)
        column = tl.load(columns_ptr + token * count + place, mask=place < count, other=-1)
        valid = (column >= 0) & (column < vocabulary)
        g = tl.load(g_ptr + token * count + place, mask=valid, other=0.0)
        row_ptr = rows_at(weight_ptr, tl.where(valid, column, 0), weight_stride, ALIGNED)
        weight = tl.load(row_ptr + lane[None, :], mask=valid[:, None] & inside[None, :], other=0.0).to(tl.float32)
        total += g[:, None] * weight
    tl.store(out_ptr + token * size + lane, tl.sum(total, 0), mask=inside)


@kernel
def _add_kept_weight_gradient_kernel(
    g_ptr, hidden_ptr, columns_ptr, places_ptr, out_ptr,
    size: tl.int32, vocabulary: tl.int64, count: tl.int32, total_places: tl.int64, blocks: tl.int32,
    hidden_stride: tl.int64, out_stride: tl.int64,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    size = whole_vectors(size, ALIGNED)
    program = tl.program_id(0).to(tl.int64)
    first, lane = program // blocks, (program % blocks).to(tl.int32) * BLOCK_D + tl.arange(0, BLOCK_D)
    column = tl.load(columns_ptr + first)
    before = tl.load(columns_ptr + first - 1, mask=first > 0, other=-1)
    if (column < 0) | (column >= vocabulary) | (column == before):  # only the first place of a column does the work of all its places
        return
    inside = lane < size
    total = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    more = True
    while more:
        at = first + tl.arange(0, BLOCK_K)
        same = tl.load(columns_ptr + at, mask=at < total_places, other=-1) == column
        place = tl.load(places_ptr + at, mask=same, other=0)
        g = tl.load(g_ptr + place, mask=same, other=0.0)
        row_ptr = rows_at(hidden_ptr, place // count, hidden_stride, ALIGNED)
        hidden = tl.load(row_ptr + lane[None, :], mask=same[:, None] & inside[None, :], other=0.0).to(tl.float32)
        total += g[:, None] * hidden
        first += BLOCK_K
        more = tl.min(same.to(tl.int32), 0) == 1
    into_ptr = out_ptr + column * out_stride + lane
    tl.store(into_ptr, tl.load(into_ptr, mask=inside, other=0.0) + tl.sum(total, 0), mask=inside)


# Launchers -----------------------------------------------------------------------------------------------------------------------


def aligned(*matrices: Tensor) -> bool:
    """Whether all rows of these matrices begin at a multiple of 16 bytes and consist of whole vectors of 8 elements."""
    return all(x.data_ptr() % 16 == 0 and x.stride(0) % 8 == 0 and x.shape[1] % 8 == 0 for x in matrices)


def kept_logits(hidden: Tensor, weight: Tensor, columns: Tensor) -> Tensor:  # float32 [n, K]
    """Compute ``hidden[n] . weight[columns[n, k]]``, 0 where a column is left out.

    Args:
        hidden: [n, D], contiguous along D.
        weight: [V, D], contiguous along D.
        columns: int64 [n, K], contiguous.
    """
    check_matrix("columns", columns, weight, dtype=int64, contiguous=True)
    check_matrix("weight", weight, columns)
    tokens, count = columns.shape
    check_matrix("hidden", hidden, columns, (tokens, weight.shape[1]))
    logits = empty((tokens, count), dtype=float32, device=columns.device)
    blocks = triton.cdiv(count, BLOCK_K)
    if logits.numel() > 0:
        _kept_logits_kernel[(tokens * blocks,)](
            hidden, weight, columns, logits, weight.shape[1], weight.shape[0], count, blocks, hidden.stride(0), weight.stride(0),
            BLOCK_K=BLOCK_K, BLOCK_D=BLOCK_D, ALIGNED=aligned(hidden, weight), num_warps=WARPS,
        )  # fmt: skip
    return logits


def kept_hidden_gradient(gradient: Tensor, weight: Tensor, columns: Tensor) -> Tensor:  # float32 [n, D]
    """Compute the sum over k of ``gradient[n, k] * weight[columns[n, k]]``.

    Args:
        gradient: float32 [n, K], contiguous.
        weight, columns: as in kept_logits.
    """
    check_matrix("columns", columns, weight, dtype=int64, contiguous=True)
    check_matrix("weight", weight, columns)
    tokens, count = columns.shape
    check_matrix("gradient", gradient, columns, (tokens, count), dtype=float32, contiguous=True)
    size = weight.shape[1]
    out = empty((tokens, size), dtype=float32, device=columns.device)
    blocks = triton.cdiv(size, BLOCK_D)
    if out.numel() > 0:
        _kept_hidden_gradient_kernel[(tokens * blocks,)](
            gradient, weight, columns, out, size, weight.shape[0], count, blocks, weight.stride(0),
            BLOCK_K=BLOCK_K, BLOCK_D=BLOCK_D, ALIGNED=aligned(weight), num_warps=WARPS,
        )  # fmt: skip
    return out


def add_kept_weight_gradient(into: Tensor, gradient: Tensor, hidden: Tensor, columns: Tensor) -> None:
    """Add ``gradient[n, k] * hidden[n]`` to row ``columns[n, k]`` of ``into``, the places of a row in the order of the tokens.

    Args:
        into: float32 [V, D], contiguous along D.
        gradient, hidden, columns: as in kept_hidden_gradient and kept_logits.
    """
    check_matrix("columns", columns, into, dtype=int64, contiguous=True)
    check_matrix("into", into, columns, dtype=float32)
    tokens, count = columns.shape
    check_matrix("gradient", gradient, columns, (tokens, count), dtype=float32, contiguous=True)
    check_matrix("hidden", hidden, columns, (tokens, into.shape[1]))
    if columns.numel() == 0 or into.numel() == 0:
        return
    ordered, places = columns.flatten().sort(stable=True)
    size = into.shape[1]
    blocks = triton.cdiv(size, BLOCK_D)
    _add_kept_weight_gradient_kernel[(ordered.shape[0] * blocks,)](
        gradient, hidden, ordered, places, into, size, into.shape[0], columns.shape[1], ordered.shape[0], blocks,
        hidden.stride(0), into.stride(0), BLOCK_K=BLOCK_K, BLOCK_D=BLOCK_D, ALIGNED=aligned(hidden), num_warps=WARPS,
    )  # fmt: skip
