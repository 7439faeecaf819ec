"""Where reward functions run: in threads of this process, or each in a separate worker process."""

from __future__ import annotations

import asyncio
import pickle
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import cast

from grpo_fast.rewards.calls import BackgroundCall, RewardCall, RewardValues, attempt, describe_error, is_async
from grpo_fast.rewards.common import Reward
from grpo_fast.rewards.event_loop import replace_loop, run_async
from grpo_fast.rewards.pool import CallResult, WorkerPool
from grpo_fast.rewards.signals import used_signals, watch_signals

__all__ = ["ProcessExecution", "ThreadExecution"]

MAX_ABANDONED = 4  # hung threads per function; each holds its memory until the program ends


class ThreadExecution:
    """Calls reward functions in this process. Async functions run concurrently in one thread, the others meanwhile one after the other.

    A function that exceeds ``timeout`` is abandoned: a thread cannot be killed, so it goes on in the background.

    Args:
        reward_funcs: R functions.
        names: R names, for messages.
        timeout: seconds for one function and one batch; None = no limit.
    """

    def __init__(self, reward_funcs: Sequence[Reward], names: Sequence[str], timeout: float | None) -> None:
        self.reward_funcs, self.names, self.timeout = reward_funcs, names, timeout
        self.abandoned: list[list[threading.Thread]] = [[] for _ in reward_funcs]

    def run(self, keywords: Sequence[dict[str, object]]) -> list[CallResult]:
        """Call each function with its keyword arguments; one result per function, with `RewardValues` as its value.

        Raises:
            RuntimeError: too many abandoned threads of a function are still running.
        """
        results: dict[int, CallResult] = {}
        asynchronous = [i for i, reward in enumerate(self.reward_funcs) if is_async(reward)]
        self._check_abandoned(asynchronous)
        background = None
        if asynchronous:  # in the shared event loop: the caller may have one running
            background = BackgroundCall(lambda: run_async(self._gather(asynchronous, keywords)))
        for i, reward in enumerate(self.reward_funcs):
            if i not in asynchronous:
                results[i] = self._call(i, partial(RewardCall(reward), keywords[i]))
        if background is not None:
            # Each coroutine is cancelled at the time limit; one that blocks the event loop holds up all of them.
            result = background.result(None if self.timeout is None else self.timeout + 1.0)
            if result is None:
                self._abandon(asynchronous, background)
                replace_loop()
                results |= dict.fromkeys(asynchronous, self._late("it, or another async reward, blocked the event loop, and"))
            else:
                results |= result.value
        return [results[i] for i in range(len(self.reward_funcs))]

    def close(self) -> None:
        """Do nothing: threads end by themselves."""

    def _call(self, i: int, call: Callable[[], RewardValues]) -> CallResult:
        if self.timeout is None:
            return attempt(call)
        self._check_abandoned([i])
        with watch_signals():
            background = BackgroundCall(call)
            result = background.result(self.timeout)
        if used_signals(background.thread):
            return CallResult(
                error="it sets signal handlers (signal.signal), which Python allows in the main thread only; with a time limit it runs in "
                "another, and what it returns cannot be trusted. Fix: isolation='process' (GRPOConfig's reward_isolation), or no timeout"
            )
        if result is None:
            self._abandon([i], background)
            return self._late("it")
        return result

    def _late(self, subject: str) -> CallResult:
        return CallResult(
            error=f"{subject} took longer than {self.timeout:g} s and was left behind in its thread, which cannot be killed "
            "(a process can: isolation='process', or GRPOConfig's reward_isolation)",
            timed_out=True,
        )

    def _abandon(self, which: Sequence[int], background: BackgroundCall) -> None:
        for i in which:
            self.abandoned[i].append(background.thread)

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
                coroutine = cast(Awaitable[object], self.reward_funcs[i](**keywords[i]))
                values = await asyncio.wait_for(coroutine, self.timeout)
            except (asyncio.TimeoutError, TimeoutError) as error:
                if self.timeout is not None and time.perf_counter() - begin >= self.timeout:
                    return CallResult(error=f"it took longer than {self.timeout:g} s and was cancelled", timed_out=True)
                return CallResult(value=error, error=describe_error(error))  # a timeout of the function's own
            except (Exception, SystemExit) as error:  # sys.exit would end the shared loop
                return CallResult(value=error, error=describe_error(error))
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
