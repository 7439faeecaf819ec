"""Runs reward functions, whatever they do: raise, hang, return too few values. No reward ever ends up beside another completion."""

from __future__ import annotations

import asyncio
import inspect
import math
import pickle
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_fast.rewards.common import TRAINER_ARGUMENTS, Completion, Reward, check_range, check_same_length, name_of
from grpo_fast.rewards.loading import load_reward
from grpo_fast.rewards.pool import Outcome, WorkerPool

__all__ = ["RewardError", "RewardRunner", "RewardTable", "reward_matrix"]

MAX_ABANDONED = 4  # hung threads of one function: each holds its memory for good
_ALWAYS = ("prompts", "completions", "completion_ids")
_FLOAT32_MAX = torch.finfo(torch.float32).max


class RewardError(ValueError):
    """A reward function did not do what it must; the message names it."""


class RewardTable(NamedTuple):
    """What a `RewardRunner` returns."""

    values: Tensor  # [B, R] float32, on the CPU: NaN where a reward does not apply
    metrics: dict[str, float]  # rewards/<name>/mean, std, applicable, seconds, and timeouts, errors where there were any


class _Called(NamedTuple):
    values: Any
    counters: dict[str, int]  # by how much the reward's own counters grew
    seconds: float


class RewardRunner:
    """Calls reward functions on a batch of completions and returns their values as one table, NaN where one does not apply.

    Each function is called as in TRL, by keyword: ``prompts``, ``completions``, ``completion_ids`` and the data set's columns, lists of the
    same length, of which it gets copies; it returns one number or None per completion. Of the columns and the extras (``trainer_state``,
    ``logprobs``, ...) it gets those it names, or all if it takes ``**kwargs``; a column that it must have and that is missing is an error.
    Async functions run concurrently, beside the others.

    Args:
        reward_funcs: functions, reward objects, or names as `load_reward` takes them.
        weights: one finite number per function, kept as ``weights`` (float32 [R]) for `grpo_fast.group_advantages`; None = all 1.
        timeout: seconds for one function and one batch; None = no limit. With ``isolation="thread"`` a function that is late is left
            behind: a thread cannot be killed, so it goes on in the background, as a daemon, until it ends or the program does. After four
            such threads of one function there are no more.
        on_error: what happens when a function raises, is late, returns no list or one of the wrong length ("raise": a `RewardError` that
            names it; "not_applicable": None for all completions), or returns something that is no finite number ("not_applicable": None for
            that completion). Failures are counted in the metrics either way.
        isolation: "thread": in this process. "process": each function in a worker process of its own, which is killed when it is late and
            replaced, and which may crash. It must be picklable by name: defined in a module, not in the main script or a notebook. Extras
            go there only if it names them.

    Raises:
        ValueError, TypeError: an argument is wrong, or a column is missing or has the wrong length; whatever ``on_error`` says.

    Example:
        >>> def short(completions, **columns):
        ...     return [1.0 if len(c) < 3 else None for c in completions]
        >>> runner = RewardRunner([short, "accuracy"], weights=[0.5, 1.0])
        >>> table = runner(["1 + 1?"] * 2, ["2", "<answer>2</answer>"], [[1], [2]], answer=["2", "2"])
        >>> table.values
        tensor([[1., 0.],
                [nan, 1.]])
        >>> table.metrics["rewards/short/applicable"], table.metrics["rewards/accuracy_reward/mean"]
        (0.5, 0.5)
    """

    def __init__(
        self,
        reward_funcs: Sequence[Reward | str] | Reward | str,
        *,
        weights: Sequence[float] | None = None,
        timeout: float | None = None,
        on_error: str = "raise",
        isolation: str = "thread",
    ) -> None:
        if isinstance(reward_funcs, str) or callable(reward_funcs):
            reward_funcs = [reward_funcs]
        self.reward_funcs = [_loaded(reward) for reward in reward_funcs]
        if not self.reward_funcs:
            raise ValueError("RewardRunner: reward_funcs is empty; expected at least one reward function.")
        self.names = _unique([name_of(reward) for reward in self.reward_funcs])
        self.weights = _checked_weights(weights, self.names)
        if timeout is not None:
            check_range("RewardRunner", "timeout", timeout, 0, above=True, what="seconds, or None for no limit")
        if on_error not in ("raise", "not_applicable"):
            raise ValueError(f"RewardRunner: on_error is {on_error!r}; expected 'raise' or 'not_applicable'.")
        if isolation not in ("thread", "process"):
            raise ValueError(f"RewardRunner: isolation is {isolation!r}; expected 'thread' or 'process'.")
        self.timeout, self.on_error, self.isolation = timeout, on_error, isolation
        self.counters: dict[str, Counter[str]] = {name: Counter() for name in self.names}  # timeouts, errors, ...: since the beginning
        self._takes = [_parameters(reward) for reward in self.reward_funcs]
        self._abandoned: list[list[threading.Thread]] = [[] for _ in self.reward_funcs]
        self._pools: list[WorkerPool] = []
        if isolation == "process":
            for name, reward, takes in zip(self.names, self.reward_funcs, self._takes, strict=True):
                _check_picklable(name, reward)
                if here := sorted({"log_extra", "log_metric"} & takes.names):
                    raise ValueError(
                        f"RewardRunner: reward {name!r} takes {' and '.join(here)}, which is of the trainer's process; expected "
                        "isolation='thread' (GRPOConfig's reward_isolation) for it."
                    )
                self._pools.append(WorkerPool(_Call(reward)))

    def close(self) -> None:
        """End the worker processes, if there are any. Not needed at the end of the program."""
        for pool in self._pools:
            pool.close()

    def __call__(
        self,
        prompts: Sequence[Completion],
        completions: Sequence[Completion],
        completion_ids: Sequence[Sequence[int]],
        *,
        extras: Mapping[str, Any] | None = None,
        **columns: Sequence[Any],
    ) -> RewardTable:
        """Score B completions.

        Args:
            prompts: B strings or lists of chat messages; each prompt repeated once per completion of its group.
            completions: B strings or lists of chat messages.
            completion_ids: B lists of token ids.
            extras: what is no column: ``trainer_state``, ``log_metric``, the tokens' ``logprobs`` and ``ref_logprobs`` ([B, T]), ...
            columns: the data set's other columns, B values each.
        """
        extras = dict(extras or {})
        check_same_length("RewardRunner", prompts=prompts, completions=completions, completion_ids=completion_ids, **columns)
        twice = sorted((set(extras) & set(columns)) | (set(extras) & set(_ALWAYS)))
        if twice:
            raise ValueError(f"RewardRunner: {', '.join(twice)} is given twice, also in extras; expected once. Cure: rename the column.")
        given = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids, **columns}
        keywords = [self._keywords(i, given, extras) for i in range(len(self.names))]  # all are checked before the first is called

        outcomes = self._in_processes(keywords) if self._pools else self._in_threads(keywords)
        table = torch.empty(len(prompts), len(self.names), dtype=torch.float32)
        metrics: dict[str, float] = {}
        for i, (name, outcome) in enumerate(zip(self.names, outcomes, strict=True)):
            counts: Counter[str] = Counter()
            column = self._column(name, outcome, len(prompts), counts)
            table[:, i] = torch.tensor(column, dtype=torch.float32)
            self.counters[name] += counts
            metrics |= _metrics(f"rewards/{name}", [value for value in column if not math.isnan(value)], len(prompts), counts)
            if outcome.ok:
                metrics[f"rewards/{name}/seconds"] = outcome.value.seconds
        return RewardTable(table, metrics)

    def reads(self, name: str) -> bool:
        """Whether a reward function has a parameter of this name."""
        return any(name in _parameters(reward).names for reward in self.reward_funcs)

    def check_columns(self, columns: Collection[str]) -> None:
        """Before training: each function finds what it insists on, among the data set's columns or what the trainer knows.

        Raises:
            ValueError: names the function, what it needs, and the columns there are.
        """
        for i in range(len(self.names)):
            self._check_given(i, {*_ALWAYS, *TRAINER_ARGUMENTS, *columns}, columns)

    def _check_given(self, i: int, given: Collection[str], columns: Collection[str]) -> None:
        missing = [name for name in self._takes[i].required if name not in given]
        if missing:
            raise ValueError(
                f"RewardRunner: reward {self.names[i]!r} needs {', '.join(map(repr, missing))}, neither a column of the data set nor "
                f"known to the trainer; the columns are: {', '.join(columns) or 'none'}. Cure: rename the column, or give the parameter a "
                "default."
            )

    def _keywords(self, i: int, given: dict[str, Any], extras: dict[str, Any]) -> dict[str, Any]:
        takes = self._takes[i]
        self._check_given(i, {*given, *extras}, [name for name in given if name not in _ALWAYS])
        keywords = {name: list(values) for name, values in given.items() if takes.anything or name in takes.names}
        crosses = takes.anything and not self._pools
        keywords |= {name: value for name, value in extras.items() if crosses or name in takes.names}
        return keywords if self._pools else {name: _anew(value) for name, value in keywords.items()}

    def _in_threads(self, keywords: list[dict[str, Any]]) -> list[Outcome]:
        """Async functions in one thread with an event loop of its own (the caller may have one running), meanwhile the others in turn."""
        outcomes: dict[int, Outcome] = {}
        is_async = [_is_async(reward) for reward in self.reward_funcs]
        concurrent = [i for i, found in enumerate(is_async) if found]
        self._abandon(concurrent)
        background = _Background(lambda: asyncio.run(self._gather(concurrent, keywords))) if concurrent else None
        for i, reward in enumerate(self.reward_funcs):
            if not is_async[i]:
                outcomes[i] = self._in_thread(i, partial(_Call(reward), keywords[i]))
        if background is not None:
            # Each coroutine is cancelled when it is late; one that does not give up the loop holds up all of them.
            outcome = background.result(None if self.timeout is None else self.timeout + 1.0)
            if outcome is None:
                self._abandon(concurrent, background)
                outcomes |= dict.fromkeys(concurrent, self._late("it, or another async reward, blocked the event loop, and"))
            else:
                outcomes |= outcome.value
        return [outcomes[i] for i in range(len(self.reward_funcs))]

    def _in_thread(self, i: int, call: Callable[[], _Called]) -> Outcome:
        if self.timeout is None:
            return _attempt(call)
        self._abandon([i])
        background = _Background(call)
        outcome = background.result(self.timeout)
        if outcome is None:
            self._abandon([i], background)
            return self._late("it")
        return outcome

    def _late(self, who: str) -> Outcome:
        return Outcome(
            error=f"{who} took longer than {self.timeout:g} s and was left behind in its thread, which cannot be killed "
            "(a process can: isolation='process', or GRPOConfig's reward_isolation)",
            timed_out=True,
        )

    def _abandon(self, which: list[int], background: _Background | None = None) -> None:
        for i in which:
            self._abandoned[i] = [thread for thread in self._abandoned[i] if thread.is_alive()]
            if background is not None:
                self._abandoned[i].append(background.thread)
            elif len(self._abandoned[i]) >= MAX_ABANDONED:
                raise RuntimeError(
                    f"RewardRunner: {len(self._abandoned[i])} threads of reward {self.names[i]!r} hang and cannot be killed; expected a "
                    "function that ends. Cure: mend it, or isolation='process' (GRPOConfig's reward_isolation), which kills what is late."
                )

    async def _gather(self, which: list[int], keywords: list[dict[str, Any]]) -> dict[int, Outcome]:
        async def one(i: int) -> Outcome:
            begin = time.perf_counter()
            try:
                coroutine: Any = self.reward_funcs[i](**keywords[i])
                values = await asyncio.wait_for(coroutine, self.timeout)
            except (asyncio.TimeoutError, TimeoutError) as error:
                if self.timeout is not None and time.perf_counter() - begin >= self.timeout:
                    return Outcome(error=f"it took longer than {self.timeout:g} s and was cancelled", timed_out=True)
                return Outcome(value=error, error=_described(error))
            except Exception as error:
                return Outcome(value=error, error=_described(error))
            return Outcome(value=_Called(values, {}, time.perf_counter() - begin))

        return dict(zip(which, await asyncio.gather(*map(one, which)), strict=True))

    def _in_processes(self, keywords: list[dict[str, Any]]) -> list[Outcome]:
        """All at once: each function has a process, which is waited for in a thread."""

        def call(i: int) -> Outcome:
            try:
                return self._pools[i].map([keywords[i]], timeout=self.timeout)[0]
            except (pickle.PicklingError, AttributeError, TypeError) as error:
                return Outcome(error=f"what it is called with cannot be sent to its process: {error}")

        waiting = [_Background(partial(call, i)) for i in range(len(self._pools))]
        outcomes = []
        for name, background in zip(self.names, waiting, strict=True):
            outcome = background.result(None)
            assert outcome is not None
            if not outcome.ok:  # the pool itself failed, its worker did not start, say: no completion's fault
                raise RuntimeError(f"RewardRunner: reward {name!r} cannot run in a process: {outcome.value}") from outcome.value
            outcomes.append(outcome.value)
        return outcomes

    def _column(self, name: str, outcome: Outcome, batch: int, counts: Counter[str]) -> list[float]:
        if not outcome.ok:
            counts["timeouts" if outcome.timed_out else "errors"] += 1
            self._fail(name, counts, f"failed: {outcome.error}", cause=outcome.value)
            return [math.nan] * batch
        values = outcome.value.values
        counts.update(outcome.value.counters)
        if hasattr(values, "tolist"):
            values = values.tolist()
        if not isinstance(values, (list, tuple)):
            counts["errors"] += 1
            self._fail(name, counts, f"returned {_short(values)}; expected a list with one number or None per completion")
            return [math.nan] * batch
        if len(values) != batch:
            counts["errors"] += 1
            what = (
                f"returned {len(values)} values for {batch} completions; expected one per completion. Return None where it does not apply."
            )
            self._fail(name, counts, what)
            return [math.nan] * batch
        return [self._number(name, i, value, counts) for i, value in enumerate(values)]

    def _number(self, name: str, i: int, value: Any, counts: Counter[str]) -> float:
        if value is None:
            return math.nan
        if not isinstance(value, (int, float)) and hasattr(value, "item"):  # of NumPy or torch
            with suppress(RuntimeError, ValueError):
                value = value.item()
        if isinstance(value, (int, float)) and abs(value) <= _FLOAT32_MAX:  # a NaN is not
            return float(value)
        counts["errors"] += 1
        self._fail(name, counts, f"returned {_short(value)} for completion {i}; expected a finite number, or None where it does not apply")
        return math.nan

    def _fail(self, name: str, counts: Counter[str], what: str, cause: Any = None) -> None:
        if self.on_error == "raise":
            self.counters[name] += counts
            raise RewardError(f"reward {name!r} {what}") from (cause if isinstance(cause, BaseException) else None)


