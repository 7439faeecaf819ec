"""The machine that executes PTX, by programs written by hand: every kind of instruction against numpy, and every fault."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from ptx_machine import FaultError, GlobalMemory, Grid, Hardware, UnsupportedError, launch, parse

Array = NDArray[Any]
TYPES = {"f32": np.float32, "f64": np.float64, "s32": np.int32, "u32": np.uint32, "b32": np.uint32, "s64": np.int64, "u64": np.uint64}
TYPES |= {"s16": np.int16, "u16": np.uint16, "b16": np.uint16, "f16": np.float16, "bf16": np.uint16, "u8": np.uint8, "s8": np.int8}
GENERATOR = np.random.default_rng(0)
THREADS = 64

HEADER = """
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 dynamic[];
.visible .entry kernel(
    .param .u64 .ptr .global .align 1 input,
    .param .u64 .ptr .global .align 1 output
)
{
    .reg .pred %p<10>; .reg .b16 %h<20>; .reg .b32 %r<30>; .reg .f32 %f<30>; .reg .b64 %d<30>; .reg .f64 %g<30>;
    mov.u32 %r0, %tid.x;       // the thread, among all of the launch in %r1
    mov.u32 %r1, %ctaid.x;
    mad.lo.s32 %r1, %r1, {threads}, %r0;
    ld.param.u64 %d0, [input];
    ld.param.u64 %d1, [output];
"""


def run(
    body: str, given: Array, found: Array, *, threads: int = THREADS, blocks: int = 1, cluster: int = 1, shared: int = 1024, **hardware: Any
) -> Array:
    """Execute a body for the input; returns the output, which is `found` before."""
    text = HEADER.replace("{threads}", str(threads)) + body + "\n    ret;\n}\n"
    memory = GlobalMemory(1 << 16)
    addresses = memory.allocate(given, "input"), memory.allocate(found, "output")
    parameters = struct.pack("QQ", *addresses)
    launch(parse(text)["kernel"], Grid(blocks, threads, cluster), memory, parameters, shared, Hardware(**{"error": 0.0, **hardware}))
    return memory.read(addresses[1], found)


def applied(instruction: str, kind: str, operands: list[Array], result: str = "") -> Array:
    """What ``instruction result, a, b, ...`` gives for arrays a, b, ... with an element for each thread."""
    letter = {"b": "h", "u": "h", "s": "h"}
    result = result or kind

    def register(kind: str, index: int) -> str:
        size = np.dtype(TYPES[kind]).itemsize
        if kind in ("f32", "f64"):
            return f"%{'f' if kind == 'f32' else 'g'}{index}"
        return f"%{ {1: letter['b'], 2: 'h', 4: 'r', 8: 'd'}[size]}{index}"

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
    body += f"st.global.{ {'bf16': 'b16', 'f16': 'b16'}.get(result, result)} [%d5], {register(result, 2)};"
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
    truth = toward_zero(a, b)
    np.testing.assert_array_equal(applied(f"div.{kind}", kind, [a, b]), wrapped(truth, kind))
    remainder = [int(x) - q * int(y) for x, y, q in zip(a, b, truth, strict=True)]
    np.testing.assert_array_equal(applied(f"rem.{kind}", kind, [a, b]), wrapped(remainder, kind))


def test_wide_products_and_fields() -> None:
    for kind, double in (("s32", "s64"), ("u32", "u64"), ("s16", "s32"), ("u16", "u32")):
        a, b = drawn(kind), drawn(kind)
        truth = wrapped([int(x) * int(y) for x, y in zip(a, b, strict=True)], double)
        np.testing.assert_array_equal(applied(f"mul.wide.{kind}", kind, [a, b], double), truth)
    word, position, length = drawn("u32"), GENERATOR.integers(0, 33, THREADS), GENERATOR.integers(0, 33, THREADS)
    truth = [(int(x) >> p) & ((1 << n) - 1) for x, p, n in zip(word, position, length, strict=True)]
    found = applied("bfe.u32", "u32", [word, position.astype(np.uint32), length.astype(np.uint32)])
    np.testing.assert_array_equal(found, np.array(truth, np.uint32))


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
    found = run((loads + body).replace("A", registers[0]).replace("B", registers[1]), np.concatenate([a, b]), np.zeros((len(ordered), THREADS), "u2"))
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


# ---- threads


def test_branches_and_loops_of_different_lengths() -> None:
    body = """
    mul.wide.u32 %d5, %r1, 4; add.s64 %d7, %d5, %d1;
    mov.u32 %r2, 0; mov.u32 %r3, 0;
AGAIN:
    add.s32 %r3, %r3, %r2; add.s32 %r2, %r2, 1;
    setp.le.u32 %p1, %r2, %r1;
    @%p1 bra AGAIN;
    setp.eq.u32 %p2, %r1, 7;
    @%p2 bra.uni OUT;
    st.global.b32 [%d7], %r3;
OUT:"""
    thread = np.arange(THREADS)
    truth = np.where(thread == 7, -1, thread * (thread + 1) // 2)
    for ranks in (1, 2):
        np.testing.assert_array_equal(run(body, np.zeros(1), np.full(THREADS, -1, np.int32), ranks=ranks), truth)


@pytest.mark.parametrize(("mode", "by", "limit"), [("bfly", 5, 31), ("idx", 3, 31), ("up", 2, 0), ("down", 3, 31), ("down", 3, 0x181F)])
def test_shuffles(mode: str, by: int, limit: int) -> None:
    body = f"""
    mul.wide.u32 %d5, %r1, 8; add.s64 %d7, %d5, %d1;
    add.s32 %r2, %r1, 1000;
    shfl.sync.{mode}.b32 %r3|%p1, %r2, {by}, {limit}, -1;
    selp.b32 %r4, 1, 0, %p1;
    st.global.v2.b32 [%d7], {{%r3, %r4}};"""
    found = run(body, np.zeros(1), np.zeros((THREADS, 2), np.int32))
    lane = np.arange(THREADS) % 32
    source = {"bfly": lane ^ by, "idx": np.full(THREADS, by), "up": lane - by, "down": lane + by}[mode]
    segment = 32 if limit < 256 else 8
    inside = (source >= 0) & (source < 32) & (source // segment == lane // segment)
    np.testing.assert_array_equal(found[:, 1], inside if mode in ("up", "down") else 1)
    np.testing.assert_array_equal(found[:, 0] - 1000, np.arange(THREADS) - lane + np.where(inside | (mode not in ("up", "down")), source, lane))


def test_matrices_in_shared_memory() -> None:
    """Each thread stores two neighbours; ldmatrix gives a thread the two that it holds of an 8 x 8 matrix, stmatrix the way back."""
    body = """
    mov.u32 %r2, dynamic; shl.b32 %r3, %r0, 4; add.s32 %r4, %r2, %r3;
    shl.b32 %r5, %r0, 2; add.s32 %r5, %r5, %r2;
    st.shared.b32 [%r5], %r0;
    bar.sync 0;
    ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r6}, [%r4];
    stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r4+512], {%r6};
    bar.sync 0;
    ld.shared.b32 %r7, [%r5+512];
    mul.wide.u32 %d5, %r1, 8; add.s64 %d7, %d5, %d1; st.global.v2.b32 [%d7], {%r6, %r7};"""
    found = run(body, np.zeros(1), np.zeros((32, 2), np.int32), threads=32)
    np.testing.assert_array_equal(found, np.arange(32)[:, None].repeat(2, 1))


REVERSED = """
    mov.u32 %r2, dynamic; shl.b32 %r3, %r0, 2; add.s32 %r4, %r2, %r3; sub.s32 %r5, %r2, %r3;
    st.shared.b32 [%r4], %r1;
    BARRIER
    ld.shared.b32 %r6, [%r5+252];
    mul.wide.u32 %d5, %r1, 4; add.s64 %d7, %d5, %d1; st.global.b32 [%d7], %r6;"""


def test_a_barrier_of_the_block_and_one_that_is_missing() -> None:
    """Threads exchange values through shared memory; without the barrier a warp reads what is not there yet, where warps run apart."""
    truth = np.arange(2 * THREADS).reshape(2, THREADS)[:, ::-1]
    zeros = np.zeros((2, THREADS), np.int32)
    for seed in range(4):
        given = {"blocks": 2, "ranks": 2, "seed": seed}
        np.testing.assert_array_equal(run(REVERSED.replace("BARRIER", "bar.sync 0;"), np.zeros(1), zeros, **given), truth)
    found = [(run(REVERSED.replace("BARRIER", ""), np.zeros(1), zeros, blocks=2, ranks=2, seed=seed) != truth).any() for seed in range(4)]
    assert any(found)


# ---- clusters, mbarriers and transfers

NEIGHBOUR = """
    mov.u32 %r2, dynamic;
    setp.ne.u32 %p1, %r0, 0;
    @%p1 bra READY;
    mbarrier.init.shared::cta.b64 [%r2], 1;
    fence.mbarrier_init.release.cluster;
