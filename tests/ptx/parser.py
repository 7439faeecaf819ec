"""The text of a PTX module as entries, each with its parameters, registers, shared variables and instructions."""

from __future__ import annotations

import bisect
import re
from dataclasses import dataclass, field

from .faults import UnsupportedError
from .values import BYTES


@dataclass(frozen=True)
class Address:
    """``[base + offset]``: base is a register, a parameter, a shared variable, or empty."""

    base: str
    offset: int


Operand = str | Address | tuple[str, ...]  # a register, number or symbol; an address; or a vector in braces


@dataclass
class Instruction:
    """One instruction: ``@negated predicate  name.modifiers  operands``."""

    line: int
    text: str
    predicate: str
    negated: bool
    name: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]

    @property
    def type(self) -> str:
        """The last modifier, in most instructions the type of the operands."""
        return self.modifiers[-1] if self.modifiers else ""

    def __str__(self) -> str:
        return f"line {self.line}: {self.text}"


@dataclass
class Entry:
    """A kernel."""

    name: str
    parameters: dict[str, int] = field(default_factory=dict)  # offset of each in the bytes of the parameters
    parameter_bytes: int = 0
    registers: dict[str, str] = field(default_factory=dict)  # type of each
    shared: dict[str, int] = field(default_factory=dict)  # offset of each variable in the shared memory of a block
    shared_bytes: int = 0  # without the memory whose size the launch chooses
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # index of the instruction behind each


