"""The function that a worker process of `mathematics` calls. It is loaded by its path, so that the process does not import torch."""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time limit is off, which is intended: the pool has one

_TARGETS = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
_MARKED = re.compile(r"\$|\\\(|\\\[|\\boxed")  # the text marks where its mathematics is
_PROSE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}")
_WORDS = re.compile(r"[A-Za-z][A-Za-z .,'-]*")


def check(item: tuple[str, str | None, bool]) -> bool | None:
    """Whether the stated answer equals the true one; None if the true answer cannot be parsed.

    Args:
        item: the true answer, the stated answer (None = none), and whether to search a whole text for the stated answer.
    """
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
