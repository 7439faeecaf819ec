"""The mathematics of one vocabulary row, shared by all kernels: the log-sum-exp and the softmax gradient, independent of the loss.

A row holds the logits z_v of one token. Its policy is p = softmax(s), s = logit_scale * z / temperature; with a soft cap s =
softcap * tanh(logit_scale * z / softcap) / temperature. Everything here is in powers of two: s_v * log2(e) = k * f_v, where f is z
or the tanh, so that an exponential is one multiply-add and one ex2.

How a row is read. The columns before the first 16-byte boundary and those after the last whole 16-byte vector are the edges of the row:
fewer than two vectors together. The columns between them are divided into blocks. A plain block is full and does not contain the target: it
is read in whole vectors without a mask. The block of the target and the last, partial block are processed in a second loop, with a mask.
Rows of an odd vocabulary and at any offset are thus read 16 bytes at a time, no compile-time constant depends on either, and excluding
the target costs nothing in plain blocks.
"""

import inspect
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LOG2_E_TAIL = tl.constexpr(1.92596298909109e-8)  # log2(e) - float32(log2(e))
LN_2 = tl.constexpr(0.6931471805599453)
LN_2_TAIL = tl.constexpr(-1.904654323148236e-9)  # log(2) - float32(log(2))

# The reference of a sum is an estimate of the largest term. A sum within these bounds is accurate; any other is computed again.
GUESS_MARGIN = tl.constexpr(60.0)
SUM_FLOOR = tl.constexpr(2.0**-100)
SAMPLE = tl.constexpr(1024)  # columns from which the reference is estimated

SIGN_BIT = tl.constexpr(-(2**31))  # of a float32
EXPONENT_FLOOR = tl.constexpr(-1000.0)  # lower bound of t in e * t, e = 2^t: for a logit of -inf that product would be 0 * inf


def kernel(fn: Callable[..., Any]) -> Any:
    """``triton.jit`` without specialization: one compilation for all batches, whose key has only the constexprs and the dtypes.

    By default Triton specializes on integers that are 1 or divisible by 16 and on aligned pointers. Where alignment matters, the kernels
    here start at an aligned address and declare it with ``tl.multiple_of``.
    """
    names = [name for name, parameter in inspect.signature(fn).parameters.items() if parameter.annotation is not tl.constexpr]
    return triton.jit(fn, do_not_specialize=names, do_not_specialize_on_alignment=names)


@triton.jit
def per_token(x_ptr, b, t, sequence_stride, token_stride, mask, other):
    """Load elements of a [B, T] tensor that may be strided or broadcast."""
    return tl.load(x_ptr + b * sequence_stride + t * token_stride, mask=mask, other=other)


@triton.jit
def scored(z, cap_scale, HAS_SOFTCAP: tl.constexpr):
    """f(z) in float32: z, or tanh(cap_scale * z) with a soft cap."""
    z = z.to(tl.float32)
    if HAS_SOFTCAP:
        z, _ = tanh(z * cap_scale)
    return z


@triton.jit
def tanh(x):
    """tanh(x) within 4 ulp, and its derivative.

    tanh is an odd polynomial near 0 (Cephes, S. Moshier) and 1 - c elsewhere, c = 2 e^-2|x| / (1 + e^-2|x|). The derivative c (2 - c)
    keeps its digits where tanh is almost ±1 and 1 - tanh(x)^2 has none.
    """
    x2 = x * x
    p = x2 * -5.70498872745e-3 + 2.06390887954e-2
    p = x2 * p - 5.37397155531e-2
    p = x2 * p + 1.33314422036e-1
    p = x2 * p - 3.33332819422e-1
    a = tl.abs(x)
    e = tl.exp2(a * (-2.0 * LOG2_E) + 1.0)  # twice the exponential: a factor of 2 less to multiply by
    r = tl.rsqrt(e * 0.5 + 1.0)
    c = (e * r) * r
    f = tl.where(a < 0.625, a + a * x2 * p, 1.0 - c)
    sign = x.to(tl.int32, bitcast=True) & SIGN_BIT  # one instruction, with the next line
    return (f.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True), c * (2.0 - c)


@triton.jit
def exp(x):
    return tl.exp2(x * LOG2_E)


