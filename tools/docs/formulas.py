"""Formulas of the pages, written in LaTeX, as MathML: every current browser shows it without scripts and fonts of its own."""

from __future__ import annotations

import html
import re

from latex2mathml.converter import convert

__all__ = ["as_mathml"]

# What pymdownx.arithmatex (generic) writes: <span class="arithmatex">\(x\)</span> and <div class="arithmatex">\[x\]</div>.
_FORMULA = re.compile(r'<(?P<tag>span|div) class="arithmatex">\\(?P<opened>[(\[])(?P<latex>.*?)\\[)\]]</(?P=tag)>', re.S)


def as_mathml(page: str) -> str:
    """The HTML of a page with its formulas as MathML.

    Raises:
        ValueError: a formula cannot be converted.
    """
    return _FORMULA.sub(_converted, page)


def _converted(found: re.Match[str]) -> str:
    latex = html.unescape(found["latex"]).strip()
    try:
        formula = convert(latex, display="block" if found["opened"] == "[" else "inline")
    except Exception as error:
        raise ValueError(f"the formula {latex!r} is not LaTeX that latex2mathml knows. Fix: write it with simpler commands.") from error
    return f'<{found["tag"]} class="formula">{formula}</{found["tag"]}>'
