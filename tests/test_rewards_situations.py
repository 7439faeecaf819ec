"""Reward functions as users write them: async ones with state, odd column names, signals under a time limit, the end of the process."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import sqlite3
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from decimal import Decimal
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hang import HANG

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
    for reward in (returns_such_an_awaitable, leaves_in_a_task):
        with pytest.raises((RewardError, RuntimeError), match="event loop of the async rewards has ended"):
            RewardRunner(reward)(**BATCH)
    assert run_async(asyncio.sleep(0, "again")) == "again"


def test_a_blocked_loop_is_replaced() -> None:
    async def blocks(completions):  # type: ignore[no-untyped-def]
        time.sleep(3.0)
        return [0.0, 0.0]

    async def fine(completions):  # type: ignore[no-untyped-def]
        return [1.0, 2.0]

    with pytest.raises(RewardError, match="blocked the event loop"):
        RewardRunner(blocks, timeout=0.2)(**BATCH)
    assert RewardRunner(fine, timeout=HANG)(**BATCH).values.tolist() == [[1.0], [2.0]]


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
        RewardRunner(alarmed, timeout=HANG)(**BATCH)
    assert signal.signal is original


def test_a_captured_function_and_an_alarm_are_noticed_too() -> None:
    captured = signal.signal

    def from_signal_import_signal(completions):  # type: ignore[no-untyped-def]
        with suppress(ValueError):
            captured(signal.SIGALRM, captured(signal.SIGALRM, signal.SIG_IGN))
        return [0.0, 0.0]

    def alarmed(completions):  # type: ignore[no-untyped-def]
        with suppress(ValueError):
            signal.alarm(0)
        return [0.0, 0.0]

    async def asynchronous(completions):  # type: ignore[no-untyped-def]
        return from_signal_import_signal(completions)

    for reward in (from_signal_import_signal, alarmed):
        assert RewardRunner(reward)(**BATCH).values.tolist() == [[0.0], [0.0]]
        with pytest.raises(RewardError, match=f"{reward.__name__!r} failed: it sets signal handlers .*isolation='process'"):
            RewardRunner(reward, timeout=HANG)(**BATCH)
    with pytest.raises(RewardError, match=r"'asynchronous' failed: it sets signal handlers .* Fix: a function that is not async"):
        RewardRunner(asynchronous)(**BATCH)
    assert signal.alarm.__module__ == "_signal"  # as it was


def test_signals_in_a_thread_of_the_reward_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    def pooled(completions):  # type: ignore[no-untyped-def]
        with ThreadPoolExecutor(1) as pool, suppress(ValueError):
            pool.submit(signal.signal, signal.SIGALRM, signal.SIG_IGN).result()
        return [0.0, 0.0]

    runner = RewardRunner(pooled)
    for _ in range(2):
        runner(**BATCH)
    assert caplog.text.count("One of the rewards pooled sets signal handlers or alarms in a thread that it started") == 1


class Ends(BaseException):
    """Like the exceptions that end a program."""


@pytest.mark.parametrize("end", [Ends("over"), asyncio.CancelledError("over"), GeneratorExit("over")], ids=lambda end: type(end).__name__)
def test_what_is_no_exception_is_reported(end: BaseException) -> None:
    def raises(completions):  # type: ignore[no-untyped-def]
        raise end

    async def raises_async(completions):  # type: ignore[no-untyped-def]
        raise end

    for reward, timeout in itertools.product((raises, raises_async), (None, 60.0)):
        with pytest.raises(RewardError, match=rf"reward '{reward.__name__}' failed: {type(end).__name__}: over"):
            RewardRunner(reward, timeout=timeout)(**BATCH)


def test_an_interrupt_reaches_the_caller_under_a_time_limit() -> None:
    def interrupted(completions):  # type: ignore[no-untyped-def]
        raise KeyboardInterrupt

    async def interrupted_async(completions):  # type: ignore[no-untyped-def]
        raise KeyboardInterrupt

    for reward in (interrupted, interrupted_async):
        with pytest.raises(KeyboardInterrupt):
            RewardRunner(reward, timeout=HANG, on_error="not_applicable")(**BATCH)


def test_os_exit_is_reported_and_children_may_call_it() -> None:
    def leaves(completions):  # type: ignore[no-untyped-def]
        child = os.fork()
        if child == 0:
            os._exit(5)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os._exit(status)

    for timeout in (None, 60.0):
        with pytest.raises(RewardError, match=r"'leaves' failed: ProcessExit: it called os._exit\(5\)"):
            RewardRunner(leaves, timeout=timeout)(**BATCH)


def test_sqlite_handles_under_a_time_limit() -> None:
    handle = sqlite3.connect(":memory:")
    shared = sqlite3.connect(":memory:", check_same_thread=False)
    opened: list[sqlite3.Connection] = []

    def ask(of: sqlite3.Connection) -> float:
        return float(of.execute("select 1").fetchone()[0])

    def reads(completions):  # type: ignore[no-untyped-def]
        with suppress(sqlite3.Error):
            return [ask(handle)] * 2
        return [0.0, 0.0]

    def takes(completions, of):  # type: ignore[no-untyped-def]
        return [ask(of)] * 2

    async def reads_async(completions):  # type: ignore[no-untyped-def]
        return reads(completions)

    class Reader:
        def __init__(self) -> None:
            self.cursor = handle.cursor()

        def __call__(self, completions, **columns):  # type: ignore[no-untyped-def]
            return [float(self.cursor.execute("select 1").fetchone()[0])] * 2

    def reads_shared(completions):  # type: ignore[no-untyped-def]
        return [ask(shared)] * 2

    def opens_it_once(completions):  # type: ignore[no-untyped-def]
        if not opened:
            opened.append(sqlite3.connect(":memory:"))
        return [ask(opened[0])] * 2

    for reward, name in ((reads, "handle"), (Reader(), "cursor"), (partial(takes, of=handle), "of")):
        assert RewardRunner(reward)(**BATCH).values.tolist() == [[1.0], [1.0]]
        with pytest.raises(ValueError, match=f"uses '{name}', a handle of sqlite3 .* check_same_thread=False"):
            RewardRunner(reward, timeout=HANG)
    with pytest.raises(ValueError, match=r"'reads_async' uses 'handle', .* async rewards run in another"):
        RewardRunner(reads_async)
    runner = RewardRunner([reads_shared, opens_it_once], timeout=HANG)
    for _ in range(2):  # in the same thread, in which it was opened
        assert runner(**BATCH).values.tolist() == [[1.0, 1.0], [1.0, 1.0]]
    with pytest.raises(RewardError, match=r"ProgrammingError: SQLite objects .*check_same_thread=False"):
        RewardRunner(lambda completions: [ask(opened[0])] * 2, timeout=HANG)(**BATCH)


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        (lambda prompts, completions, /, **columns: [], "positional-only parameters prompts, completions; expected"),
        (lambda *args: [], "has no parameters with names; expected"),
        (Ends, r"is the class Ends; expected a function. Fix: Ends\(\.\.\.\)"),
    ],
)
def test_what_cannot_be_called_by_name_is_refused_before(reward: Any, words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        RewardRunner(reward)


def test_log_extra_of_a_wrong_length_is_named(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="the trainer is transformers'")
    import trainer_cases as cases

    def judge(completions, log_extra, **columns):  # type: ignore[no-untyped-def]
        log_extra("verdict", ["good"])
        return [0.0] * len(completions)

    run = cases.trainer(tmp_path, rewards=judge, sampler=cases.Scripted(), report_to=[])
    with pytest.raises(RewardError, match=r"log_extra\('verdict', \.\.\.\) was given 1 values for 16 completions"):
        run.train()


@pytest.mark.parametrize(
    ("log", "words"),
    [
        (lambda log_metric, log_extra: log_metric("reward", 1.0), "'reward', which is a metric of the trainer; expected another"),
        (lambda log_metric, log_extra: log_metric("rewards/judge/mean", 1.0), "which is a metric of the trainer"),
        (lambda log_metric, log_extra: log_metric("mine", None), "the value of 'mine' is a NoneType; expected one number"),
        (lambda log_metric, log_extra: log_metric("mine", [1.0, 2.0]), "the value of 'mine' is a list; expected one number"),
        (lambda log_metric, log_extra: log_extra("verdict", 3), "the values of 'verdict' are a int; expected a list"),
        (lambda log_metric, log_extra: log_extra("verdict", "ab"), "the values of 'verdict' are a str; expected a list"),
        (lambda log_metric, log_extra: log_extra(3, ["a", "b"]), r"column is 3 \(int\); expected a text"),
    ],
)
def test_what_cannot_be_logged_names_the_reward(log: Any, words: str) -> None:
    pytest.importorskip("transformers", reason="the trainer is transformers'")
    from grpo_fast.trainer.metrics import MetricAccumulator
    from grpo_fast.trainer.reward_log import RewardLog

    def judge(completions, log_metric, log_extra):  # type: ignore[no-untyped-def]
        log(log_metric, log_extra)
        return [0.0] * len(completions)

    logger = RewardLog(MetricAccumulator(), 2)
    with pytest.raises(RewardError, match=f"reward 'judge' failed: .*{words}"):
        RewardRunner(judge)(**BATCH, extras={"log_metric": logger.log_metric, "log_extra": logger.log_extra})


def test_numbers_and_tensors_are_logged() -> None:
    pytest.importorskip("transformers", reason="the trainer is transformers'")
    from grpo_fast.trainer.metrics import MetricAccumulator
    from grpo_fast.trainer.reward_log import RewardLog

    log = RewardLog(MetricAccumulator(), 2)
    for value in (1, torch.tensor(2.0), np.float32(6)):
        log.log_metric("my/reward", value)
    log.log_extra("score", torch.tensor([1.0, 2.0]))
    assert log.metrics._sums == {"my/reward": (9.0, 3.0)}
    assert log.rows() == [{"score": 1.0}, {"score": 2.0}]


@pytest.mark.parametrize(("broken", "words"), [([], "without tokens"), (None, "that is a NoneType")])
def test_a_completion_without_tokens_is_named(broken: list[int] | None, words: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="the trainer is transformers'")
    import trainer_cases as cases

    from grpo_fast.generation import Completion, SamplerError

    class Broken(cases.Scripted):
        def generate(self, prompts: Any, params: Any) -> list[Completion]:
            found: list[Any] = super().generate(prompts, params)
            found[5] = None if broken is None else Completion(broken, True)
            return found

    run = cases.trainer(tmp_path, sampler=Broken(), report_to=[])
    with pytest.raises(SamplerError, match=rf"a completion {words} for prompt 5, 'sort \d+='; expected a Completion with at least one"):
        run.train()


def test_other_kinds_of_numbers() -> None:
    def exact(completions):  # type: ignore[no-untyped-def]
        return [Decimal("0.5"), Fraction(1, 4)]

    assert RewardRunner(exact)(**BATCH).values.tolist() == [[0.5], [0.25]]
