"""Loads and stores, and the exchanges between the threads of a warp."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from . import memory
from .faults import FaultError
from .instructions import Action, builds, refused
from .parser import Address, Instruction
from .threads import WARP, Threads
from .values import BYTES, UNSIGNED, Array, Selection

SPACES = ("global", "shared", "shared::cta", "shared::cluster", "param")
# What orders an access or says how it is cached. The machine executes one instruction after the other: every order holds.
ORDERS = {"volatile", "weak", "relaxed", "acquire", "release", "cta", "cluster", "gpu", "sys", "nc", "v2", "v4"}
CACHES = ("L1::", "L2::", "ca", "cg", "cs", "cv", "lu", "wb", "wt")


def address_of(threads: Threads, operand: Any, instruction: Instruction) -> Callable[[Selection], Array]:
    """A function that returns the address in each selected thread, as int64."""
    if not isinstance(operand, Address):
        raise refused(instruction)
    offset = np.int64(operand.offset)
    if operand.base in threads.entry.registers:
        register = threads.register(operand.base)
        wide = register.dtype.itemsize == 8
        return lambda selection: (register[selection].astype(np.int64) + offset) & (-1 if wide else 0xFFFF_FFFF)
    base = int(threads.number(operand.base, "b64")) if operand.base else 0
    return lambda selection: np.full(threads.indices(selection).size, base + offset, np.int64)


def shared_places(threads: Threads, addresses: Array, size: int, selected: Array) -> Array:
    memory.check_aligned(addresses, size)
    block, first = threads.block[selected], threads.first_of_cluster[selected]
    return threads.shared.places(addresses, size, block, first, threads.grid.cluster)


def space_of(instruction: Instruction) -> str:
    space = next((each for each in instruction.modifiers if each in SPACES), "generic")
    known = {each for each in instruction.modifiers[:-1] if each in ORDERS or each in SPACES or each.startswith(CACHES)}
    if set(instruction.modifiers[:-1]) - known:
        raise refused(instruction)
    return space


def generic(addresses: Array) -> str:
    """The space that generic addresses lie in."""
    inside = (addresses >= memory.SHARED_WINDOW) & (addresses < memory.SHARED_WINDOW + memory.CLUSTER_STEP)
    if inside.any():
        raise FaultError("a generic address of shared memory, which this machine does not know")
    return "global"


@builds("ld")
def load(threads: Threads, instruction: Instruction) -> Action:
    space, kind = space_of(instruction), instruction.type
    to, source = instruction.operands[:2]
    names = to if isinstance(to, tuple) else (to,)
    write = [threads.writer(name, kind) for name in names]
    size, count, address = BYTES[kind], len(names), address_of(threads, source, instruction)

    def action(selection: Selection) -> None:
        addresses = address(selection)
        where = generic(addresses) if space == "generic" else space
        if where == "global":
            memory.check_aligned(addresses, size * count)
            values = memory.gather(threads.memory.bytes, threads.memory.places(addresses, size * count), size, count)
        elif where == "param":
            values = memory.gather(threads.parameters, addresses, size, count)
        else:
            values = memory.gather(
                threads.shared.bytes, shared_places(threads, addresses, size * count, threads.indices(selection)), size, count
            )
        for each, value in zip(write, values, strict=True):
            each(selection, value.view(kind_of(kind)))

    return action


def kind_of(kind: str) -> Any:
    """The numpy type of a loaded value: an integer with its sign, so that it is extended as PTX asks."""
    return np.dtype(f"i{BYTES[kind]}") if kind.startswith("s") else UNSIGNED[BYTES[kind]] if kind[0] != "f" else np.dtype(f"f{BYTES[kind]}")


@builds("st")
def store(threads: Threads, instruction: Instruction) -> Action:
    space, kind = space_of(instruction), instruction.type
    target, source = instruction.operands[:2]
    names = source if isinstance(source, tuple) else (str(source),)
    read = [threads.reader(name, kind) for name in names]
    size, address = BYTES[kind] * len(names), address_of(threads, target, instruction)

    def action(selection: Selection) -> None:
        addresses, selected = address(selection), threads.indices(selection)
        values = [np.broadcast_to(each(selection), addresses.shape) for each in read]
        where = generic(addresses) if space == "generic" else space
        if where == "global":
            memory.check_aligned(addresses, size)
            memory.scatter(threads.memory.bytes, threads.memory.places(addresses, size), values)
        else:
            places = shared_places(threads, addresses, size, selected)
            memory.scatter(threads.shared.bytes, places, values)
            threads.shared.stored(places, size, selected)

    return action


@builds("shfl")
def shuffle(threads: Threads, instruction: Instruction) -> Action:
    """All threads of a warp execute it together: see machine.py."""
    sync, mode, kind = instruction.modifiers
    if sync != "sync" or kind != "b32" or mode not in ("bfly", "idx", "up", "down"):
        raise refused(instruction)
    to, *inside = str(instruction.operands[0]).split("|")
    write, write_inside = threads.writer(to, kind), [threads.writer(name, "pred") for name in inside]
    value = threads.reader(instruction.operands[1], kind)
    by, limits, members = (threads.reader(operand, "u32") for operand in instruction.operands[2:5])

    def action(selection: Selection) -> None:
        selected = threads.indices(selection)
        if (members(selection) != 0xFFFF_FFFF).any():
            raise refused(instruction)
        lane, distance, limit = threads.lane[selected], by(selection).astype(np.int64), limits(selection).astype(np.int64)
        segment, clamp = (limit >> 8) & 31, limit & 31
        last = (lane & segment) | (clamp & ~segment)
        source = {"bfly": lane ^ distance, "idx": (lane & segment) | (distance & ~segment), "up": lane - distance, "down": lane + distance}[
            mode
        ]
        valid = source >= last if mode == "up" else source <= last
        everyone = np.broadcast_to(value(slice(None)), (threads.count,))
        write(selection, everyone[selected - lane + np.where(valid, source, lane)])
        for each in write_inside:
            each(selection, valid)

    return action


@builds("redux")
def reduction(threads: Threads, instruction: Instruction) -> Action:
    """An integer operation over all threads of a warp, whose result each of them gets."""
    functions: dict[str, Any] = {"add": np.add, "min": np.minimum, "max": np.maximum}
    functions |= {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
    sync, operation, kind = instruction.modifiers
    if sync != "sync" or kind not in ("s32", "u32", "b32") or operation not in functions:
        raise refused(instruction)
    write, value = threads.writer(instruction.operands[0], kind), threads.reader(instruction.operands[1], kind)
    members = threads.reader(instruction.operands[2], "u32")

    def action(selection: Selection) -> None:
        if (members(selection) != 0xFFFF_FFFF).any():
            raise refused(instruction)
        of_warps = np.broadcast_to(value(selection), threads.indices(selection).shape).reshape(-1, WARP)
        write(selection, functions[operation].reduce(of_warps, axis=1, dtype=of_warps.dtype).repeat(WARP))

    return action


@builds("ldmatrix", "stmatrix")
def matrix(threads: Threads, instruction: Instruction) -> Action:
    """8 x 8 matrices of 16-bit elements between shared memory and a warp: thread t holds elements 2 t and 2 t + 1 of each."""
    sync, *form = instruction.modifiers
    count = {"x1": 1, "x2": 2, "x4": 4}[form[2] if len(form) > 2 else ""]
    if sync != "sync" or form[:2] != ["aligned", "m8n8"] or form[3:] not in (["shared", "b16"], ["shared::cta", "b16"]):
        raise refused(instruction)
    loads = instruction.name == "ldmatrix"
    registers, place = instruction.operands if loads else instruction.operands[::-1]
    names = registers if isinstance(registers, tuple) else (str(registers),)
    address = address_of(threads, place, instruction)
    write, read = [threads.writer(name, "b32") for name in names] if loads else [], [threads.reader(name, "b32") for name in names]
    view = threads.shared.bytes[: threads.shared.bytes.size // 4 * 4].view(np.uint32)

    def action(selection: Selection) -> None:
        selected = threads.indices(selection)
        rows = shared_rows(threads, address(selection), selected, count)
        for index in range(count):
            # Thread 8 i + r gives the address of row r of matrix i.
            row = rows.reshape(-1, WARP)[:, 8 * index : 8 * index + 8].repeat(4, axis=1).reshape(-1)
            at = row // 4 + threads.lane[selected] % 4
            if loads:
                write[index](selection, view[at])
            else:
                view[at] = read[index](selection)
                threads.shared.stored(4 * at, 4, selected)

    return action


def shared_rows(threads: Threads, addresses: Array, selected: Array, count: int) -> Array:
    """The places of the rows of 16 bytes; the addresses of threads that give no row are not looked at."""
    gives = threads.lane[selected] < 8 * count
    places = np.zeros(selected.size, np.int64)
    places[gives] = shared_places(threads, addresses[gives], 16, selected[gives])
    return places


@builds("mapa")
def address_in_cluster(threads: Threads, instruction: Instruction) -> Action:
    """The address of a shared variable in another block of the cluster."""
    if instruction.modifiers != ("shared::cluster", "u32"):
        raise refused(instruction)
    write = threads.writer(instruction.operands[0], "u32")
    address, rank = (threads.reader(operand, "u32") for operand in instruction.operands[1:])
    return lambda selection: write(selection, address(selection) + (rank(selection) + 1) * np.uint32(memory.CLUSTER_STEP))
