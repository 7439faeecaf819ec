"""What a worker of `mathematics` runs: one comparison by math-verify. Loaded by its path, so that no worker imports torch."""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of what is wanted here: no time limit of its own

_TARGETS = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
_MARKED = re.compile(r"\$|\\\(|\\\[|\\boxed")  # says itself where its mathematics is
_PROSE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}")
_WORDS = re.compile(r"[A-Za-z][A-Za-z .,'-]*")


def check(item: tuple[str, str | None, bool]) -> bool | None:
    """Is what was ``stated`` equal to ``truth``? None if the truth is no mathematics. ``whole``: look for it in a whole text."""
    truth, stated, whole = item
    if _WORDS.fullmatch(truth) and _PROSE.search(truth):  # "Paris" would be the product p a r i s, and equal to "pairs"
        return stated is not None and stated.split() == truth.split()
    gold = _parse(truth if _MARKED.search(truth) else rf"\boxed{{{truth}}}")
    if not any(not isinstance(form, str) for form in gold):
        return None
    if stated is None:
        return False
    as_it_is = whole or _MARKED.search(stated) or _PROSE.search(stated)
    answer = parse(stated if as_it_is else rf"\boxed{{{stated}}}", _TARGETS, parsing_timeout=None)
    return bool(verify(gold, answer, timeout_seconds=None))


@lru_cache(maxsize=1024)
def _parse(truth: str) -> list[Any]:
    return parse(truth, _TARGETS, parsing_timeout=None)
