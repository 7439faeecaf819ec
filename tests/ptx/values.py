"""The types of PTX in numpy, and the arithmetic that numpy does not have: bfloat16, fused sums, rounding, results of limited accuracy."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Selection = Array | slice  # the threads that execute an instruction: indices, or all of them

NUMPY: dict[str, Any] = {
    "pred": np.bool_, "b8": np.uint8, "u8": np.uint8, "s8": np.int8,
    "b16": np.uint16, "u16": np.uint16, "s16": np.int16, "f16": np.float16, "bf16": np.uint16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32, "f16x2": np.uint32, "bf16x2": np.uint32,
    "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "f64": np.float64,
}  # fmt: skip
BYTES: dict[str, int] = {name: np.dtype(kind).itemsize for name, kind in NUMPY.items()}
UNSIGNED: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def bfloat16_bits(x: Array) -> Array:
    """float32 rounded to the nearest bfloat16, ties to even, as its 16 bits."""
    bits = np.asarray(x, np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)


def bfloat16_value(bits: Array) -> Array:
    """The float32 of a bfloat16's 16 bits."""
    return (np.asarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def floats(x: Array, kind: str) -> Array:
    """Values in which numpy can compare and convert: those of a bfloat16 are float32."""
    return bfloat16_value(x) if kind == "bf16" else x


def flushed(x: Array) -> Array:
    """float32 with subnormal numbers replaced by zeros of their sign (.ftz)."""
    x = np.asarray(x, np.float32)
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


def fused_float64(a: Array, b: Array, c: Array) -> Array:
    """a * b + c in float64, rounded once up to an error of 2^-100 of the product: Dekker's product and Knuth's sum, which are exact."""
    product = a * b
    high_a, high_b = _upper_half(a), _upper_half(b)
    low_a, low_b = a - high_a, b - high_b
    tail = low_a * low_b - (((product - high_a * high_b) - low_a * high_b) - high_a * low_b)
    total = product + c
    part = total - product
    result = total + ((product - (total - part)) + (c - part) + tail)
    return np.where(np.isfinite(result), result, total)  # beyond 2^996 the halves overflow


def _upper_half(x: Array) -> Array:
    scaled = x * 134217729.0  # 2^27 + 1
    return scaled - (scaled - x)


def to_float32(exact: Array, rounding: str) -> Array:
    """float64 rounded to float32: to nearest (rn), towards zero (rz), down (rm) or up (rp)."""
    nearest = exact.astype(np.float32)
    if rounding == "rn":
        return nearest
    wide = nearest.astype(np.float64)
    wrong, towards = {
        "rz": (np.abs(wide) > np.abs(exact), np.float32(0)),
        "rm": (wide > exact, np.float32(-np.inf)),
        "rp": (wide < exact, np.float32(np.inf)),
    }[rounding]
    return np.where(wrong, np.nextafter(nearest, towards), nearest)


def to_integer(x: Array, rounding: str, kind: str) -> Array:
    """A float rounded to an integer, saturated at the ends of its type; 0 for NaN."""
    whole = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}[rounding](x.astype(np.float64))
    limits = np.iinfo(NUMPY[kind])
    inside = np.where((whole > limits.min) & (whole < limits.max), whole, 0).astype(NUMPY[kind])
    result = np.where(whole >= limits.max, limits.max, np.where(whole <= limits.min, limits.min, inside))
    return np.where(np.isnan(x), 0, result).astype(NUMPY[kind])


def high_product(a: Array, b: Array) -> Array:
    """The upper half of a product of integers."""
    bits = 8 * a.dtype.itemsize
    if bits == 64:
        return np.asarray((a.astype(object) * b.astype(object)) >> bits).astype(a.dtype)
    wide = np.int64 if a.dtype.kind == "i" else np.uint64
    return ((a.astype(wide) * b.astype(wide)) >> wide(bits)).astype(a.dtype)


def quotient(a: Array, b: Array) -> Array:
    """Integers divided, towards zero."""
    if a.dtype.kind == "u":
        return a // b
    floor = a // b
    return floor + ((floor * b != a) & ((a < 0) != (b < 0))).astype(a.dtype)


def saturated(x: Array) -> Array:
    """Between 0 and 1; 0 for NaN."""
    return np.where(np.isnan(x), x.dtype.type(0), np.clip(x, 0, 1))
