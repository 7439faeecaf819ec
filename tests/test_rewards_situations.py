"""Reward functions as users write them: async ones with state, odd column names, signals under a time limit, the end of the process."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from grpo_fast.rewards import RewardError, RewardRunner
from grpo_fast.rewards.event_loop import run_async

BATCH: dict[str, Any] = {"prompts": ["p", "p"], "completions": ["a", "b"], "completion_ids": [[1], [2]]}


@pytest.mark.parametrize("timeout", [None, 60.0])
def test_async_rewards_share_one_loop_from_batch_to_batch(timeout: float | None) -> None:
    lock, queue, loops = asyncio.Lock(), asyncio.Queue(), set()  # type: ignore[var-annotated]

    async def contended(completions, **columns):  # type: ignore[no-untyped-def]
        loops.add(asyncio.get_running_loop())

        async def one(text):  # type: ignore[no-untyped-def]
            async with lock:  # contended, so that it binds itself to the loop
                await asyncio.sleep(0.001)
            return float(len(text))

        found = await asyncio.gather(*map(one, completions))
        reader = asyncio.ensure_future(queue.get())
        await asyncio.sleep(0)
        await queue.put(1)
        await reader
        return list(found)

    def returns_awaitable(completions, **columns):  # type: ignore[no-untyped-def]
        return contended(completions)

    for _ in range(3):
        for rewards in ([contended], [returns_awaitable]):
            assert RewardRunner(rewards, timeout=timeout)(**BATCH).values.tolist() == [[1.0], [1.0]]
    assert len(loops) == 1


def test_sys_exit_in_an_async_reward_is_reported_and_the_loop_goes_on() -> None:
    async def leaves(completions):  # type: ignore[no-untyped-def]
        sys.exit(3)

    async def leaves_in_a_task(completions):  # type: ignore[no-untyped-def]
        await asyncio.gather(leaves(completions))

    def returns_such_an_awaitable(completions):  # type: ignore[no-untyped-def]
        return leaves_in_a_task(completions)

    async def fine(completions):  # type: ignore[no-untyped-def]
        return [1.0, 2.0]

    def returns_awaitable(completions):  # type: ignore[no-untyped-def]
        return leaves(completions)

    for reward in (leaves, returns_awaitable):
        with pytest.raises(RewardError, match="failed: SystemExit: 3"):
            RewardRunner(reward)(**BATCH)
        assert RewardRunner(fine)(**BATCH).values.tolist() == [[1.0], [2.0]]
    with pytest.raises((RewardError, RuntimeError), match="event loop of the async rewards has ended"):
        RewardRunner(returns_such_an_awaitable)(**BATCH)
    assert run_async(asyncio.sleep(0, "again")) == "again"


def test_a_blocked_loop_is_replaced() -> None:
    async def blocks(completions):  # type: ignore[no-untyped-def]
        time.sleep(3.0)
        return [0.0, 0.0]

    async def fine(completions):  # type: ignore[no-untyped-def]
        return [1.0, 2.0]

    with pytest.raises(RewardError, match="blocked the event loop"):
        RewardRunner(blocks, timeout=0.2)(**BATCH)
    assert RewardRunner(fine, timeout=60)(**BATCH).values.tolist() == [[1.0], [2.0]]


@pytest.mark.parametrize("column", ["self", "where", "name", "keywords", "reward", "call", "timeout", "cls", "lists"])
def test_columns_may_be_called_like_our_parameters(column: str) -> None:
    def reads(completions, **columns):  # type: ignore[no-untyped-def]
        return columns[column]

    class Judge:
        __name__ = "judge"

        def __call__(self, completions, **columns):  # type: ignore[no-untyped-def]
            return [float(column in columns)] * len(completions)

    columns: dict[str, Any] = {column: [3.0, 4.0]}
    bound = float(column != "self")  # **kwargs of a method cannot hold its own self
    assert RewardRunner([reads, Judge()])(**BATCH, **columns).values.tolist() == [[3.0, bound], [4.0, bound]]
    assert RewardRunner(["format", "repetition"])(**BATCH, **columns).values.shape == (2, 2)


def test_a_reward_that_uses_signals_is_refused_under_a_time_limit() -> None:
    def alarmed(completions):  # type: ignore[no-untyped-def]
        try:
            before = signal.signal(signal.SIGALRM, signal.SIG_IGN)
        except ValueError:
            return [0.0, 0.0]  # what a user's try/except makes of it
        signal.signal(signal.SIGALRM, before)
        return [1.0, 1.0]

    assert RewardRunner(alarmed)(**BATCH).values.tolist() == [[1.0], [1.0]]
    original = signal.signal
    with pytest.raises(RewardError, match=r"'alarmed' failed: it sets signal handlers .*isolation='process'"):
        RewardRunner(alarmed, timeout=60)(**BATCH)
    assert signal.signal is original


def test_log_extra_of_a_wrong_length_is_named(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="the trainer is transformers'")
    import trainer_cases as cases

    def judge(completions, log_extra, **columns):  # type: ignore[no-untyped-def]
        log_extra("verdict", ["good"])
        return [0.0] * len(completions)

    run = cases.trainer(tmp_path, rewards=judge, sampler=cases.Scripted(), report_to=[])
    with pytest.raises(RewardError, match=r"log_extra\('verdict', \.\.\.\) was given 1 values for 16 completions"):
        run.train()
