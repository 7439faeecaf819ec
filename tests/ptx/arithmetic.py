"""The instructions that compute with numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .faults import FaultError
from .instructions import Action, builds, only, refused
from .parser import Instruction
from .threads import Threads
from .values import (
    BYTES,
    NUMPY,
    Array,
    Selection,
    bfloat16_bits,
    bfloat16_value,
    flushed,
    fused_float64,
    high_product,
    quotient,
    saturated,
    to_float32,
)

PLAIN: dict[str, Callable[..., Any]] = {
    "add": np.add, "sub": np.subtract, "neg": np.negative, "abs": np.abs, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor, "not": np.invert,
}  # fmt: skip
APPROXIMATE = {"approx", "full"}


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
    if kind in ("f16x2", "bf16x2", "f16", "bf16"):
        return _maximum_of_16_bits(threads, instruction)
    if kind in ("f32", "f64"):
        return _floating(threads, instruction)
    if kind not in NUMPY:
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


def _maximum_of_16_bits(threads: Threads, instruction: Instruction) -> Action:
    """Of 16-bit floats, or of two in 32 bits. A NaN gives way to a number, unless .NaN asks for it."""
    if instruction.name not in ("max", "min") or set(instruction.modifiers[:-1]) - {"NaN"}:
        raise refused(instruction)
    keeps_nan, kind = "NaN" in instruction.modifiers, instruction.type
    function = {"max": (np.fmax, np.maximum), "min": (np.fmin, np.minimum)}[instruction.name][keeps_nan]

    def of_one(a: Array, b: Array) -> Array:
        if kind.startswith("bf16"):
            return bfloat16_bits(function(bfloat16_value(a), bfloat16_value(b)))
        return function(a.view(np.float16), b.view(np.float16)).view(np.uint16)

    def of_two(a: Array, b: Array) -> Array:
        halves = [of_one((a >> np.uint32(shift)).astype(np.uint16), (b >> np.uint32(shift)).astype(np.uint16)) for shift in (0, 16)]
        return halves[0].astype(np.uint32) | (halves[1].astype(np.uint32) << np.uint32(16))

    if kind.endswith("x2"):
        return _elementwise(threads, instruction, of_two)
    return _elementwise(threads, instruction, lambda a, b: of_one(a, b).view(NUMPY[kind]))


@builds("ex2", "lg2", "rcp", "rsqrt", "sqrt")
def special_function(threads: Threads, instruction: Instruction) -> Action:
    only(instruction, "rn", "ftz", "approx")
    functions: dict[str, Callable[..., Any]] = {
        "ex2": np.exp2, "lg2": np.log2, "rcp": np.reciprocal, "rsqrt": lambda x: 1 / np.sqrt(x), "sqrt": np.sqrt
    }  # fmt: skip
    exact = functions[instruction.name]
    approximate, kind = "approx" in instruction.modifiers, instruction.type
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
