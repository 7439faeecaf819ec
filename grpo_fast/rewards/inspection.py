"""What a reward uses: the values that its code names, and the texts in them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from functools import partial
from types import CodeType
from typing import Any

__all__ = ["texts_used", "values_used"]

DEPTH = 3  # of functions that call functions


def values_used(reward: Any) -> Iterator[tuple[str, Any]]:
    """Names and values that a reward uses.

    They are the globals and the enclosing variables that the function and the functions it names use, their constants, the arguments of a
    `functools.partial`, and the attributes of a reward object.
    """
    yield from _used(reward, DEPTH, set())


def texts_used(reward: Any) -> set[str]:
    """The texts and regular expressions that a reward uses, without docstrings.

    Example:
        >>> texts_used(lambda completions: ["<think>" in text for text in completions])
        {'<think>'}
    """
    found = set()
    for _, value in values_used(reward):
        for each in value if isinstance(value, (list, tuple, set, frozenset)) else (value,):
            text = each.pattern if isinstance(each, re.Pattern) else each
            if isinstance(text, str):
                found.add(text)
    return found


def _used(value: Any, depth: int, seen: set[int]) -> Iterator[tuple[str, Any]]:
    if depth == 0 or id(value) in seen:
        return
    seen.add(id(value))
    found: dict[str, Any] = {}
    if isinstance(value, partial):
        found = {"the function": value.func} | {f"argument {i}": each for i, each in enumerate(value.args)} | value.keywords
    elif inspect.ismethod(value):
        found = {"__self__": value.__self__, "__func__": value.__func__}
    elif inspect.isfunction(value):
        variables = inspect.getclosurevars(value)
        found = {**variables.globals, **variables.nonlocals}
        yield from (("a constant", each) for each in _constants(value.__code__) if each != value.__doc__)
    elif not inspect.isclass(value) and not inspect.ismodule(value):
        found = dict(getattr(value, "__dict__", {}))
        call = getattr(type(value), "__call__", None)  # noqa: B004
        if inspect.isfunction(call):
            found["__call__"] = call
    for name, each in found.items():
        yield name, each
        yield from _used(each, depth - 1, seen)


def _constants(code: CodeType) -> Iterator[object]:
    for each in code.co_consts:
        if isinstance(each, CodeType):
            yield from _constants(each)
        else:
            yield each
