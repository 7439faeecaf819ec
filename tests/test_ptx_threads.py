"""The machine that executes PTX, by programs written by hand: threads that meet, copies on their way, and every fault."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
from ptx.programs import HEADER, THREADS, run
from ptx_machine import FaultError, GlobalMemory, Grid, UnsupportedError, launch, parse

GENERATOR = np.random.default_rng(0)


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
    np.testing.assert_array_equal(
        found[:, 0] - 1000, np.arange(THREADS) - lane + np.where(inside | (mode not in ("up", "down")), source, lane)
    )


@pytest.mark.parametrize(("operation", "truth"), [("min.s32", np.min), ("max.s32", np.max), ("add.s32", np.sum)])
def test_reductions_over_a_warp(operation: str, truth: Any) -> None:
    body = f"""
    mul.wide.u32 %d5, %r1, 4; add.s64 %d7, %d5, %d1;
    sub.s32 %r2, %r1, 40; mov.u32 %r3, -1;
    redux.sync.{operation} %r4, %r2, %r3;
    st.global.b32 [%d7], %r4;"""
    found = run(body, np.zeros(1), np.zeros(THREADS, np.int32))
    given = (np.arange(THREADS) - 40).reshape(2, 32)
    np.testing.assert_array_equal(found.reshape(2, 32), truth(given, axis=1)[:, None].repeat(32, 1))


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
    assert any((run(text, given, np.zeros_like(given), seed=seed) != 2).any() for seed in range(30))


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
    "instruction",
    ["wgmma.fence.sync.aligned;", "add.rn.bf16x2 %r2, %r3, %r4;", "tanh.approx.f32 %f1, %f2;", "shfl.sync.bfly.b32 %r1, %r2, 1, 31, 15;"],
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