def reward_matrix(
    rewards: Sequence[Reward],
    prompts: Sequence[Completion],
    completions: Sequence[Completion],
    completion_ids: Sequence[Sequence[int]],
    **columns: Sequence[Any],
) -> Tensor:
    """All rewards of all completions as float32 ``[B, R]``, NaN where a reward does not apply: what `grpo_fast.group_advantages` takes.

    `RewardRunner` in one call, with its defaults.
    """
    call: Any = RewardRunner(rewards)
    return call(prompts, completions, completion_ids, **columns).values


class _Call:
    """A reward function as a function of one argument, its keywords: what a thread or a worker process is given to do."""

    def __init__(self, reward: Reward) -> None:
        self.reward = reward

    def __call__(self, keywords: dict[str, Any]) -> _Called:
        counters = getattr(self.reward, "counters", None)
        before = Counter(counters) if isinstance(counters, Counter) else Counter()
        begin = time.perf_counter()
        with torch.no_grad():  # a setting of the thread, so that of the caller does not hold here
            values = self.reward(**keywords)
            if inspect.isawaitable(values):
                values = asyncio.run(_awaited(values))
        grown = Counter(counters) - before if isinstance(counters, Counter) else Counter()
        return _Called(values, dict(grown), time.perf_counter() - begin)


