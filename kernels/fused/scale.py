"""x *= factor, for a factor on the device that is usually 1. For a factor of 1 x is not read or written; the host does not synchronise."""

import triton
import triton.language as tl
from torch import Tensor

from .checks import check_scaled
from .rowwise import edge_columns, kernel, row_edges, row_slice
from .token_logprobs import multiprocessors, phase_of, strides

__all__ = ["scale_"]

BLOCK, WARPS = 4096, 8
PROGRAMS_PER_MULTIPROCESSOR = 8  # persistent programs: a factor of 1 then launches a few programs instead of one per block


@triton.jit
def _scale_elements(x_ptr, inside, factor):
    x = tl.load(x_ptr, mask=inside, other=0.0)
    tl.store(x_ptr, (x.to(tl.float32) * factor).to(x.dtype), mask=inside)


@kernel
def _scale_kernel(
    x_ptr, factor_ptr,
    rows: tl.int64, length: tl.int32, columns: tl.int64, parts: tl.int32, phase: tl.int32,
    sequence_stride: tl.int64, token_stride: tl.int64,
    BLOCK: tl.constexpr,
):  # fmt: skip
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor == 1.0:
        return
    VECTOR: tl.constexpr = 128 // x_ptr.dtype.element_ty.primitive_bitwidth
    lane = tl.arange(0, BLOCK)
    for piece in tl.range(tl.program_id(0).to(tl.int64), rows * parts, tl.num_programs(0)):
        row, part = piece // parts, piece % parts
        offset = row // length * sequence_stride + row % length * token_stride
        row_ptr = x_ptr + offset
        head, middle = row_edges(phase + offset, columns, VECTOR)
        first, last = row_slice(part, parts, middle, BLOCK)
        vectors_ptr = tl.multiple_of(row_ptr + head, 16)
        for block in tl.range(first, last):
            at = block * BLOCK + lane
            _scale_elements(vectors_ptr + at, at < tl.multiple_of(middle, VECTOR), factor)
        column, inside = edge_columns(head, middle, columns, part, VECTOR)
        _scale_elements(row_ptr + column, inside, factor)


def scale_(x: Tensor, factor: Tensor) -> Tensor:
    """x *= factor, in place.

    Args:
        x: contiguous, or [B, T, V] contiguous over V.
        factor: 0-d, on the device of x.
    """
    check_scaled(x, factor)
    if x.numel() == 0:
        return x
    whole = x.view(1, 1, -1) if x.is_contiguous() else x
    rows, columns = whole.shape[0] * whole.shape[1], whole.shape[2]
    blocks = triton.cdiv(columns, BLOCK)
    programs = min(rows * blocks, PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(x.device))
    parts = min(blocks, triton.cdiv(programs, rows))
    _scale_kernel[(programs,)](
        whole, factor, rows, whole.shape[1], columns, parts, phase_of(whole), *strides(whole), BLOCK=BLOCK, num_warps=WARPS
    )
    return x
