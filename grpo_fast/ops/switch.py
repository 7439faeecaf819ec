"""A process-wide setting that acts as a statement, in a ``with`` and as a decorator."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Generic, TypeVar

__all__ = ["Switch"]

_Value = TypeVar("_Value")
_Function = TypeVar("_Function", bound=Callable[..., Any])


class Switch(contextlib.ContextDecorator, Generic[_Value]):
    """Base class: a subclass reads and writes the setting.

    The call takes effect immediately. As a statement it holds until the next call; in a ``with`` it holds until the end of the block. As a
    decorator it holds while the function runs. It can be nested.
    """

    def __init__(self, value: _Value) -> None:
        self.value, self._before = value, self.current()
        self.put(value)

    @staticmethod
    def current() -> _Value:
        """Return the value in force."""
        raise NotImplementedError

    @staticmethod
    def put(value: _Value) -> None:
        """Put a value in force."""
        raise NotImplementedError

    def __enter__(self) -> None:
        if self.current() != self.value:  # a decorator enters the context at each call of the function, not when it is created
            self._before = self.current()
            self.put(self.value)

    def __exit__(self, *_: object) -> None:
        self.put(self._before)

    def __call__(self, function: _Function) -> _Function:
        self.put(self._before)  # used as a decorator: not in force until the function is called
        return super().__call__(function)
