"""Whether what this package replaces or relies on in another library is as it was in the newest version that was compared.

Nothing is imported: the library's files are read and parsed. Comments, docstrings and white space do not count. It runs only for a version
that versions.py does not list, and takes a few tenths of a second.

    digests/LIBRARY.json              what was found in the compared version, written by tools/generate_peer_digests.py
    found_parts(distribution, root)   the same for the installed one
    changed_parts(distribution)       the differences, in words
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import io
import json
import tokenize
from dataclasses import dataclass
from pathlib import Path

from grpo_fast.integrations.relied_on import RELIED_ON, SIGNATURE, SOURCE

__all__ = ["DIGESTS", "Part", "changed_parts", "found_parts", "recorded", "source_root"]

DIGESTS = Path(__file__).parent / "digests"
_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.AnnAssign | ast.Assign


@dataclass(frozen=True)
class Part:
    """A function, class or field: its signature (of a field: its annotation) and a digest of its source; missing names of its source."""

    signature: str
    digest: str = ""
    missing: tuple[str, ...] = ()


def changed_parts(distribution: str, root: Path | None = None) -> list[str]:
    """Compare an installed library with the newest version that was compared.

    Args:
        distribution: a key of RELIED_ON.
        root: the folder that holds the library's package; None = where Python would import it from.

    Returns:
        one sentence for each part that is missing or different; empty if all are the same.
    """
    root = root or source_root(distribution)
    if root is None:
        return [f"the files of {distribution} were not found"]
    _, before = recorded(distribution)
    now = found_parts(distribution, root)
    changes = []
    for name, expected in before.items():
        found = now.get(name)
        if found is None:
            changes.append(f"{name} is missing")
        elif found.signature != expected.signature:
            changes.append(f"the signature of {name} is {found.signature}; it was {expected.signature}")
        elif found.missing:
            changes.append(f"{name} no longer has {', '.join(found.missing)}")
        elif found.digest != expected.digest:
            changes.append(f"the source of {name} changed")
    return changes


def recorded(distribution: str) -> tuple[str, dict[str, Part]]:
    """Return the version of a library that was compared last, and its parts, from the generated file."""
    stored = json.loads((DIGESTS / f"{distribution}.json").read_text(encoding="utf-8"))
    return stored["version"], {name: Part(**part) for name, part in stored["parts"].items()}


def source_root(distribution: str) -> Path | None:
    """Return the folder that holds a library's package, without importing it; None if it is not installed."""
    package = next(iter(RELIED_ON[distribution])).partition("/")[0]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations))).parent


def found_parts(distribution: str, root: Path) -> dict[str, Part]:
    """Return the parts of a library that are there, by ``module.name``."""
    found: dict[str, Part] = {}
    for file, names in RELIED_ON[distribution].items():
        path = root / file
        if not path.is_file():
            continue
        content = path.read_bytes()
        lines = content.splitlines(keepends=True)  # of bytes, as columns of a syntax tree are
        definitions = _definitions(ast.parse(content).body)
        module = file.removesuffix(".py").replace("/", ".")
        for name, kind in names.items():
            if name in definitions:
                found[f"{module}.{name}"] = _part(lines, definitions[name], kind)
    return found


def _definitions(body: list[ast.stmt], prefix: str = "") -> dict[str, _Definition]:
    """Functions, classes, methods and fields by their qualified names; also those that stand under an ``if`` or ``try``."""
    found: dict[str, _Definition] = {}
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found[prefix + node.name] = node
        elif isinstance(node, ast.ClassDef):
            found[prefix + node.name] = node
            found |= _definitions(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[prefix + node.target.id] = node
        elif isinstance(node, ast.If | ast.Try):
            found = _definitions([*node.body, *node.orelse], prefix) | found
    return found


def _part(lines: list[bytes], node: _Definition, kind: str | tuple[str, ...]) -> Part:
    signature = _signature(lines, node)
    if kind == SIGNATURE:
        return Part(signature)
    source = _source(lines, node)
    if kind == SOURCE:
        return Part(signature, hashlib.sha256(source.encode()).hexdigest()[:16])
    return Part(signature, missing=tuple(name for name in kind if name not in source))


def _signature(lines: list[bytes], node: _Definition) -> str:
    """Names and defaults of the parameters, without annotations; the annotation of a field; the bases of a class."""
    if isinstance(node, ast.ClassDef):
        return f"({', '.join(_text(lines, base) for base in node.bases)})"
    if isinstance(node, ast.AnnAssign):
        return _text(lines, node.annotation)
    if isinstance(node, ast.Assign):
        return ""
    given = node.args
    positional = [*given.posonlyargs, *given.args]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(given.defaults)) + list(given.defaults)
    parts = [_parameter(lines, *each) for each in zip(positional, defaults, strict=True)]
    if given.posonlyargs:
        parts.insert(len(given.posonlyargs), "/")
    if given.vararg or given.kwonlyargs:
        parts.append(f"*{given.vararg.arg}" if given.vararg else "*")
    parts += [_parameter(lines, *each) for each in zip(given.kwonlyargs, given.kw_defaults, strict=True)]
    if given.kwarg:
        parts.append(f"**{given.kwarg.arg}")
    return f"({', '.join(parts)})"


def _parameter(lines: list[bytes], parameter: ast.arg, default: ast.expr | None) -> str:
    return parameter.arg if default is None else f"{parameter.arg}={_text(lines, default)}"


def _source(lines: list[bytes], node: _Definition) -> str:
    """The source of a definition as words, without docstrings and comments; of a field, its default."""
    if isinstance(node, ast.AnnAssign):
        value = node.value
        if isinstance(value, ast.Call):  # dataclasses.field(default=..., metadata=...): help texts do not matter
            value = next((word.value for word in value.keywords if word.arg in ("default", "default_factory")), value)
        return "" if value is None else _text(lines, value)
    dropped: set[int] = set()
    for inner in ast.walk(node):
        if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and ast.get_docstring(inner, clean=False) is not None:
            docstring = inner.body[0]
            dropped.update(range(docstring.lineno, (docstring.end_lineno or docstring.lineno) + 1))
    first = min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", []))])
    kept = [line for number, line in enumerate(lines[: node.end_lineno], 1) if number >= first and number not in dropped]
    return _words(b"".join(kept).decode())


def _text(lines: list[bytes], node: ast.expr) -> str:
    """The source of an expression. ast.get_source_segment splits the whole file again for each."""
    last = node.end_lineno or node.lineno
    spanned = lines[node.lineno - 1 : last]
    spanned[-1] = spanned[-1][: node.end_col_offset]
    spanned[0] = spanned[0][node.col_offset :]
    return " ".join(b"".join(spanned).decode().split())


def _words(source: str) -> str:
    """Lines without their comments, and white space made one blank: the same text under every version of Python."""
    lines = source.splitlines()
    try:
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT:
                row, column = token.start
                lines[row - 1] = lines[row - 1][:column]
    except (tokenize.TokenError, IndentationError):  # an indented method ends at a lower level: all comments have been seen by then
        pass
    return " ".join("\n".join(lines).split())
