"""Where reward functions run: in threads of this process, or each in a separate worker process."""

from __future__ import annotations

import asyncio
import logging
import pickle
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import cast

from grpo_fast.rewards.calls import BackgroundCall, CallThread, RewardCall, RewardValues, attempt, describe_error, is_async
from grpo_fast.rewards.common import Reward
from grpo_fast.rewards.event_loop import capture_exit, replace_loop, run_async
from grpo_fast.rewards.pool import CallResult, WorkerPool
from grpo_fast.rewards.process_watch import UNKNOWN, attributed_to, watch_process
from grpo_fast.rewards.thread_bound import SQLITE_FIX, is_thread_error

__all__ = ["ProcessExecution", "ThreadExecution"]

MAX_ABANDONED = 4  # hung threads per function; each holds its memory until the program ends
PROCESS_FIX = "isolation='process' (GRPOConfig's reward_isolation)"

logger = logging.getLogger("grpo_fast")


class ThreadExecution:
    """Calls reward functions in this process. Async functions run concurrently in one thread, the others meanwhile one after the other.

    Without a time limit the others run in the caller's thread; with one, all in the same other thread, so that what belongs to a thread
    (``threading.local``, a handle that was opened at the first call) lasts from batch to batch. A function that exceeds ``timeout`` is
    abandoned: a thread cannot be killed, so it goes on in the background, and another thread takes its place.

    Args:
        reward_funcs: R functions.
        names: R names, for messages.
        timeout: seconds for one function and one batch; None = no limit.
    """

    def __init__(self, reward_funcs: Sequence[Reward], names: Sequence[str], timeout: float | None) -> None:
        self.reward_funcs, self.names, self.timeout = reward_funcs, names, timeout
        self.abandoned: list[list[threading.Thread]] = [[] for _ in reward_funcs]
        self._thread: CallThread | None = None
        self._warned = False

    def run(self, keywords: Sequence[dict[str, object]]) -> list[CallResult]:
        """Call each function with its keyword arguments; one result per function, with `RewardValues` as its value.

        Raises:
            RuntimeError: too many abandoned threads of a function are still running.
            KeyboardInterrupt: a function was interrupted, or raised it.
        """
        with watch_process() as seen:
            results = self._run(keywords)
        for result in results:
            if isinstance(result.value, KeyboardInterrupt):
                raise result.value
        if UNKNOWN in seen and not self._warned:
            self._warned = True
            logger.warning(
                "One of the rewards %s sets signal handlers or alarms in a thread that it started. Python allows that in the main thread "
                "only and raises a ValueError; if the reward catches it, its scores are wrong.",
                ", ".join(self.names),
            )
        return [self._signal_error(i) if i in seen else _with_fix(result) for i, result in enumerate(results)]

    def close(self) -> None:
        """End the thread of the calls with a time limit. The next call starts another."""
        if self._thread is not None:
            self._thread.close()
            self._thread = None

    def _run(self, keywords: Sequence[dict[str, object]]) -> list[CallResult]:
        results: dict[int, CallResult] = {}
        asynchronous = [i for i, reward in enumerate(self.reward_funcs) if is_async(reward)]
        self._check_abandoned(asynchronous)
        background = None
        if asynchronous:  # in the shared event loop: the caller may have one running
            background = BackgroundCall(lambda: run_async(self._gather(asynchronous, keywords)))
        for i, reward in enumerate(self.reward_funcs):
            if i not in asynchronous:
                results[i] = self._call(i, partial(_attributed, i, RewardCall(reward), keywords[i]))
        if background is not None:
            # Each coroutine is cancelled at the time limit; one that blocks the event loop holds up all of them.
            result = background.result(None if self.timeout is None else self.timeout + 1.0)
            if result is None:
                self._abandon(asynchronous, background.thread)
                replace_loop()
                results |= dict.fromkeys(asynchronous, self._late("it, or another async reward, blocked the event loop, and"))
            else:
                results |= result.value if result.ok else dict.fromkeys(asynchronous, result)
        return [results[i] for i in range(len(self.reward_funcs))]

    def _call(self, i: int, call: Callable[[], RewardValues]) -> CallResult:
        if self.timeout is None:
            return attempt(call)
        self._check_abandoned([i])
        if self._thread is None or not self._thread.thread.is_alive():  # a forked child has no threads
            self._thread = CallThread()
        result = self._thread.call(call, self.timeout)
        if result is None:
            self._abandon([i], self._thread.thread)
            self.close()
            return self._late("it")
        return result

    def _signal_error(self, i: int) -> CallResult:
        if is_async(self.reward_funcs[i]):
            why, fix = "async rewards share an event loop in another", "a function that is not async"
        elif self.timeout is not None:
            why, fix = "with a time limit it runs in another", f"{PROCESS_FIX}, or no timeout"
        else:
            why, fix = "it runs in another, that of its caller", PROCESS_FIX
        return CallResult(
            error="it sets signal handlers (signal.signal) or alarms, which Python allows in the main thread only; "
            f"{why}, and what it returns cannot be trusted. Fix: {fix}"
        )

    def _late(self, subject: str) -> CallResult:
        return CallResult(
            error=f"{subject} took longer than {self.timeout:g} s and was left behind in its thread, which cannot be killed "
            "(a process can: isolation='process', or GRPOConfig's reward_isolation)",
            timed_out=True,
        )

    def _abandon(self, which: Sequence[int], thread: threading.Thread) -> None:
        for i in which:
            self.abandoned[i].append(thread)

    def _check_abandoned(self, which: Sequence[int]) -> None:
        for i in which:
            self.abandoned[i] = [thread for thread in self.abandoned[i] if thread.is_alive()]
            if len(self.abandoned[i]) >= MAX_ABANDONED:
                raise RuntimeError(
                    f"RewardRunner: {len(self.abandoned[i])} threads of reward {self.names[i]!r} hang and cannot be killed; expected a "
                    "function that ends. Fix: mend it, or isolation='process' (GRPOConfig's reward_isolation), which kills what is late."
                )

    async def _gather(self, which: Sequence[int], keywords: Sequence[dict[str, object]]) -> dict[int, CallResult]:
        async def call(i: int) -> CallResult:
            begin = time.perf_counter()
            try:
                with attributed_to(i):
                    coroutine = capture_exit(cast(Awaitable[object], self.reward_funcs[i](**keywords[i])))
                    values, end = await asyncio.wait_for(coroutine, self.timeout)
            except (asyncio.TimeoutError, TimeoutError) as error:
                if self.timeout is not None and time.perf_counter() - begin >= self.timeout:
                    return CallResult(error=f"it took longer than {self.timeout:g} s and was cancelled", timed_out=True)
                return CallResult(value=error, error=describe_error(error))  # a timeout of the function's own
            except (Exception, asyncio.CancelledError) as error:
                return CallResult(value=error, error=describe_error(error))
            if end is not None:
                return CallResult(value=end, error=describe_error(end))
            return CallResult(value=RewardValues(values, {}, time.perf_counter() - begin))

        return dict(zip(which, await asyncio.gather(*map(call, which)), strict=True))