READY:
    barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;
    @%p1 bra WAIT;
    mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%r2], 16;
    mov.u32 %r3, %cluster_ctarank; add.s32 %r3, %r3, 1; and.b32 %r3, %r3, 1;
    add.s32 %r4, %r2, 16;
    mapa.shared::cluster.u32 %r5, %r4, %r3; mapa.shared::cluster.u32 %r6, %r2, %r3;
    mov.u32 %r7, %ctaid.x; cvt.rn.f32.u32 %f1, %r7;
    st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%r5], {%f1, %f1, %f1, %f1}, [%r6];
WAIT:
    { .reg .pred q;
    mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 q, [%r2], 0;
    @!q bra WAIT; }
    ld.shared.f32 %f2, [%r2+28];
    mul.wide.u32 %d5, %r1, 4; add.s64 %d7, %d5, %d1; st.global.f32 [%d7], %f2;
    barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;"""


def test_messages_between_the_blocks_of_a_cluster() -> None:
    for seed in range(3):
        found = run(NEIGHBOUR, np.zeros(1), np.zeros((4, THREADS), np.float32), blocks=4, cluster=2, ranks=2, seed=seed)
        np.testing.assert_array_equal(found, np.array([1, 0, 3, 2])[:, None].repeat(THREADS, 1))


COPY = """
    mov.u32 %r2, dynamic;
    setp.ne.u32 %p1, %r0, 0;
    @%p1 bra READY;
    mbarrier.init.shared::cta.b64 [%r2], 1;
