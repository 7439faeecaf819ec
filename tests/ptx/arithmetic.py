"""The instructions that compute in registers. Each builder returns a function that executes an instruction for the selected threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .faults import FaultError, UnsupportedError
from .parser import Instruction
from .threads import Threads
from .values import (
    BYTES, NUMPY, UNSIGNED, Array, Selection, bfloat16_bits, bfloat16_value, floats, flushed, fused_float64, high_product, quotient, to_float32,
    to_integer,
)  # fmt: skip

Action = Callable[[Selection], None]
Builder = Callable[[Threads, Instruction], Action]
BUILDERS: dict[str, Builder] = {}

PLAIN: dict[str, Callable[..., Any]] = {
    "add": np.add, "sub": np.subtract, "neg": np.negative, "abs": np.abs, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor, "not": np.invert,
}  # fmt: skip
COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip
APPROXIMATE = {"approx", "full"}


def builds(*names: str) -> Callable[[Builder], Builder]:
    """Register a builder for instructions of these names."""

    def register(builder: Builder) -> Builder:
        BUILDERS.update(dict.fromkeys(names, builder))
        return builder

    return register


def refused(instruction: Instruction) -> UnsupportedError:
    return UnsupportedError(f"instruction '{instruction.text}'")


def only(instruction: Instruction, *known: str) -> None:
    """Refuse an instruction with another modifier than these and its type."""
    if set(instruction.modifiers[:-1]) - set(known):
        raise refused(instruction)


@builds("and", "or", "xor", "not")
def logic(threads: Threads, instruction: Instruction) -> Action:
    only(instruction)
    return _elementwise(threads, instruction, PLAIN[instruction.name])


def _elementwise(threads: Threads, instruction: Instruction, function: Callable[..., Any], result: str = "") -> Action:
    kind = instruction.type
    write = threads.writer(instruction.operands[0], result or kind)
    read = [threads.reader(operand, kind) for operand in instruction.operands[1:]]
    if len(read) == 1:
        first = read[0]
        return lambda selection: write(selection, function(first(selection)))
    if len(read) == 2:
        first, second = read
        return lambda selection: write(selection, function(first(selection), second(selection)))
    return lambda selection: write(selection, function(*(each(selection) for each in read)))


@builds("add", "sub", "mul", "neg", "abs", "min", "max", "mad", "fma", "div", "rem")
def arithmetic(threads: Threads, instruction: Instruction) -> Action:
    kind = instruction.type
    if kind in ("f16x2", "bf16x2"):
        return _packed_maximum(threads, instruction)
    if kind in ("f32", "f64"):
        return _floating(threads, instruction)
    if kind in ("f16", "bf16") or kind not in NUMPY:
        raise refused(instruction)
    return _integer(threads, instruction)


def _integer(threads: Threads, instruction: Instruction) -> Action:
    only(instruction, "lo", "hi", "wide")
    name, kind = instruction.name, instruction.type
    if "wide" in instruction.modifiers:
        return _wide(threads, instruction)
    if name in ("div", "rem"):

        def divided(a: Array, b: Array) -> Array:
            if np.any(b == 0):
                raise FaultError("an integer was divided by zero")
            return quotient(a, b) if name == "div" else a - quotient(a, b) * b

        return _elementwise(threads, instruction, divided)
    product = high_product if "hi" in instruction.modifiers else np.multiply
    functions: dict[str, Callable[..., Any]] = PLAIN | {
        "mul": product, "min": np.minimum, "max": np.maximum, "mad": lambda a, b, c: product(a, b) + c
    }  # fmt: skip
    if kind.startswith("b") or name not in functions:
        raise refused(instruction)
    return _elementwise(threads, instruction, functions[name])


def _wide(threads: Threads, instruction: Instruction) -> Action:
    kind = instruction.type
    double = f"{kind[0]}{2 * int(kind[1:])}"
    wide = NUMPY[double]
    write = threads.writer(instruction.operands[0], double)
    a, b = (threads.reader(operand, kind) for operand in instruction.operands[1:3])
    if instruction.name == "mul":
        return lambda selection: write(selection, a(selection).astype(wide) * b(selection).astype(wide))
    c = threads.reader(instruction.operands[3], double)
    return lambda selection: write(selection, a(selection).astype(wide) * b(selection).astype(wide) + c(selection))


def _floating(threads: Threads, instruction: Instruction) -> Action:
    only(instruction, "rn", "rz", "rm", "rp", "ftz", "sat", *APPROXIMATE)
    function = _float32(threads, instruction) if instruction.type == "f32" else _float64(instruction)
    if "ftz" in instruction.modifiers:
        unflushed = function

        def function(*values: Array) -> Array:
            return flushed(unflushed(*map(flushed, values)))

    if "sat" in instruction.modifiers:
        unsaturated = function

        def function(*values: Array) -> Array:
            return saturated(unsaturated(*values))

    return _elementwise(threads, instruction, function)


def saturated(x: Array) -> Array:
    """Between 0 and 1; 0 for NaN."""
    return np.where(np.isnan(x), x.dtype.type(0), np.clip(x, 0, 1))


def _float32(threads: Threads, instruction: Instruction) -> Callable[..., Any]:
    name = instruction.name
    rounding = next((each for each in instruction.modifiers if each in ("rz", "rm", "rp")), "rn")
    if name == "div" and APPROXIMATE & set(instruction.modifiers):
        return lambda a, b: threads.approximate(a.astype(np.float64) / b)
    if name in ("fma", "mad"):  # the product of two float32 is exact in float64
        return lambda a, b, c: to_float32(a.astype(np.float64) * b + c, rounding)
    if rounding != "rn":
        exact: dict[str, Callable[..., Any]] = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
        if name not in exact:
            raise refused(instruction)
        return lambda a, b: to_float32(exact[name](a.astype(np.float64), b), rounding)
    return _rounded_to_nearest(instruction)


def _float64(instruction: Instruction) -> Callable[..., Any]:
    if {"rz", "rm", "rp", *APPROXIMATE} & set(instruction.modifiers):
        raise refused(instruction)
    return fused_float64 if instruction.name in ("fma", "mad") else _rounded_to_nearest(instruction)


def _rounded_to_nearest(instruction: Instruction) -> Callable[..., Any]:
    functions: dict[str, Callable[..., Any]] = PLAIN | {"mul": np.multiply, "div": np.divide, "min": np.fmin, "max": np.fmax}
    if instruction.name not in functions:
        raise refused(instruction)
    return functions[instruction.name]


def _packed_maximum(threads: Threads, instruction: Instruction) -> Action:
    """Of two 16-bit floats in 32 bits; a NaN gives way to a number."""
    if instruction.name not in ("max", "min") or len(instruction.modifiers) > 1:
        raise refused(instruction)
    function = np.fmax if instruction.name == "max" else np.fmin
    brain = instruction.type == "bf16x2"

    def of_half(a: Array, b: Array) -> Array:
        if brain:
            return bfloat16_bits(function(bfloat16_value(a), bfloat16_value(b)))
        return function(a.view(np.float16), b.view(np.float16)).view(np.uint16)

    def packed(a: Array, b: Array) -> Array:
        halves = [of_half((a >> np.uint32(shift)).astype(np.uint16), (b >> np.uint32(shift)).astype(np.uint16)) for shift in (0, 16)]
        return halves[0].astype(np.uint32) | (halves[1].astype(np.uint32) << np.uint32(16))

    return _elementwise(threads, instruction, packed)


@builds("ex2", "lg2", "rcp", "rsqrt", "sqrt", "tanh")
def special_function(threads: Threads, instruction: Instruction) -> Action:
    only(instruction, "rn", "ftz", "approx")
    exact: Callable[[Array], Array] = {
        "ex2": np.exp2, "lg2": np.log2, "rcp": np.reciprocal, "rsqrt": lambda x: 1 / np.sqrt(x), "sqrt": np.sqrt, "tanh": np.tanh
    }[instruction.name]  # fmt: skip
    approximate, kind = "approx" in instruction.modifiers, instruction.type
    if instruction.name == "tanh":  # of 11 bits
        raise refused(instruction)
    if kind == "f64" and approximate:
        return _elementwise(threads, instruction, lambda x: _upper_word(exact(x)))
    if kind not in ("f32", "f64"):
        raise refused(instruction)
    flush = flushed if "ftz" in instruction.modifiers else np.asarray

    def function(x: Array) -> Array:
        result = exact(flush(x).astype(np.float64))
        return flush(threads.approximate(result) if approximate else result.astype(NUMPY[kind]))

    return _elementwise(threads, instruction, function)


def _upper_word(x: Array) -> Array:
    """float64 of which 20 bits of the mantissa are given: rcp.approx.ftz.f64."""
    return (np.asarray(x, np.float64).view(np.uint64) & np.uint64(0xFFFF_FFFF_0000_0000)).view(np.float64)


@builds("copysign")
def copysign(threads: Threads, instruction: Instruction) -> Action:
    only(instruction)
    return _elementwise(threads, instruction, lambda sign, magnitude: np.copysign(magnitude, sign))


@builds("shl", "shr")
def shift(threads: Threads, instruction: Instruction) -> Action:
    only(instruction)
    kind, left = instruction.type, instruction.name == "shl"
    write, value = threads.writer(instruction.operands[0], kind), threads.reader(instruction.operands[1], kind)
    amount, bits = threads.reader(instruction.operands[2], "u32"), 8 * BYTES[kind]

    def action(selection: Selection) -> None:
        x, by = value(selection), amount(selection)
        shifted = (np.left_shift if left else np.right_shift)(x, np.minimum(by, bits - 1).astype(x.dtype))
        write(selection, np.where((by >= bits) & (left or x.dtype.kind == "u"), x.dtype.type(0), shifted))

    return action


@builds("bfe")
def bit_field(threads: Threads, instruction: Instruction) -> Action:
    only(instruction)
    if instruction.type != "u32":
        raise refused(instruction)

    def field(x: Array, position: Array, length: Array) -> Array:
        wide = x.astype(np.uint64) >> (position & np.uint32(255)).astype(np.uint64)
        return (wide & ((np.uint64(1) << (length & np.uint32(255)).astype(np.uint64)) - np.uint64(1))).astype(np.uint32)

    return _elementwise(threads, instruction, field)


@builds("setp")
def compare(threads: Threads, instruction: Instruction) -> Action:
    """``setp.lt[.and].type p[|q], a, b[, c]``: with an unordered comparison (ltu) a NaN compares as true."""
    comparison, *rest = instruction.modifiers[:-1]
    kind, combination = instruction.type, [each for each in rest if each != "ftz"]
    operands = instruction.operands
    read_a, read_b = (threads.reader(operand, kind) for operand in operands[1:3])
    is_float = kind in ("f16", "bf16", "f32", "f64")
    unordered = is_float and len(comparison) == 3 and comparison.endswith("u")
    base = comparison[:2] if unordered else comparison
    if (base not in COMPARISONS and not (is_float and base in ("nan", "num"))) or len(operands) != 3 + len(combination):
        raise refused(instruction)
    names = str(operands[0]).split("|")
    write = [threads.writer(name, "pred") for name in names]
    combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[combination[0]] if combination else None
    third = threads.reader(operands[3], "pred") if combination else None
    flush = flushed if "ftz" in rest else np.asarray

    def action(selection: Selection) -> None:
        a, b = flush(floats(read_a(selection), kind)), flush(floats(read_b(selection), kind))
        nan = np.isnan(a) | np.isnan(b) if is_float else np.False_
        if base in ("nan", "num"):
            result = nan if base == "nan" else ~nan
        else:
            result = COMPARISONS[base](a, b) if not is_float else (COMPARISONS[base](a, b) & ~nan) | (nan & unordered)
        for place, each in zip(write, (result, ~result), strict=False):
            place(selection, each if combine is None or third is None else combine(each, third(selection)))

    return action


@builds("selp")
def select(threads: Threads, instruction: Instruction) -> Action:
    only(instruction)
    kind = instruction.type
    write = threads.writer(instruction.operands[0], kind)
    a, b = (threads.reader(operand, kind) for operand in instruction.operands[1:3])
    condition = threads.reader(instruction.operands[3], "pred")
    return lambda selection: write(selection, np.where(condition(selection), a(selection), b(selection)))


@builds("cvt")
def convert(threads: Threads, instruction: Instruction) -> Action:
    """``cvt[.rounding][.ftz][.sat].to.from``; two float32 to a pair of 16-bit floats, the first to the upper half."""
    to, kind = instruction.modifiers[-2:]
    modes = set(instruction.modifiers[:-2])
    if modes - {"rn", "rz", "rm", "rp", "rzi", "rni", "rmi", "rpi", "ftz", "sat"}:
        raise refused(instruction)
    rounding = next((mode for mode in modes if mode.startswith("r")), "rn")
    write = threads.writer(instruction.operands[0], to)
    read = [threads.reader(operand, kind) for operand in instruction.operands[1:]]
    if to in ("f16x2", "bf16x2"):
        if kind != "f32" or rounding != "rn" or modes - {"rn"}:
            raise refused(instruction)
        half = _converter(to.removesuffix("x2"), "rn", instruction)

        def pair(selection: Selection) -> None:
            upper, lower = (half(each(selection)).view(np.uint16).astype(np.uint32) for each in read)
            write(selection, (upper << np.uint32(16)) | lower)

        return pair
    function = _converter(to, rounding, instruction)
    flush = flushed if "ftz" in modes else np.asarray
    if "sat" in modes and to not in ("f32", "f64"):
        raise refused(instruction)

    def action(selection: Selection) -> None:
        result = function(flush(floats(read[0](selection), kind)))
        write(selection, saturated(result) if "sat" in modes else result)

    return action


def _converter(to: str, rounding: str, instruction: Instruction) -> Callable[[Array], Array]:
    """From numbers of numpy to a type of PTX."""
    dtype, kind = NUMPY[to], instruction.type
    from_float = kind in ("f16", "bf16", "f32", "f64")
    if to == "bf16":
        if rounding != "rn" or kind == "f64":
            raise refused(instruction)
        return lambda x: bfloat16_bits(x.astype(np.float32))
    if to not in ("f16", "f32", "f64"):
        return (lambda x: to_integer(x, rounding, to)) if from_float else lambda x: x.astype(dtype)
    if rounding.endswith("i"):
        whole = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[rounding]
        return lambda x: whole(x).astype(dtype)
    if rounding == "rn":
        return lambda x: x.astype(dtype)
    if to == "f32" and from_float:
        return lambda x: to_float32(x.astype(np.float64), rounding)
    raise refused(instruction)


@builds("mov", "cvta")
def move(threads: Threads, instruction: Instruction) -> Action:
    """Also between a register and the halves or quarters of it in other registers."""
    kind = instruction.type
    to, source = instruction.operands
    if instruction.name == "cvta" and "global" not in instruction.modifiers:
        raise refused(instruction)
    if isinstance(to, tuple):
        return _split(threads, to, source, kind)
    if isinstance(source, tuple):
        return _join(threads, to, source, kind)
    write, read = threads.writer(to, kind), threads.reader(source, kind)
    return lambda selection: write(selection, read(selection))


def _split(threads: Threads, to: tuple[str, ...], source: Any, kind: str) -> Action:
    size = BYTES[kind] // len(to)
    read = threads.reader(source, f"b{8 * BYTES[kind]}")
    write = [threads.writer(name, f"b{8 * size}") for name in to]

    def action(selection: Selection) -> None:
        whole = read(selection)
        for index, each in enumerate(write):
            each(selection, (whole >> whole.dtype.type(8 * size * index)).astype(UNSIGNED[size]))

    return action


def _join(threads: Threads, to: Any, source: tuple[str, ...], kind: str) -> Action:
    size, dtype = BYTES[kind] // len(source), UNSIGNED[BYTES[kind]]
    write = threads.writer(to, f"b{8 * BYTES[kind]}")
    read = [threads.reader(name, f"b{8 * size}") for name in source]

    def action(selection: Selection) -> None:
        parts = [each(selection).astype(dtype) << dtype(8 * size * index) for index, each in enumerate(read)]
        write(selection, np.bitwise_or.reduce(np.broadcast_arrays(*parts)))

    return action


@builds("createpolicy")
def cache_policy(threads: Threads, instruction: Instruction) -> Action:
    """Where lines stay in a cache changes no value."""
    write = threads.writer(instruction.operands[0], "b64")
    return lambda selection: write(selection, np.uint64(0))  # type: ignore[arg-type]