@triton.jit
def expm1(x):
    """exp(x) - 1 without cancellation near 0."""
    p = x * (1.0 / 9.0) + 1.0
    p = x * p * (1.0 / 8.0) + 1.0
    p = x * p * (1.0 / 7.0) + 1.0
    p = x * p * (1.0 / 6.0) + 1.0
    p = x * p * (1.0 / 5.0) + 1.0
    p = x * p * (1.0 / 4.0) + 1.0
    p = x * p * (1.0 / 3.0) + 1.0
    p = x * p * (1.0 / 2.0) + 1.0
    return tl.where(tl.abs(x) < 0.5, x * p, exp(x) - 1.0)


@triton.jit
def log1p(e):
    """log(1 + e) for 0 <= e <= 1 as 2 artanh(e / (2 + e)), accurate also for tiny e, where a hardware log of 1 + e is not."""
    s = e / (2.0 + e)
    s2 = s * s
    p = s2 * (1.0 / 17.0) + 1.0 / 15.0
    p = s2 * p + 1.0 / 13.0
    p = s2 * p + 1.0 / 11.0
    p = s2 * p + 1.0 / 9.0
    p = s2 * p + 1.0 / 7.0
    p = s2 * p + 1.0 / 5.0
    p = s2 * p + 1.0 / 3.0
    return 2.0 * s * (s2 * p + 1.0)


# Geometry ------------------------------------------------------------------------------------------------------------------------


@triton.jit
def row_edges(phase, vocabulary, VECTOR: tl.constexpr):
    """Return (first column at a 16-byte boundary, number of columns in whole vectors).

    phase: elements from a 16-byte boundary to the first column.
    """
    head = tl.minimum((VECTOR - phase % VECTOR) % VECTOR, vocabulary).to(tl.int32)
    return head, (vocabulary - head) // VECTOR * VECTOR


@triton.jit
def row_slice(part, parts, middle, BLOCK_V: tl.constexpr):
    """Return the blocks [first, last) that belong to a part of a row."""
    per_part = tl.cdiv(tl.cdiv(middle, BLOCK_V), parts)
    return part * per_part, tl.minimum((part + 1) * per_part, tl.cdiv(middle, BLOCK_V))