class ProcessExecution:
    """Calls each reward function in a separate worker process, all at the same time. A late or crashed process is replaced.

    Args:
        reward_funcs: R picklable functions.
        names: R names, for messages.
        timeout: seconds for one function and one batch; None = no limit.
    """

    def __init__(self, reward_funcs: Sequence[Reward], names: Sequence[str], timeout: float | None) -> None:
        self.names, self.timeout = names, timeout
        self.pools = [WorkerPool(RewardCall(reward)) for reward in reward_funcs]

    def run(self, keywords: Sequence[dict[str, object]]) -> list[CallResult]:
        """Call each function with its keyword arguments; one result per function, with `RewardValues` as its value.

        Raises:
            RuntimeError: a worker process could not start or could not load its function.
        """
        waiting = [BackgroundCall(partial(self._call, i, keywords[i])) for i in range(len(self.pools))]
        results = []
        for name, background in zip(self.names, waiting, strict=True):
            result = background.result(None)
            assert result is not None
            if not result.ok:  # the pool itself failed, which no completion caused
                raise RuntimeError(f"RewardRunner: reward {name!r} cannot run in a process: {result.value}") from result.value
            results.append(result.value)
        return results

    def close(self) -> None:
        """End the worker processes. The next call starts new ones."""
        for pool in self.pools:
            pool.close()

    def _call(self, i: int, keywords: dict[str, object]) -> CallResult:
        try:
            return self.pools[i].map([keywords], timeout=self.timeout)[0]
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            return CallResult(error=f"what it is called with cannot be sent to its process: {error}")


def _attributed(index: int, call: RewardCall, keywords: dict[str, object]) -> RewardValues:
    with attributed_to(index):
        return call(keywords)


def _with_fix(result: CallResult) -> CallResult:
    return result._replace(error=f"{result.error} {SQLITE_FIX}, or {PROCESS_FIX}.") if is_thread_error(result.value) else result