READY:
    bar.sync 0;
    @%p1 bra WAIT;
    mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%r2], 256;
    add.s32 %r3, %r2, 128;
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r3], [%d0], 256, [%r2];
WAIT:
    mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 %p2, [%r2], 0;
    @!%p2 bra WAIT;
    shl.b32 %r4, %r0, 2; add.s32 %r4, %r4, %r2;
    ld.shared.f32 %f1, [%r4+128]; add.f32 %f1, %f1, %f1; st.shared.f32 [%r4+128], %f1;
    fence.proxy.async.shared::cta;
    bar.sync 0;
    @%p1 bra END;
    cp.async.bulk.global.shared::cta.bulk_group [%d1], [%r3], 256;
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group.read 0;
END:"""


def test_bulk_copies() -> None:
    given = GENERATOR.standard_normal(THREADS).astype(np.float32)
    for seed in range(3):
        np.testing.assert_array_equal(run(COPY, given, np.zeros_like(given), ranks=2, seed=seed), 2 * given)


@pytest.mark.parametrize(
    ("before", "after", "what"),
    [
        ("fence.proxy.async.shared::cta;", "", "without fence.proxy.async"),
        ("cp.async.bulk.wait_group.read 0;", "", "the blocks have ended before"),
        ("_, [%r2], 256;", "_, [%r2], 272;", "deadlock: threads wait at line .* mbarrier.try_wait"),
        ("[%d0], 256, [%r2]", "[%d0], 248, [%r2]", "misaligned: a bulk copy of 248 bytes"),
        ("[%d0], 256, [%r2]", "[%d0], 272, [%r2]", "out of bounds: 272 bytes at 0 of input, which has 256 bytes"),
        ("[%r2], 1;", "[%r2], 2;", "deadlock"),
        ("mbarrier.init.shared::cta.b64 [%r2], 1;", "", "no mbarrier was initialized"),
        ("st.shared.f32 [%r4+128]", "st.shared.f32 [%r4+4096]", "out of bounds: 4 bytes at 4096 of 1024 bytes of shared memory"),
    ],
)
def test_faults_of_copies(before: str, after: str, what: str) -> None:
    assert before in COPY
    given = np.zeros(THREADS, np.float32)
    with pytest.raises(FaultError, match=what):
        run(COPY.replace(before, after), given, given.copy(), seed=1)


def test_a_copy_that_is_not_waited_for_has_not_arrived() -> None:
    given = np.ones(THREADS, np.float32)
    text = COPY.replace("@!%p2 bra WAIT;", "")
    assert any((run(text, given, np.zeros_like(given), seed=seed) != 2).any() for seed in range(12))


# ---- faults


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ("ld.global.b32 %r2, [%d0+64];", r"out of bounds: 4 bytes at 64 of input, which has 64 bytes \(line \d+: ld.global.b32 %r2"),
        ("ld.global.b32 %r2, [%d0+-4];", "out of bounds"),
        ("ld.global.v4.b32 {%r2, %r3, %r4, %r5}, [%d0+52];", "misaligned: 16 bytes"),
        ("st.global.b32 [%d1+2], %r0;", "misaligned: 4 bytes"),
        ("mov.u32 %r2, 1; div.u32 %r2, %r2, %r0;", "divided by zero"),
        ("setp.eq.u32 %p1, %r0, 0; @%p1 bra ALONE; bar.sync 1; ALONE: bar.sync 0;", "deadlock: threads wait at"),
    ],
)
def test_faults(body: str, what: str) -> None:
    with pytest.raises(FaultError, match=what):
        run(body, np.zeros(16, np.float32), np.zeros(16, np.float32))


@pytest.mark.parametrize(
    "instruction", ["wgmma.fence.sync.aligned;", "add.rn.bf16x2 %r2, %r3, %r4;", "tanh.approx.f32 %f1, %f2;", "shfl.sync.bfly.b32 %r1, %r2, 1, 31, 15;"]
)
def test_an_unknown_instruction_is_named(instruction: str) -> None:
    with pytest.raises(UnsupportedError, match=r"line \d+: instruction '" + instruction.split()[0].rstrip(";").replace(".", r"\.")):
        run(instruction, np.zeros(1), np.zeros(1))


def test_rows_that_lie_two_to_the_32_apart() -> None:
    """Allocations may be anywhere: an address that is computed in 32 bits misses the second one."""
    memory = GlobalMemory(1024)
    first = memory.allocate(np.zeros(4, np.float32), "first")
    second = memory.allocate(np.ones(4, np.float32), "second", address=first + 2**32)
    text = HEADER.replace("{threads}", "1") + "add.s64 %d0, %d0, 4294967296; ld.global.f32 %f1, [%d0+12]; st.global.f32 [%d1], %f1; ret; }"
    launch(parse(text)["kernel"], Grid(1, 1), memory, struct.pack("QQ", first, first))
    assert memory.read(first, np.zeros(4, np.float32)).tolist() == [1, 0, 0, 0]
    with pytest.raises(ValueError, match="expected a place that no other allocation has"):
        memory.allocate(np.zeros(4), address=second + 8)