@triton.jit
def blocks_apart(first, last, middle, target, BLOCK_V: tl.constexpr):
    """Return (number of plain blocks, number of other blocks, block of the target) among the blocks [first, last).

    The block of the target is a huge number if the target is in no full block. target: its column counted from the end of the head; a value
    outside [0, middle) means that it is in no block.
    """
    full = tl.minimum(last, middle // BLOCK_V)
    block = target // BLOCK_V
    holds_target = (target >= 0) & (block >= first) & (block < full)
    apart = holds_target.to(tl.int32)
    plain = tl.maximum(full - first, 0) - apart
    partial = ((last > first) & (last > middle // BLOCK_V)).to(tl.int32)
    return plain, apart + partial, tl.where(holds_target, block, 2**30)


@triton.jit
def plain_block(i, first, target_block):
    """Return the i-th plain block; the block of the target is skipped."""
    block = first + i
    return block + (block >= target_block).to(tl.int32)


@triton.jit
def apart_block(j, target_block, middle, BLOCK_V: tl.constexpr):
    """Return the j-th block that is not plain: the block of the target first, then the partial block."""
    return tl.where((j == 0) & (target_block < 2**30), target_block, middle // BLOCK_V)


@triton.jit
def edge_columns(head, middle, vocabulary, part, VECTOR: tl.constexpr):
    """Return (columns at the edges of the row, mask of valid lanes). The edges belong to the first part of the row."""
    lane = tl.arange(0, 2 * VECTOR)
    column = tl.where(lane < VECTOR, lane, head + middle + lane - VECTOR)
    end = tl.where(lane < VECTOR, head, vocabulary)
    return column, column < tl.where(part == 0, end, 0)  # not `scalar & block`: the interpreter does not make a mask of it


# Statistics ----------------------------------------------------------------------------------------------------------------------


@triton.jit
def _add(f, e_sum, et_sum, reference, k, FIND_MAXIMUM: tl.constexpr, WANT_ENTROPY: tl.constexpr, FINITE: tl.constexpr):
    """Add a block to the accumulators. Neighbouring columns, which are in one thread, are added first: this needs one accumulator per 16
    bytes instead of one per column, with the same number of additions. FINITE: f is never -inf, so that t needs no lower bound."""
    lanes: tl.constexpr = e_sum.shape[0]
    neighbours: tl.constexpr = f.shape[0] // lanes
    if FIND_MAXIMUM:
        e_sum = tl.maximum(e_sum, tl.max(tl.reshape(f, (lanes, neighbours)), 1))
    else:
        t = tl.fma(f, k, -reference)
        e = tl.exp2(t)
        e_sum += tl.sum(tl.reshape(e, (lanes, neighbours)), 1)
        if WANT_ENTROPY:
            if not FINITE:
                t = tl.maximum(t, EXPONENT_FLOOR)
            et_sum += tl.sum(tl.reshape(e * t, (lanes, neighbours)), 1)
    return e_sum, et_sum


@triton.jit
def _reduce_columns(
    row_ptr, head, middle, vocabulary, target, part, first, last, reference, k, cap_scale,
    BLOCK_V: tl.constexpr, FIND_MAXIMUM: tl.constexpr, WANT_ENTROPY: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Reduce one part of a row without the target: (sum e, sum e * t) with e = 2^t, t = f * k - reference, or with FIND_MAXIMUM (max f, 0).

    Sums are kept per lane and added up at the end.
    """
    VECTOR: tl.constexpr = 128 // row_ptr.dtype.element_ty.primitive_bitwidth
    vectors_ptr = tl.multiple_of(row_ptr + head, 16)
    plain, apart, target_block = blocks_apart(first, last, middle, target - head, BLOCK_V)
    lane = tl.arange(0, BLOCK_V)
    e_sum = tl.full((BLOCK_V // VECTOR,), float("-inf") if FIND_MAXIMUM else 0.0, tl.float32)
    et_sum = tl.zeros((BLOCK_V // VECTOR,), tl.float32)

    for i in tl.range(plain):
        columns = plain_block(i, first, target_block) * BLOCK_V + lane
        z = tl.load(vectors_ptr + columns, eviction_policy="evict_first")
        f = scored(z, cap_scale, HAS_SOFTCAP)
        e_sum, et_sum = _add(f, e_sum, et_sum, reference, k, FIND_MAXIMUM, WANT_ENTROPY, HAS_SOFTCAP)

    for j in tl.range(apart):
        columns = apart_block(j, target_block, middle, BLOCK_V) * BLOCK_V + lane
        inside = columns < tl.multiple_of(middle, VECTOR)
        z = tl.load(vectors_ptr + columns, mask=inside, other=0.0, eviction_policy="evict_first")
        f = tl.where(inside & (columns != target - head), scored(z, cap_scale, HAS_SOFTCAP), float("-inf"))
        e_sum, et_sum = _add(f, e_sum, et_sum, reference, k, FIND_MAXIMUM, WANT_ENTROPY, False)

    column, inside = edge_columns(head, middle, vocabulary, part, VECTOR)
    z = tl.load(row_ptr + column, mask=inside, other=0.0)
    f = tl.where(inside & (column != target), scored(z, cap_scale, HAS_SOFTCAP), float("-inf"))
    if FIND_MAXIMUM:
        return tl.maximum(tl.max(e_sum, 0), tl.max(f, 0)), 0.0
    else:
        edge_e, edge_et = _add(f, tl.zeros((2,), tl.float32), tl.zeros((2,), tl.float32), reference, k, False, WANT_ENTROPY, False)
        return tl.sum(e_sum, 0) + tl.sum(edge_e, 0), tl.sum(et_sum, 0) + tl.sum(edge_et, 0)


@triton.jit
def row_sums(
    row_ptr, phase, vocabulary, target, part, parts, k, cap_scale,
    BLOCK_V: tl.constexpr, WANT_ENTROPY: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """(reference, sum e, sum e * t) over one part of a row without the target: e = 2^t, t = s * log2(e) - reference.

    Any reference within a hundred powers of two of the largest term keeps the sums accurate, so the exact maximum is not needed: it is
    estimated from the target (likely, since it was sampled) and the first columns of the part. The loop over plain blocks then needs no
    maximum, no rescaling and no synchronization of the warps. If the sum is out of bounds, it is computed again with the true maximum.

    Accuracy: t is rounded relative to its own size. If the largest logit lies t powers of two above the reference, the absolute error of
    the entropy is about four roundings of t (5e-6 in Triton's interpreter at t = 18), however small the entropy is. Log-probabilities,
    which are then as large as t, are as accurate as otherwise.
    """
    VECTOR: tl.constexpr = 128 // row_ptr.dtype.element_ty.primitive_bitwidth
    head, middle = row_edges(phase, vocabulary, VECTOR)
    first, last = row_slice(part, parts, middle, BLOCK_V)
    f_target = scored(tl.load(row_ptr + target), cap_scale, HAS_SOFTCAP)

    columns = first * BLOCK_V + tl.arange(0, SAMPLE)
    inside = columns < vocabulary
    z = tl.load(row_ptr + columns, mask=inside, other=0.0)
    f = tl.where(inside & (columns != target), scored(z, cap_scale, HAS_SOFTCAP), float("-inf"))
    reference = tl.maximum(tl.max(f, 0) * k, f_target * k - GUESS_MARGIN)
    reference = tl.where(tl.abs(reference) < float("inf"), reference, 0.0)

    e_sum, et_sum = _reduce_columns(
        row_ptr, head, middle, vocabulary, target, part, first, last, reference, k, cap_scale,
        BLOCK_V, False, WANT_ENTROPY, HAS_SOFTCAP,
    )  # fmt: skip
    if (e_sum < SUM_FLOOR) | (e_sum == float("inf")):
        maximum, _ = _reduce_columns(
            row_ptr, head, middle, vocabulary, target, part, first, last, reference, k, cap_scale,
            BLOCK_V, True, WANT_ENTROPY, HAS_SOFTCAP,
        )  # fmt: skip
        # Only -inf in this part: the reference of the target keeps it comparable with the other parts.
        reference = tl.where(maximum > float("-inf"), maximum * k, tl.where(f_target > float("-inf"), f_target * k, 0.0))
        e_sum, et_sum = _reduce_columns(
            row_ptr, head, middle, vocabulary, target, part, first, last, reference, k, cap_scale,
            BLOCK_V, False, WANT_ENTROPY, HAS_SOFTCAP,
        )  # fmt: skip
    return reference, e_sum, et_sum


@triton.jit
def merge_sums(reference, e_sum, et_sum, other_reference, other_e, other_et):
    """Combine the sums over two parts of a row."""
    larger = tl.maximum(reference, other_reference)
    d, other_d = reference - larger, other_reference - larger
    factor, other_factor = tl.exp2(d), tl.exp2(other_d)
    et_sum = factor * (et_sum + d * e_sum) + other_factor * (other_et + other_d * other_e)
    return larger, factor * e_sum + other_factor * other_e, et_sum


@triton.jit
def statistics_of(reference, e_sum, et_sum, f_target, k):
    """(log p of the target, entropy, lse) from the sums without the target, in nats.

    log p = -softplus(lse of the others - s_target), which is accurate also for a token with a probability near 1.
    """
    log2_e_sum = tl.log2(e_sum)
    t_target = tl.fma(f_target, k, -reference)
    d = log2_e_sum - t_target
    tail = log1p(tl.exp2(-tl.abs(d)))
    logprob = -(tl.maximum(d, 0.0) * LN_2 + tail)
    total = tl.maximum(log2_e_sum, t_target) + tail * LOG2_E  # log2 of the sum with the target
    p_log_p = tl.where(logprob > float("-inf"), exp(logprob) * logprob, 0.0)
    others = tl.where(e_sum == 0, 0.0, tl.exp2(-total) * (et_sum - e_sum * total) * LN_2)

    # The gradient exponentiates s - lse, so an error in the last digit of lse matters: it is rounded only once.
    lse2 = reference + total
    lse2_tail = (reference - lse2) + total
    lse = tl.fma(lse2, LN_2, lse2 * LN_2_TAIL + lse2_tail * LN_2)
    return logprob, -p_log_p - others, lse


# Gradient ------------------------------------------------------------------------------------------------------------------------


@triton.jit
def _gradient(z, pivot, k, constant, linear, cap_scale, HAS_ENTROPY: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """Return (d loss / d z of columns other than the target, derivative of the soft cap)."""
    f, cap_slope = z.to(tl.float32), 1.0
    if HAS_SOFTCAP:
        f, cap_slope = tanh(f * cap_scale)
    t = tl.fma(f, k, -pivot)
    if HAS_ENTROPY:
        if not HAS_SOFTCAP:  # a tanh is finite
            t = tl.maximum(t, EXPONENT_FLOOR)
        d = tl.exp2(t) * tl.fma(t, linear, constant)
    else:
        d = tl.exp2(t) * constant
    if HAS_SOFTCAP:
        d *= cap_slope
    return d, cap_slope


@triton.jit
def row_gradient(
    row_ptr, out_ptr, phase, vocabulary, target, part, parts, logprob, entropy, lse, g, h, k, slope, cap_scale,
    BLOCK_V: tl.constexpr, HAS_ENTROPY: tl.constexpr, HAS_SOFTCAP: tl.constexpr, SAME_PHASE: tl.constexpr,
):  # fmt: skip
    """Write ds_v/dz_v * (g * (1[v = target] - p_v) - h * p_v * (log p_v + H)) for one part of a row.

    slope: logit_scale / temperature, which is ds/dz without the derivative of the soft cap. out_ptr may be row_ptr. phase is the phase of
    the output. SAME_PHASE: the logits have the same phase, so that they too are read in whole vectors.
    """
    VECTOR: tl.constexpr = 128 // row_ptr.dtype.element_ty.primitive_bitwidth
    head, middle = row_edges(phase, vocabulary, VECTOR)
    first, last = row_slice(part, parts, middle, BLOCK_V)
    plain, apart, target_block = blocks_apart(first, last, middle, target - head, BLOCK_V)
    vectors_ptr = row_ptr + head
    if SAME_PHASE:
        vectors_ptr = tl.multiple_of(vectors_ptr, 16)
    out_vectors_ptr = tl.multiple_of(out_ptr + head, 16)
    lane = tl.arange(0, BLOCK_V)

    # lse * log2(e) as the sum of two floats, the small one in the factor: a large common offset of the logits costs no accuracy.
    pivot = lse * LOG2_E
    pivot_tail = tl.fma(lse, LOG2_E, -pivot) + lse * LOG2_E_TAIL
    constant = -(g + h * entropy) * slope * tl.exp2(-pivot_tail)
    linear = -h * LN_2 * slope
    # The gradient of the target from 1 - p = -expm1(log p), which is accurate also for p near 1.
    p = exp(logprob)
    at_target = (g * -expm1(logprob) - tl.where(p > 0, h * p * (logprob + entropy), 0.0)) * slope

    for i in tl.range(plain):
        columns = plain_block(i, first, target_block) * BLOCK_V + lane
        z = tl.load(vectors_ptr + columns, eviction_policy="evict_first")
        d, _ = _gradient(z, pivot, k, constant, linear, cap_scale, HAS_ENTROPY, HAS_SOFTCAP)
        tl.store(out_vectors_ptr + columns, d.to(out_ptr.dtype.element_ty))

    for j in tl.range(apart):
        columns = apart_block(j, target_block, middle, BLOCK_V) * BLOCK_V + lane
        inside = columns < tl.multiple_of(middle, VECTOR)
        z = tl.load(vectors_ptr + columns, mask=inside, other=0.0, eviction_policy="evict_first")
        d, cap_slope = _gradient(z, pivot, k, constant, linear, cap_scale, HAS_ENTROPY, HAS_SOFTCAP)
        d = tl.where(columns == target - head, at_target * cap_slope, d)
        tl.store(out_vectors_ptr + columns, d.to(out_ptr.dtype.element_ty), mask=inside)

    column, inside = edge_columns(head, middle, vocabulary, part, VECTOR)
    z = tl.load(row_ptr + column, mask=inside, other=0.0)
    d, cap_slope = _gradient(z, pivot, k, constant, linear, cap_scale, HAS_ENTROPY, HAS_SOFTCAP)
    d = tl.where(column == target, at_target * cap_slope, d)
    tl.store(out_ptr + column, d.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def clear_row(out_ptr, phase, vocabulary, part, parts, BLOCK_V: tl.constexpr):
    """Write zeros to one part of a row."""
    VECTOR: tl.constexpr = 128 // out_ptr.dtype.element_ty.primitive_bitwidth
    head, middle = row_edges(phase, vocabulary, VECTOR)
    first, last = row_slice(part, parts, middle, BLOCK_V)
    vectors_ptr = tl.multiple_of(out_ptr + head, 16)
    zero = tl.zeros((BLOCK_V,), out_ptr.dtype.element_ty)
    for block in tl.range(first, last):
        columns = block * BLOCK_V + tl.arange(0, BLOCK_V)
        tl.store(vectors_ptr + columns, zero, mask=columns < tl.multiple_of(middle, VECTOR))
    column, inside = edge_columns(head, middle, vocabulary, part, VECTOR)
    tl.store(out_ptr + column, tl.zeros((2 * VECTOR,), out_ptr.dtype.element_ty), mask=inside)
