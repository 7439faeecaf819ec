"""x *= factor, where the factor is on the device and usually 1: then nothing is read or written, and nobody waits for it."""

import triton
import triton.language as tl
from torch import Tensor

from .rowwise import kernel
from .token_logprobs import multiprocessors

__all__ = ["scale_"]

BLOCK, WARPS = 4096, 8
PROGRAMS_PER_MULTIPROCESSOR = 8  # they walk over x, so that a factor of 1 costs these few and not one per block


@kernel
def _scale_kernel(x_ptr, factor_ptr, count: tl.int64, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor == 1.0:
        return
    x_ptr = tl.multiple_of(x_ptr, 16)
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    whole = count // BLOCK * BLOCK
    for start in tl.range(tl.program_id(0).to(tl.int64) * BLOCK, whole, step):
        x = tl.load(x_ptr + start + lane)
        tl.store(x_ptr + start + lane, (x.to(tl.float32) * factor).to(x_ptr.dtype.element_ty))
    if tl.program_id(0) == 0:
        inside = whole + lane < count
        x = tl.load(x_ptr + whole + lane, mask=inside, other=0.0)
        tl.store(x_ptr + whole + lane, (x.to(tl.float32) * factor).to(x_ptr.dtype.element_ty), mask=inside)


def scale_(x: Tensor, factor: Tensor) -> Tensor:
    """x *= factor, in place.

    Args:
        x: contiguous, its first element on a 16-byte boundary.
        factor: 0-d, on the device of x.
    """
    if x.numel() > 0:
        programs = min(triton.cdiv(x.numel(), BLOCK), PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(x.device))
        _scale_kernel[(programs,)](x, factor, x.numel(), BLOCK=BLOCK, num_warps=WARPS)
    return x
