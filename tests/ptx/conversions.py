"""The instructions that compare, select, convert and move values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .instructions import Action, builds, only, refused
from .parser import Instruction
from .threads import Threads
from .values import BYTES, NUMPY, UNSIGNED, Array, Selection, bfloat16_bits, floats, flushed, saturated, to_float32, to_integer

COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


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
        nan: Any = np.isnan(a) | np.isnan(b) if is_float else np.False_
        if base in ("nan", "num"):
            result: Any = nan if base == "nan" else ~nan
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
    return lambda selection: write(selection, np.uint64(0))
