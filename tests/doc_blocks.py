"""The code blocks of the documentation: which there are, and which of them a test runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PAGES = {path.name: path for path in (ROOT / "docs").glob("*.md")} | {name: ROOT / name for name in ("README.md", "CONTRIBUTING.md")}
PAGES["kernels.md"] = ROOT / "kernels" / "README.md"
NOT_CODE = {"text", "bibtex"}  # what a program prints, formulas, a citation

_BLOCK = re.compile(r"^(?:<!-- not run: (?P<why>[^\n]+?) -->\n+)?```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S)


class Block(NamedTuple):
    """A fenced block. A block that no test can run has a comment in the line above: ``<!-- not run: why -->``."""

    language: str  # empty if it names none
    code: str
    why_not_run: str | None


def all_blocks(page: str) -> list[Block]:
    """The blocks of a page of code, commands or settings, in their order."""
    found = (Block(each["language"], each["code"], each["why"]) for each in _BLOCK.finditer(PAGES[page].read_text()))
    return [block for block in found if block.language not in NOT_CODE]


def blocks(page: str, language: str = "python") -> list[str]:
    """The blocks that a test has to run."""
    return [block.code for block in all_blocks(page) if block.language == language and block.why_not_run is None]