def align(offset: int, alignment: int) -> int:
    """The next multiple of alignment."""
    return -(-offset // alignment) * alignment


def parse(text: str, *parts: str) -> dict[str, Entry]:
    """Return the entries of a module by name: those whose name has all these parts.

    Raises:
        UnsupportedError: a statement that the parser does not know, with its line.
    """
    text = re.sub(r"/\*.*?\*/", lambda match: "\n" * match[0].count("\n"), text, flags=re.S)
    text = re.sub(r"//[^\n]*", "", text)
    dynamic = [(match[2], int(match[1])) for match in re.finditer(r"\.extern\s+\.shared\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[\]", text)]
    newlines = [match.start() for match in re.finditer("\n", text)]
    entries = {}
    for match in re.finditer(r"\.entry\s+([\w$]+)\s*\((.*?)\)([^{;]*)\{", text, flags=re.S):
        if not all(part in match[1] for part in parts):
            continue
        entry = Entry(match[1])
        _parse_parameters(entry, match[2])
        _Body(entry, text, match.end(), newlines).parse()
        for name, alignment in dynamic:  # they share one place, behind all others
            entry.shared_bytes = align(entry.shared_bytes, alignment) if name in _symbols(entry) else entry.shared_bytes
        entry.shared.update((name, entry.shared_bytes) for name, _ in dynamic)
        entries[entry.name] = entry
    return entries


def _symbols(entry: Entry) -> set[str]:
    found: set[str] = set()
    for instruction in entry.code:
        found.update(operand.base if isinstance(operand, Address) else str(operand) for operand in instruction.operands)
    return found


def _parse_parameters(entry: Entry, text: str) -> None:
    for declaration in filter(None, (each.strip() for each in text.split(","))):
        array = re.fullmatch(r"\.param\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d+)\]", declaration)
        if array:
            alignment, name, size = int(array[1]), array[2], int(array[3])
        else:
            name, size = declaration.split()[-1], BYTES[declaration.split()[1].lstrip(".")]
            alignment = size
        entry.parameters[name] = align(entry.parameter_bytes, alignment)
        entry.parameter_bytes = entry.parameters[name] + size


LABEL = re.compile(r"([\w$]+)\s*:(?!:)")


class _Body:
    """The statements between the braces of an entry. Registers and labels of an inner block get names of their own."""

    def __init__(self, entry: Entry, text: str, start: int, newlines: list[int]) -> None:
        self.entry, self.text, self.at, self.newlines = entry, text, start, newlines
        self.scopes: list[dict[str, str]] = [{}]  # names declared in each open block, with the name that each has in the entry
        self.blocks = 0

    def parse(self) -> None:
        while self.scopes:
            self.at = self._skip_space()
            character = self.text[self.at]
            if character == "{":
                self._open()
            elif character == "}":
                self.scopes.pop()
                self.at += 1
            elif label := LABEL.match(self.text, self.at):
                self.entry.labels[self._named(label[1])] = len(self.entry.code)
                self.at = label.end()
            else:
                self._statement()

    def _skip_space(self) -> int:
        at = self.at
        while self.text[at].isspace() or self.text[at] == ";":
            at += 1
        return at

    def _open(self) -> None:
        """Labels may be used before they are defined, so those of a block are named when it opens."""
        self.blocks += 1
        depth, end = 1, self.at + 1
        while depth:
            depth += {"{": 1, "}": -1}.get(self.text[end], 0)
            end += 1
        labels = re.findall(r"(?:^|[;{}\n])\s*([\w$]+)\s*:(?!:)", self.text[self.at : end])
        self.scopes.append({name: f"{name}@{self.blocks}" for name in labels})
        self.at += 1

    def _named(self, name: str) -> str:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        return name

    def _statement(self) -> None:
        line = bisect.bisect(self.newlines, self.at) + 1
        if self.text.startswith((".loc", ".pragma"), self.at):  # the first has no semicolon
            self.at = self.text.index("\n", self.at)
            return
        end = self.text.index(";", self.at)
        text = " ".join(self.text[self.at : end].split())
        self.at = end + 1
        if text.startswith(".reg"):
            self._registers(text)
        elif text.startswith(".shared"):
            self._shared(text, line)
        elif text.startswith("."):
            raise UnsupportedError(f"line {line}: directive '{text}'")
        else:
            self.entry.code.append(self._instruction(text, line))

    def _registers(self, text: str) -> None:
        _, kind, names = text.split(maxsplit=2)
        for name in (each.strip() for each in names.split(",")):
            many = re.fullmatch(r"(.*)<(\d+)>", name)
            for each in [f"{many[1]}{index}" for index in range(int(many[2]))] if many else [name]:
                inner = f"{each}@{self.blocks}" if len(self.scopes) > 1 else each
                self.scopes[-1][each] = inner
                self.entry.registers[inner] = kind.lstrip(".")

    def _shared(self, text: str, line: int) -> None:
        found = re.fullmatch(r"\.shared(?: \.align (\d+))? \.b8 ([\w$]+)\[(\d+)\]", text)
        if found is None:
            raise UnsupportedError(f"line {line}: directive '{text}'")
        self.entry.shared[found[2]] = align(self.entry.shared_bytes, int(found[1] or 1))
        self.entry.shared_bytes = self.entry.shared[found[2]] + int(found[3])

    def _instruction(self, text: str, line: int) -> Instruction:
        found = re.fullmatch(r"(?:@(!?)(\S+) )?([a-z][\w.:]*)(?: (.*))?", text)
        if found is None:
            raise UnsupportedError(f"line {line}: statement '{text}'")
        name, *modifiers = found[3].split(".")
        operands = tuple(self._operand(each, line) for each in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", found[4] or ""))
        return Instruction(line, text, self._named(found[2] or ""), bool(found[1]), name, tuple(modifiers), operands)

    def _operand(self, text: str, line: int) -> Operand:
        text = text.strip()
        if text.startswith("{"):
            return tuple(self._named(each.strip()) for each in text.strip("{}").split(","))
        if not text.startswith("["):
            return "|".join(self._named(each.strip()) for each in text.split("|"))
        found = re.fullmatch(r"\[\s*([\w$%]*)\s*(?:\+?\s*(-?\d+))?\s*\]", text)
        if found is None:
            raise UnsupportedError(f"line {line}: address '{text}'")
        base, offset = found[1], int(found[2] or 0)
        return Address("", int(base) + offset) if base.isdigit() else Address(self._named(base), offset)
