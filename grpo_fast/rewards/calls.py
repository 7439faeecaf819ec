"""One call of a reward function: what it takes, what it returns, and running it in a background thread."""

from __future__ import annotations

import inspect
import threading
import time
import weakref
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from queue import SimpleQueue
from typing import Any, NamedTuple

import torch

from grpo_fast.rewards.common import Reward
from grpo_fast.rewards.event_loop import run_async
from grpo_fast.rewards.pool import CallResult

__all__ = [
    "BackgroundCall",
    "CallThread",
    "RewardCall",
    "RewardValues",
    "Signature",
    "attempt",
    "copy_containers",
    "describe_error",
    "is_async",
]


class RewardValues(NamedTuple):
    """The result of a call of a reward function."""

    values: object  # as returned by the function; RewardRunner checks it
    counters: dict[str, int]  # by how much the reward's own counters grew
    seconds: float


class RewardCall:
    """A reward function as a picklable function of one argument, its keyword arguments, for a thread or a worker process."""

    def __init__(self, reward: Reward) -> None:
        self.reward = reward

    def __call__(self, keywords: dict[str, object]) -> RewardValues:
        counters = getattr(self.reward, "counters", None)
        before = Counter(counters) if isinstance(counters, Counter) else Counter()
        begin = time.perf_counter()
        with torch.no_grad():  # a setting of each thread: that of the caller does not apply here
            values: Any = self.reward(**keywords)
            if inspect.isawaitable(values):
                values = run_async(_await(values))
        grown = Counter(counters) - before if isinstance(counters, Counter) else Counter()
        return RewardValues(values, dict(grown), time.perf_counter() - begin)


class BackgroundCall:
    """A call in a daemon thread, whose result can be waited for with a time limit."""

    def __init__(self, call: Callable[[], object]) -> None:
        self._result: CallResult | None = None
        reference = weakref.ref(self)  # a call that is no longer waited for must not keep its result alive

        def run() -> None:
            result = attempt(call, interrupts=True)
            if (background := reference()) is not None:
                background._result = result

        self.thread = threading.Thread(target=run, daemon=True, name="grpo_fast reward")
        self.thread.start()

    def result(self, timeout: float | None) -> CallResult | None:
        """Wait for the result; None if it is not there after ``timeout`` seconds."""
        self.thread.join(timeout)
        return self._result


class CallThread:
    """A daemon thread that makes one call after the other."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[_PendingCall | None] = SimpleQueue()
        self.thread = threading.Thread(target=_serve, args=(self._calls,), daemon=True, name="grpo_fast rewards")
        self.thread.start()
        weakref.finalize(self, self._calls.put, None)

    def call(self, call: Callable[[], object], timeout: float) -> CallResult | None:
        """Make a call in the thread and wait for its result; None if it is not there after ``timeout`` seconds."""
        pending = _PendingCall(call)
        self._calls.put(pending)
        pending.done.wait(timeout)
        return pending.result

    def close(self) -> None:
        """End the thread after the call that it is making."""
        self._calls.put(None)


class _PendingCall:
    def __init__(self, call: Callable[[], object]) -> None:
        self.function, self.done = call, threading.Event()
        self.result: CallResult | None = None


def _serve(calls: SimpleQueue[_PendingCall | None]) -> None:
    while (pending := calls.get()) is not None:
        pending.result = attempt(pending.function, interrupts=True)
        pending.done.set()
        del pending  # a call that is no longer waited for must not keep its result alive


class Signature(NamedTuple):
    """Which keyword arguments a reward function takes."""

    names: frozenset[str]
    required: tuple[str, ...]
    takes_any: bool  # it has **kwargs, or its parameters cannot be inspected
    positional: tuple[str, ...] = ()  # parameters without a default that cannot be passed by name
    bound: str | None = None  # name of the parameter that a method is bound to: no column of that name can be passed

    @classmethod
    def of(cls, reward: Reward) -> Signature:
        """Inspect a reward function."""
        try:
            parameters = inspect.signature(reward).parameters.values()
        except (TypeError, ValueError):
            return cls(frozenset(), (), True)
        by_name = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        required = tuple(p.name for p in by_name if p.default is p.empty)
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
        positional = tuple(p.name for p in parameters if p.kind is p.POSITIONAL_ONLY and p.default is p.empty)
        return cls(frozenset(p.name for p in by_name), required, takes_any, positional, _bound_name(reward))


def attempt(call: Callable[[], object], *, interrupts: bool = False) -> CallResult:
    """Call and return the value, or the error's description with the exception as the value.

    Args:
        call: the function.
        interrupts: catch KeyboardInterrupt too: in another thread it would end that thread, and be lost.
    """
    try:
        return CallResult(value=call())
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and not interrupts:
            raise
        return CallResult(value=error, error=describe_error(error))


def copy_containers(value: Any) -> Any:
    """Copy lists and dictionaries, nested ones too, so that a function that changes its arguments does not change the batch."""
    if isinstance(value, dict):
        return {key: copy_containers(each) for key, each in value.items()}
    if isinstance(value, list):
        return [copy_containers(each) for each in value] if value and isinstance(value[0], (list, dict)) else list(value)
    return value


def describe_error(error: BaseException) -> str:
    """The type and the message of an exception."""
    return f"{type(error).__name__}: {error}"


def is_async(reward: Reward) -> bool:
    """Whether a reward function, or the ``__call__`` of a reward object, is a coroutine function."""
    return inspect.iscoroutinefunction(reward) or inspect.iscoroutinefunction(getattr(reward, "__call__", None))  # noqa: B004


def _bound_name(reward: object) -> str | None:
    method = reward if inspect.ismethod(reward) else getattr(type(reward), "__call__", None)  # noqa: B004
    function = getattr(method, "__func__", method)
    if inspect.isfunction(reward) or not inspect.isfunction(function):
        return None
    first = next(iter(inspect.signature(function).parameters.values()), None)
    return first.name if first is not None and first.kind is first.POSITIONAL_OR_KEYWORD else None


async def _await(values: Awaitable[Sequence[float | None]]) -> Sequence[float | None]:
    return await values