class _Background:
    """A call in a daemon thread: `result` waits for its outcome, but not longer than one likes."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._outcome: Outcome | None = None
        reference = weakref.ref(self)  # who was left behind must not keep its results alive

        def run() -> None:
            outcome = _attempt(call)
            if (background := reference()) is not None:
                background._outcome = outcome

        self.thread = threading.Thread(target=run, daemon=True, name="grpo_fast reward")
        self.thread.start()

    def result(self, timeout: float | None) -> Outcome | None:
        self.thread.join(timeout)
        return self._outcome


def _attempt(call: Callable[[], Any]) -> Outcome:
    """The value, or the error in words with the exception as its value. An interrupt by the user is not held up."""
    try:
        return Outcome(value=call())
    except (Exception, SystemExit) as error:
        return Outcome(value=error, error=_described(error))


async def _awaited(values: Any) -> Any:
    return await values


class _Parameters(NamedTuple):
    names: frozenset[str]
    required: tuple[str, ...]
    anything: bool  # it takes **kwargs, or its parameters cannot be told


def _parameters(reward: Reward) -> _Parameters:
    try:
        parameters = inspect.signature(reward).parameters.values()
    except (TypeError, ValueError):
        return _Parameters(frozenset(), (), True)
    by_name = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    required = tuple(p.name for p in by_name if p.default is p.empty)
    return _Parameters(frozenset(p.name for p in by_name), required, any(p.kind is p.VAR_KEYWORD for p in parameters))


def _loaded(reward: Any) -> Reward:
    if isinstance(reward, str):
        return load_reward(reward)
    if isinstance(reward, torch.nn.Module):
        raise TypeError(
            f"RewardRunner: a reward function is a module ({type(reward).__name__}); expected a function of texts. Cure: a function that "
            "tokenizes the completions, calls the module, and returns a list of numbers."
        )
    if not callable(reward):
        raise TypeError(f"RewardRunner: a reward function is {_short(reward)}; expected a function, or the name of one.")
    return reward


def _check_picklable(name: str, reward: Reward) -> None:
    cure = "define it in a module that can be imported, or use isolation='thread'"
    owner = getattr(reward, "func", reward)
    if getattr(owner, "__module__", None) == "__main__" or type(owner).__module__ == "__main__":
        raise ValueError(f"RewardRunner: reward {name!r} is defined in the main script, which a worker process does not run. Cure: {cure}.")
    try:
        pickle.dumps(reward)
    except Exception as error:
        raise ValueError(
            f"RewardRunner: reward {name!r} cannot be pickled ({error}); isolation='process' needs that. Cure: {cure}."
        ) from error


def _checked_weights(weights: Sequence[float] | None, names: list[str]) -> Tensor:  # [R] float32
    values = [1.0] * len(names) if weights is None else list(weights)
    if len(values) != len(names):
        raise ValueError(f"RewardRunner: weights has {len(values)} numbers; expected {len(names)}, one for each of {', '.join(names)}.")
    for name, value in zip(names, values, strict=True):
        check_range("RewardRunner", f"the weight of {name}", value, -_FLOAT32_MAX)
    return torch.tensor(values, dtype=torch.float32)


def _anew(value: Any) -> Any:
    """Lists and dictionaries copied, and those within them: what a function does to its own is not done to the batch."""
    if isinstance(value, dict):
        return {key: _anew(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_anew(each) for each in value] if value and isinstance(value[0], (list, dict)) else list(value)
    return value


def _is_async(reward: Reward) -> bool:
    return inspect.iscoroutinefunction(reward) or inspect.iscoroutinefunction(getattr(reward, "__call__", None))  # noqa: B004


def _unique(names: list[str]) -> list[str]:
    seen: Counter[str] = Counter()
    result = []
    for name in names:
        seen[name] += 1
        result.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return result


def _metrics(prefix: str, values: list[float], batch: int, counts: Counter[str]) -> dict[str, float]:
    """The mean and the unbiased standard deviation (0 for one value) of those that apply; neither where none does."""
    result = {f"{prefix}/applicable": len(values) / batch if batch else 0.0}
    if values:
        std, mean = torch.std_mean(torch.tensor(values, dtype=torch.float64), correction=min(1, len(values) - 1))
        result |= {f"{prefix}/mean": mean.item(), f"{prefix}/std": std.item()}
    return result | {f"{prefix}/{name}": float(count) for name, count in counts.items() if count}


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _short(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"
