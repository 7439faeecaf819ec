"""The page on troubleshooting: every error message and warning of the package that says how to fix it, read from the sources."""

from __future__ import annotations

import ast
import functools
import html
import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

__all__ = ["Message", "messages", "page"]

_FIX = re.compile(r"\bFix( [a-z ]+)?: ")
_TOPICS = {  # folder, or its module: heading
    "loss": "Loss",
    "head": "Fused head",
    "models": "Models and their heads",
    "ops": "Backends and the extension",
    "utils": "Files and packages",
    "trainer": "Trainer",
    "rewards": "Rewards",
    "generation": "Samplers",
    "data": "Data and tasks",
    "integrations": "Other libraries",
    "cli": "Command line",
    "study": "Temperature study",
    "demo": "Demonstration",
    "benchmark": "Benchmarks",
}


class Message(NamedTuple):
    """An error message: what is wrong, and its fix. Values that are known only when it is raised are written as `…`."""

    problem: str
    fix: str
    module: str  # grpo_fast.loss.checks
    error: str  # the class that is raised, empty if it is not certain


@functools.lru_cache
def messages(package: Path) -> tuple[Message, ...]:
    """All messages with a fix, in the order of modules and lines."""
    found = []
    for source in sorted(package.rglob("*.py")):
        if package / "kernels" in source.parents:
            continue
        tree = ast.parse(source.read_text())
        module = ".".join((package.name, *source.relative_to(package).with_suffix("").parts)).removesuffix(".__init__")
        for text, error in _texts(tree):
            parts = _FIX.split(text, maxsplit=1)
            if len(parts) > 1 and (problem := _tidy(parts[0])) and _tidy(parts[-1]):
                found.append(Message(problem, _tidy(parts[-1]), module, error))
    return tuple(dict.fromkeys(found))


def page(package: Path) -> str:
    """The Markdown of the page."""
    topics: dict[str, list[Message]] = defaultdict(list)
    for message in messages(package):
        topics[message.module.split(".")[1]].append(message)
    lines = [
        "# Troubleshooting",
        "",
        "Every error message and warning of grpo_fast that has a fix. Search for a part of what you read;",
        "`…` stands for a value of your run.",
        "`grpo-fast doctor` shows what works on a machine, what does not, and how to fix it.",
        "",
    ]
    for folder in (*_TOPICS, *sorted(topics.keys() - _TOPICS.keys())):
        if folder in topics:
            lines += [f"## {_TOPICS.get(folder, folder)}", ""]
            for message in topics[folder]:
                lines += _entry(message)
    return "\n".join(lines) + "\n"


def _entry(message: Message) -> list[str]:
    error = f"<code>{message.error}</code>: " if message.error else ""
    return [
        '<div class="message" markdown="0">',
        f"<p>{error}{html.escape(message.problem)}</p>",
        f"<p><strong>Fix:</strong> {html.escape(message.fix)}</p>",
        "</div>",
        "",
    ]


def _texts(tree: ast.AST) -> list[tuple[str, str]]:
    """The texts that a module puts together, without docstrings, each with the error it is raised as."""
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    found: list[tuple[str, str]] = []

    def visit(node: ast.AST, error: str) -> None:
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            error = ast.unparse(node.exc.func).rpartition(".")[2]
        text = _text(node)
        if text is not None:
            if id(node) not in docstrings:
                found.append((text, error if error[:1].isupper() and error.isidentifier() else ""))
            return
        for child in ast.iter_child_nodes(node):
            visit(child, error)

    visit(tree, "")
    return found


def _text(node: ast.AST) -> str | None:
    """The text of a string, an f-string or a sum with one, with `…` for what is computed; None for another expression."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) or "…" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = _text(node.left), _text(node.right)
        return None if left is None and right is None else (left or "…") + (right or "…")
    return None


def _tidy(text: str) -> str:
    return " ".join(text.split()).strip(" ;")
