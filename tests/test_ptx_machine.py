"""The machine that executes PTX, by programs written by hand: every instruction that computes, against numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from ptx.programs import THREADS, run

Array = NDArray[Any]
TYPES: dict[str, Any] = {
    "f32": np.float32,
    "f64": np.float64,
    "s32": np.int32,
    "u32": np.uint32,
    "b32": np.uint32,
    "s64": np.int64,
    "u64": np.uint64,
}
TYPES |= {"s16": np.int16, "u16": np.uint16, "b16": np.uint16, "f16": np.float16, "bf16": np.uint16, "u8": np.uint8, "s8": np.int8}
GENERATOR = np.random.default_rng(0)


def applied(instruction: str, kind: str, operands: list[Array], result: str = "") -> Array:
    """What ``instruction result, a, b, ...`` gives for arrays a, b, ... with an element for each thread."""
    letter = {"b": "h", "u": "h", "s": "h"}
    result = result or kind

    def register(kind: str, index: int) -> str:
        size = np.dtype(TYPES[kind]).itemsize
        if kind in ("f32", "f64"):
            return f"%{'f' if kind == 'f32' else 'g'}{index}"
        return f"%{ {1: letter['b'], 2: 'h', 4: 'r', 8: 'd'}[size] }{index}"

    body = ""
    for index, operand in enumerate(operands):
        size = operand.dtype.itemsize
        body += f"mul.wide.u32 %d5, %r1, {size}; add.s64 %d5, %d5, %d0;\n"
        name = {"bf16": "b16", "f16": "b16"}.get(kind, kind)
        body += f"ld.global.{name} {register(kind, 10 + index)}, [%d5+{index * size * THREADS}];\n"
    names = ", ".join(register(kind, 10 + index) for index in range(len(operands)))
    body += f"{instruction} {register(result, 2)}, {names};\n"
    size = np.dtype(TYPES[result]).itemsize
    body += f"mul.wide.u32 %d5, %r1, {size}; add.s64 %d5, %d5, %d1;\n"
    body += f"st.global.{ {'bf16': 'b16', 'f16': 'b16'}.get(result, result) } [%d5], {register(result, 2)};"
    return run(body, np.concatenate(operands), np.zeros(THREADS, TYPES[result]))


def drawn(kind: str) -> Array:
    """Values of every size, with the special ones among them."""
    if kind in ("f32", "f64"):
        values = GENERATOR.standard_normal(THREADS) * 10.0 ** GENERATOR.integers(-6, 6, THREADS)
        values[:8] = [0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, 0.5, -1.5]
        return GENERATOR.permutation(values).astype(TYPES[kind])
    limits = np.iinfo(TYPES[kind])
    values = GENERATOR.integers(limits.min, limits.max, THREADS, dtype=TYPES[kind], endpoint=True)
    values[:6] = [limits.min, limits.max, 0, 1, 2, limits.max // 2]
    return GENERATOR.permutation(values)


def toward_zero(a: Array, b: Array) -> list[int]:
    return [int(x) // int(y) if (x < 0) == (y < 0) else -(abs(int(x)) // abs(int(y))) for x, y in zip(a, b, strict=True)]


def wrapped(values: Any, kind: str) -> Array:
    bits = 8 * np.dtype(TYPES[kind]).itemsize
    unsigned = np.array([int(value) & ((1 << bits) - 1) for value in values], f"u{bits // 8}")
    return unsigned.view(TYPES[kind])


# ---- integers


@pytest.mark.parametrize("kind", ["s16", "u16", "s32", "u32", "s64", "u64"])
def test_integers(kind: str) -> None:
    a, b, c = drawn(kind), drawn(kind), drawn(kind)
    exact = [(int(x), int(y), int(z)) for x, y, z in zip(a, b, c, strict=True)]
    bits = 8 * a.dtype.itemsize
    for instruction, truth in {
        f"add.{kind}": [x + y for x, y, _ in exact],
        f"sub.{kind}": [x - y for x, y, _ in exact],
        f"mul.lo.{kind}": [x * y for x, y, _ in exact],
        f"mul.hi.{kind}": [(x * y) >> bits for x, y, _ in exact],
        f"min.{kind}": [min(x, y) for x, y, _ in exact],
        f"max.{kind}": [max(x, y) for x, y, _ in exact],
    }.items():
        np.testing.assert_array_equal(applied(instruction, kind, [a, b]), wrapped(truth, kind), instruction)
    np.testing.assert_array_equal(applied(f"mad.lo.{kind}", kind, [a, b, c]), wrapped([x * y + z for x, y, z in exact], kind))
    b[b == 0] = 3
    a[(a == np.iinfo(kind.replace("s", "int").replace("u", "uint")).min) & (a < 0)] = 5  # its quotient by -1 has no value
    quotients = toward_zero(a, b)
    np.testing.assert_array_equal(applied(f"div.{kind}", kind, [a, b]), wrapped(quotients, kind))
    remainder = [int(x) - q * int(y) for x, y, q in zip(a, b, quotients, strict=True)]
    np.testing.assert_array_equal(applied(f"rem.{kind}", kind, [a, b]), wrapped(remainder, kind))


def test_wide_products_and_fields() -> None:
    for kind, double in (("s32", "s64"), ("u32", "u64"), ("s16", "s32"), ("u16", "u32")):
        a, b = drawn(kind), drawn(kind)
        truth = wrapped([int(x) * int(y) for x, y in zip(a, b, strict=True)], double)
        np.testing.assert_array_equal(applied(f"mul.wide.{kind}", kind, [a, b], double), truth)
    word, position, length = drawn("u32"), GENERATOR.integers(0, 33, THREADS), GENERATOR.integers(0, 33, THREADS)
    fields = [(int(x) >> p) & ((1 << n) - 1) for x, p, n in zip(word, position, length, strict=True)]
    found = applied("bfe.u32", "u32", [word, position.astype(np.uint32), length.astype(np.uint32)])
    np.testing.assert_array_equal(found, np.array(fields, np.uint32))


def test_bits() -> None:
    a, b = drawn("b32"), drawn("b32")
    for instruction, truth in {"and.b32": a & b, "or.b32": a | b, "xor.b32": a ^ b}.items():
        np.testing.assert_array_equal(applied(instruction, "b32", [a, b]), truth)
    np.testing.assert_array_equal(applied("not.b32", "b32", [a]), ~a)
    by = GENERATOR.integers(0, 40, THREADS).astype(np.uint32)  # beyond 31 too: nothing remains, or the sign
    many = np.minimum(by, 31)
    np.testing.assert_array_equal(applied("shl.b32", "b32", [a, by]), np.where(by > 31, 0, a << many))
    np.testing.assert_array_equal(applied("shr.u32", "u32", [a, by]), np.where(by > 31, 0, a >> many))
    np.testing.assert_array_equal(applied("shr.s32", "s32", [a.view(np.int32), by.view(np.int32)]), a.view(np.int32) >> many)


# ---- floating point


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_floats(kind: str) -> None:
    a, b = drawn(kind), drawn(kind)
    with np.errstate(all="ignore"):
        for instruction, truth in {
            f"add.{kind}": a + b, f"sub.{kind}": a - b, f"mul.{kind}": a * b, f"div.rn.{kind}": a / b,
            f"min.{kind}": np.fmin(a, b), f"max.{kind}": np.fmax(a, b), f"copysign.{kind}": np.copysign(b, a),
        }.items():  # fmt: skip
            np.testing.assert_array_equal(applied(instruction, kind, [a, b]), truth, instruction)
        np.testing.assert_array_equal(applied(f"neg.{kind}", kind, [a]), -a)
        np.testing.assert_array_equal(applied(f"abs.{kind}", kind, [a]), np.abs(a))
        np.testing.assert_array_equal(applied(f"sqrt.rn.{kind}", kind, [a]), np.sqrt(a))
        np.testing.assert_array_equal(applied(f"rcp.rn.{kind}", kind, [a]), 1 / a)


def test_fused_sums_are_rounded_once() -> None:
    """The remainder of a product, which is zero if the product is rounded before the sum."""
    from fractions import Fraction

    for kind in ("f32", "f64"):
        a, b = GENERATOR.standard_normal((2, THREADS)).astype(TYPES[kind])
        c = -(a * b)
        truth = [float(Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))) for x, y, z in zip(a, b, c, strict=True)]
        found = applied(f"fma.rn.{kind}", kind, [a, b, c])
        np.testing.assert_array_equal(found, np.array(truth, TYPES[kind]))
        assert (found != 0).mean() > 0.5


def test_other_roundings() -> None:
    from fractions import Fraction

    a, b = GENERATOR.standard_normal((2, THREADS)).astype(np.float32) * np.float32(1.1)
    exact = [Fraction(float(x)) + Fraction(float(y)) for x, y in zip(a, b, strict=True)]
    zero = applied("add.rz.f32", "f32", [a, b])
    down, up = applied("add.rm.f32", "f32", [a, b]), applied("add.rp.f32", "f32", [a, b])
    for index, truth in enumerate(exact):
        assert Fraction(float(down[index])) <= truth <= Fraction(float(up[index]))
        assert up[index] == down[index] or up[index] == np.nextafter(down[index], np.float32(np.inf))
        assert zero[index] == (down[index] if truth > 0 else up[index])


def test_subnormal_numbers_are_flushed_where_asked() -> None:
    a, one = np.full(THREADS, 1e-40, np.float32), np.ones(THREADS, np.float32)
    assert (applied("mul.f32", "f32", [a, one]) == a).all()
    assert (applied("mul.ftz.f32", "f32", [a, one]) == 0).all()
    assert (applied("ex2.approx.ftz.f32", "f32", [one * np.float32(-127)]) == 0).all()
    assert (applied("ex2.approx.f32", "f32", [one * np.float32(-127)]) == 2.0**-127).all()


def test_approximate_instructions_are_off_by_as_much_as_asked() -> None:
    x = (GENERATOR.random(THREADS) + 0.5).astype(np.float32)
    body = "mul.wide.u32 %d5, %r1, 4; add.s64 %d6, %d5, %d0; add.s64 %d7, %d5, %d1;\n ld.global.f32 %f1, [%d6];\n"
    wide = x.astype(np.float64)
    for instruction, truth in {
        "ex2.approx.f32 %f2, %f1;": np.exp2(wide),
        "lg2.approx.f32 %f2, %f1;": np.log2(wide),
        "rcp.approx.f32 %f2, %f1;": 1 / wide,
        "rsqrt.approx.f32 %f2, %f1;": 1 / np.sqrt(wide),
        "sqrt.approx.f32 %f2, %f1;": np.sqrt(wide),
        "div.approx.f32 %f2, 0f40400000, %f1;": 3 / wide,
        "div.full.f32 %f2, 0f40400000, %f1;": 3 / wide,
    }.items():
        for error in (0.0, 1.0, 16.0):
            found = run(f"{body}{instruction} st.global.f32 [%d7], %f2;", x, np.zeros_like(x), error=error, seed=3)
            off = np.abs(found / truth - 1).max() / 2.0**-22
            assert 0.6 * error <= off <= error + 0.26, (instruction, error, off)


@pytest.mark.parametrize("kind", ["f32", "s32", "u64"])
def test_comparisons(kind: str) -> None:
    a, b = drawn(kind), drawn(kind)
    b[:20] = a[:20]
    ordered = {"eq": a == b, "ne": a != b, "lt": a < b, "le": a <= b, "gt": a > b, "ge": a >= b}
    if kind == "f32":
        nan = np.isnan(a) | np.isnan(b)
        ordered["ne"] = (a != b) & ~nan
        ordered |= {f"{name}u": truth | nan for name, truth in ordered.items()} | {"nan": nan, "num": ~nan}
    body = "\n".join(
        f"{{ .reg .pred q; setp.{name}.{kind} q, A, B; selp.u16 %h2, 1, 0, q; st.global.u16 [%d7+{2 * THREADS * index}], %h2; }}"
        for index, name in enumerate(ordered)
    )
    registers, size = ("%f10", "%f11") if kind == "f32" else ("%r10", "%r11") if kind == "s32" else ("%d10", "%d11"), a.dtype.itemsize
    loads = f"mul.wide.u32 %d5, %r1, {size}; add.s64 %d6, %d5, %d0; mul.wide.u32 %d5, %r1, 2; add.s64 %d7, %d5, %d1;\n"
    loads += f"ld.global.{kind} A, [%d6]; ld.global.{kind} B, [%d6+{size * THREADS}];\n"
    found = run(
        (loads + body).replace("A", registers[0]).replace("B", registers[1]),
        np.concatenate([a, b]),
        np.zeros((len(ordered), THREADS), "u2"),
    )
    for row, (name, truth) in zip(found, ordered.items(), strict=True):
        np.testing.assert_array_equal(row, truth, name)


def test_predicates() -> None:
    """Combined comparisons, both results, negation, and an instruction that only some threads execute."""
    body = """
    mul.wide.u32 %d5, %r1, 4; add.s64 %d7, %d5, %d1;
    mov.u32 %r2, 0;
    setp.lt.u32 %p1, %r1, 20;
    setp.gt.and.u32 %p2|%p3, %r1, 9, %p1;
    @%p2 add.s32 %r2, %r2, 1;
    @%p3 add.s32 %r2, %r2, 10;
    @!%p1 add.s32 %r2, %r2, 100;
    not.pred %p4, %p1;
    or.pred %p4, %p4, %p2;
    selp.b32 %r3, 1000, 0, %p4;
    add.s32 %r2, %r2, %r3;
    st.global.b32 [%d7], %r2;"""
    thread = np.arange(THREADS)
    below, above = thread < 20, thread > 9
    both = (below & above).astype(int) + 10 * (below & ~above) + 100 * ~below + 1000 * (~below | (below & above))
    np.testing.assert_array_equal(run(body, np.zeros(1), np.zeros(THREADS, np.int32)), both)


# ---- conversions and moves


def test_conversions() -> None:
    x = drawn("f32")
    with np.errstate(all="ignore"):
        whole = {"rzi": np.trunc(x), "rni": np.rint(x), "rmi": np.floor(x), "rpi": np.ceil(x)}
        for rounding, truth in whole.items():
            clipped = np.clip(np.nan_to_num(truth.astype(np.float64)), -(2.0**31), 2.0**31 - 1).astype(np.int32)
            np.testing.assert_array_equal(applied(f"cvt.{rounding}.s32.f32", "f32", [x], "s32"), clipped)
            np.testing.assert_array_equal(applied(f"cvt.{rounding}.f32.f32", "f32", [x]), truth)
        np.testing.assert_array_equal(applied("cvt.sat.f32.f32", "f32", [x]), np.where(np.isnan(x), 0, np.clip(x, 0, 1)))
        np.testing.assert_array_equal(applied("cvt.f64.f32", "f32", [x], "f64"), x.astype(np.float64))
        np.testing.assert_array_equal(applied("cvt.rn.f16.f32", "f32", [x], "f16"), x.astype(np.float16))
    wide = drawn("s64")
    np.testing.assert_array_equal(applied("cvt.rn.f32.s64", "s64", [wide], "f32"), wide.astype(np.float32))
    np.testing.assert_array_equal(applied("cvt.u32.u64", "u64", [wide.view(np.uint64)], "u32"), wide.astype(np.uint32))
    narrow = drawn("s32")
    np.testing.assert_array_equal(applied("cvt.s64.s32", "s32", [narrow], "s64"), narrow.astype(np.int64))
    np.testing.assert_array_equal(applied("cvt.u64.u32", "u32", [narrow.view(np.uint32)], "u64"), narrow.view(np.uint32).astype(np.uint64))


def test_bfloat16() -> None:
    """Rounded to nearest even, as torch does."""
    torch = pytest.importorskip("torch")
    x = drawn("f32")
    x[:2] = np.array([0x3F808000, 0x3F818000], np.uint32).view(np.float32)  # halfway: one goes down, one up
    truth = torch.from_numpy(x).bfloat16()
    bits = applied("cvt.rn.bf16.f32", "f32", [x], "bf16")
    number = ~np.isnan(x)
    np.testing.assert_array_equal(bits[number], truth.view(torch.int16).numpy().view(np.uint16)[number])
    np.testing.assert_array_equal(applied("cvt.f32.bf16", "bf16", [bits], "f32"), truth.float().numpy())
    pair = applied("cvt.rn.bf16x2.f32", "f32", [x, x[::-1].copy()], "b32")
    np.testing.assert_array_equal((pair >> 16)[number], bits[number])
    np.testing.assert_array_equal((pair & 0xFFFF)[::-1][number], bits[number])
    largest = applied("max.bf16x2", "b32", [pair, np.full(THREADS, 0x3F80C000, np.uint32)])  # of 1 and of -2
    for instruction, truth_of in (("max.bf16", np.fmax), ("min.NaN.bf16", np.minimum)):
        one = applied(instruction, "bf16", [bits, np.full(THREADS, 0x3F80, np.uint16)])
        one_value = torch.from_numpy(one.astype(np.int16)).view(torch.bfloat16).float().numpy()
        np.testing.assert_array_equal(one_value, truth_of(truth.float().numpy(), np.float32(1)))
    upper = torch.from_numpy((largest >> 16).astype(np.int16)).view(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(upper, np.fmax(truth.float().numpy(), 1))


def test_halves_of_a_register() -> None:
    body = """
    mul.wide.u32 %d5, %r1, 8; add.s64 %d7, %d5, %d1;
    mov.b32 %r2, 0x12345678;
    mov.b32 {%h1, %h2}, %r2;
    mov.b32 %r3, {%h2, %h1};
    mov.b64 %d2, {%r2, %r3};
    mov.b64 {_, %r4}, %d2;
    st.global.v2.b32 [%d7], {%r3, %r4};"""
    found = run(body, np.zeros(1), np.zeros((THREADS, 2), np.uint32))
    assert (found == 0x56781234).all()


def test_loads_are_extended_to_the_register() -> None:
    given = np.array([0x80, 0x7F, 0xFF, 1], np.uint8)
    body = """
    ld.global.s8 %h1, [%d0+2]; ld.global.u8 %h2, [%d0+2]; ld.global.s16 %r2, [%d0]; ld.global.v2.b8 {%h3, %h4}, [%d0];
    st.global.u16 [%d1], %h1; st.global.u16 [%d1+2], %h2; st.global.u32 [%d1+4], %r2;
    st.global.u8 [%d1+8], %h4; st.global.u8 [%d1+9], %h3;"""
    found = run(body, given, np.zeros(10, np.uint8), threads=1)
    assert found.tolist() == [0xFF, 0xFF, 0xFF, 0, 0x80, 0x7F, 0, 0, 0x7F, 0x80]
