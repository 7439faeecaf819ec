"""Runs reward functions on a batch and checks their results, so that every value belongs to its completion."""

from __future__ import annotations

import inspect
import math
import numbers
import pickle
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from decimal import Decimal
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_fast.rewards.calls import RewardValues, Signature, copy_containers, is_async
from grpo_fast.rewards.common import TRAINER_ARGUMENTS, Completion, Reward, check_range, check_same_length, name_of
from grpo_fast.rewards.execution import PROCESS_FIX, ProcessExecution, ThreadExecution
from grpo_fast.rewards.loading import load_reward
from grpo_fast.rewards.pool import CallResult
from grpo_fast.rewards.thread_bound import SQLITE_FIX, thread_bound_handle

__all__ = ["RewardError", "RewardRunner", "RewardTable", "reward_matrix"]

_BATCH_COLUMNS = ("prompts", "completions", "completion_ids")
_FLOAT32_MAX = torch.finfo(torch.float32).max


class RewardError(ValueError):
    """A reward function raised, was late, or returned something wrong; the message names it."""


class RewardTable(NamedTuple):
    """The result of a `RewardRunner`."""

    values: Tensor  # [B, R] float32, on the CPU: NaN where a reward does not apply
    metrics: dict[str, float]  # rewards/<name>/mean, std, applicable, seconds; and timeouts, errors if there were any


class RewardRunner:
    """Calls reward functions on a batch of completions and returns their values as one table, NaN where one does not apply.

    Each function is called as in TRL, with keyword arguments: ``prompts``, ``completions``, ``completion_ids`` and the other columns of the
    dataset, as copies of lists of equal length. It returns one number or None per completion. Of the columns and the extras
    (``trainer_state``, ``logprobs``, ...) it gets those it has parameters for, or all if it has ``**kwargs``; a missing required column is
    an error. Async functions run concurrently.

    Args:
        reward_funcs: functions, reward objects, or names that `load_reward` takes.
        weights: one finite number per function, kept as ``weights`` (float32 [R]) for `grpo_fast.group_advantages`; None = all 1.
        timeout: seconds for one function and one batch; None = no limit. With ``isolation="thread"`` a late function continues in a daemon
            thread, because a thread cannot be killed; after four such threads of one function, further calls are refused.
        on_error: "raise": a `RewardError` that names the function if it raises, is late, or returns something else than one finite number
            or None per completion. "not_applicable": such a call counts as None for all completions, and a value that is no finite number
            as None for its completion. Failures are counted in the metrics in both cases.
        isolation: "thread": functions run in this process. "process": each function runs in its own worker process, which is killed and
            replaced if it is late, and which may crash. The function must be picklable by name: defined in a module, not in the main script
            or a notebook. It gets only those extras that it has parameters for.

    Raises:
        ValueError, TypeError: an argument is wrong, or a column is missing or has the wrong length; independent of ``on_error``.

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
        self.reward_funcs = [_resolve_reward(reward) for reward in reward_funcs]
        if not self.reward_funcs:
            raise ValueError("RewardRunner: reward_funcs is empty; expected at least one reward function.")
        self.names = _unique_names([name_of(reward) for reward in self.reward_funcs])
        self.weights = _weights_tensor(weights, self.names)
        if timeout is not None:
            check_range("RewardRunner", "timeout", timeout, 0, above=True, what="seconds, or None for no limit")
        if on_error not in ("raise", "not_applicable"):
            raise ValueError(f"RewardRunner: on_error is {on_error!r}; expected 'raise' or 'not_applicable'.")
        if isolation not in ("thread", "process"):
            raise ValueError(f"RewardRunner: isolation is {isolation!r}; expected 'thread' or 'process'.")
        self.timeout, self.on_error, self.isolation = timeout, on_error, isolation
        self.counters: dict[str, Counter[str]] = {name: Counter() for name in self.names}  # over all calls: timeouts, errors, ...
        self._signatures = [Signature.of(reward) for reward in self.reward_funcs]
        for name, signature in zip(self.names, self._signatures, strict=True):
            _check_parameters(name, signature)
        if isolation == "process":
            for name, reward, signature in zip(self.names, self.reward_funcs, self._signatures, strict=True):
                _check_picklable(name, reward)
                if here := sorted({"log_extra", "log_metric"} & signature.names):
                    raise ValueError(
                        f"RewardRunner: reward {name!r} takes {' and '.join(here)}, which is of the trainer's process; expected "
                        "isolation='thread' (GRPOConfig's reward_isolation) for it."
                    )
        else:
            for name, reward in zip(self.names, self.reward_funcs, strict=True):
                _check_thread(name, reward, timeout)
        execution = ProcessExecution if isolation == "process" else ThreadExecution
        self._execution = execution(self.reward_funcs, self.names, timeout)

    def close(self) -> None:
        """End the worker processes or the thread, if there are any. They also end with the program."""
        self._execution.close()

    def __call__(
        self,
        /,  # a column may be called self
        prompts: Sequence[Completion],
        completions: Sequence[Completion],
        completion_ids: Sequence[Sequence[int]],
        *,
        extras: Mapping[str, object] | None = None,
        **columns: Sequence[object],
    ) -> RewardTable:
        """Score B completions.

        Args:
            prompts: B strings or lists of chat messages; each prompt repeated once per completion of its group.
            completions: B strings or lists of chat messages.
            completion_ids: B lists of token ids.
            extras: arguments that are not columns: ``trainer_state``, ``log_metric``, ``logprobs`` and ``ref_logprobs`` ([B, T]), ...
            columns: the dataset's other columns, B values each.

        Raises:
            RewardError: a function failed, and ``on_error`` is "raise".
            RuntimeError: a worker process cannot start, or too many threads of a function hang.
        """
        extras = dict(extras or {})
        check_same_length("RewardRunner", prompts=prompts, completions=completions, completion_ids=completion_ids, **columns)
        twice = sorted((set(extras) & set(columns)) | (set(extras) & set(_BATCH_COLUMNS)))
        if twice:
            raise ValueError(f"RewardRunner: {', '.join(twice)} is given twice, also in extras; expected once. Fix: rename the column.")
        given = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids, **columns}
        keywords = [self._keywords(i, given, extras) for i in range(len(self.names))]  # checks all functions before the first call

        results = self._execution.run(keywords)
        table = torch.empty(len(prompts), len(self.names), dtype=torch.float32)
        metrics: dict[str, float] = {}
        for i, (name, result) in enumerate(zip(self.names, results, strict=True)):
            counts: Counter[str] = Counter()
            column = self._column(name, result, len(prompts), counts)
            table[:, i] = torch.tensor(column, dtype=torch.float32)
            self.counters[name] += counts
            metrics |= _metrics(f"rewards/{name}", [value for value in column if not math.isnan(value)], len(prompts), counts)
            if result.ok:
                metrics[f"rewards/{name}/seconds"] = result.value.seconds
        return RewardTable(table, metrics)

    def reads(self, name: str) -> bool:
        """Whether a reward function has a parameter of this name."""
        return any(name in Signature.of(reward).names for reward in self.reward_funcs)

    def check_columns(self, columns: Collection[str], where: str = "the data set") -> None:
        """Check before training that every function finds its required arguments: columns of the dataset, or arguments of the trainer.

        Args:
            columns: the dataset's columns other than ``prompt``.
            where: the dataset, for the message.

        Raises:
            ValueError: names the function, the missing arguments, and the columns.
        """
        for i in range(len(self.names)):
            self._check_given(i, {*_BATCH_COLUMNS, *TRAINER_ARGUMENTS, *columns}, columns, where)

    def _check_given(self, i: int, given: Collection[str], columns: Collection[str], where: str = "the data set") -> None:
        missing = [name for name in self._signatures[i].required if name not in given]
        if missing:
            raise ValueError(
                f"RewardRunner: reward {self.names[i]!r} needs {', '.join(map(repr, missing))}, neither a column of {where} nor "
                f"known to the trainer; the columns are: {', '.join(columns) or 'none'}. Fix: rename the column, or give the parameter a "
                "default."
            )

    def _keywords(self, i: int, given: dict[str, Sequence[Any]], extras: dict[str, object]) -> dict[str, object]:
        signature = self._signatures[i]
        self._check_given(i, {*given, *extras}, [name for name in given if name not in _BATCH_COLUMNS])
        keywords: dict[str, object] = {
            name: list(values)
            for name, values in given.items()
            if (signature.takes_any and name != signature.bound) or name in signature.names
        }
        in_processes = self.isolation == "process"
        passes_extras = signature.takes_any and not in_processes
        keywords |= {name: value for name, value in extras.items() if passes_extras or name in signature.names}
        return keywords if in_processes else {name: copy_containers(value) for name, value in keywords.items()}

    def _column(self, name: str, result: CallResult, batch: int, counts: Counter[str]) -> list[float]:
        if not result.ok:
            counts["timeouts" if result.timed_out else "errors"] += 1
            self._fail(name, counts, f"failed: {result.error}", cause=result.value)
            return [math.nan] * batch
        returned: RewardValues = result.value
        values = returned.values
        counts.update(returned.counters)
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
        if isinstance(value, (numbers.Real, Decimal)) and abs(float_or_nan := _to_float(value)) <= _FLOAT32_MAX:  # false for NaN
            return float_or_nan
        counts["errors"] += 1
        self._fail(name, counts, f"returned {_short(value)} for completion {i}; expected a finite number, or None where it does not apply")
        return math.nan

    def _fail(self, name: str, counts: Counter[str], what: str, cause: object = None) -> None:
        if self.on_error == "raise":
            self.counters[name] += counts
            raise RewardError(f"reward {name!r} {what}") from (cause if isinstance(cause, BaseException) else None)


def reward_matrix(
    rewards: Sequence[Reward],
    prompts: Sequence[Completion],
    completions: Sequence[Completion],
    completion_ids: Sequence[Sequence[int]],
    **columns: Sequence[object],
) -> Tensor:
    """All rewards of all completions as float32 ``[B, R]`` for `grpo_fast.group_advantages`; NaN where a reward does not apply.

    The same as calling a `RewardRunner` with its defaults.
    """
    call: Any = RewardRunner(rewards)
    return call(prompts, completions, completion_ids, **columns).values


def _resolve_reward(reward: Any) -> Reward:
    if isinstance(reward, str):
        return load_reward(reward)
    if isinstance(reward, torch.nn.Module):
        raise TypeError(
            f"RewardRunner: a reward function is a module ({type(reward).__name__}); expected a function of texts. Fix: a function that "
            "tokenizes the completions, calls the module, and returns a list of numbers."
        )
    if inspect.isclass(reward):
        raise TypeError(
            f"RewardRunner: a reward function is the class {reward.__name__}; expected a function. Fix: {reward.__name__}(...)."
        )
    if not callable(reward):
        raise TypeError(f"RewardRunner: a reward function is {_short(reward)}; expected a function, or the name of one.")
    return reward


def _check_parameters(name: str, signature: Signature) -> None:
    if signature.positional or not (signature.names or signature.takes_any):
        what = f"the positional-only parameters {', '.join(signature.positional)}" if signature.positional else "no parameters with names"
        raise ValueError(
            f"RewardRunner: reward {name!r} has {what}; expected parameters that can be passed by name, since rewards are called as "
            "reward(prompts=..., completions=..., completion_ids=..., **columns). Fix: def reward(completions, **columns)."
        )


def _check_picklable(name: str, reward: Reward) -> None:
    fix = "define it in a module that can be imported, or use isolation='thread'"
    owner = getattr(reward, "func", reward)
    if getattr(owner, "__module__", None) == "__main__" or type(owner).__module__ == "__main__":
        raise ValueError(f"RewardRunner: reward {name!r} is defined in the main script, which a worker process does not run. Fix: {fix}.")
    try:
        pickle.dumps(reward)
    except Exception as error:
        raise ValueError(
            f"RewardRunner: reward {name!r} cannot be pickled ({error}); isolation='process' needs that. Fix: {fix}."
        ) from error


def _check_thread(name: str, reward: Reward, timeout: float | None) -> None:
    """Refuse what would be used in another thread than the one that made it."""
    if timeout is None and not is_async(reward):
        return
    handle = thread_bound_handle(reward)
    if handle is not None:
        why = "async rewards run" if is_async(reward) else f"with timeout = {timeout:g} it runs"
        fix = f"{SQLITE_FIX}, or {PROCESS_FIX}{'' if is_async(reward) else ', or no timeout'}"
        raise ValueError(
            f"RewardRunner: reward {name!r} uses {handle!r}, a handle of sqlite3 that works only in the thread that opened it, and "
            f"{why} in another. {fix}."
        )


def _weights_tensor(weights: Sequence[float] | None, names: list[str]) -> Tensor:  # [R] float32
    values = [1.0] * len(names) if weights is None else list(weights)
    if len(values) != len(names):
        raise ValueError(f"RewardRunner: weights has {len(values)} numbers; expected {len(names)}, one for each of {', '.join(names)}.")
    for name, value in zip(names, values, strict=True):
        check_range("RewardRunner", f"the weight of {name}", value, -_FLOAT32_MAX)
    return torch.tensor(values, dtype=torch.float32)


def _unique_names(names: list[str]) -> list[str]:
    seen: Counter[str] = Counter()
    result = []
    for name in names:
        seen[name] += 1
        result.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return result


def _to_float(value: numbers.Real | Decimal) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _metrics(prefix: str, values: list[float], batch: int, counts: Counter[str]) -> dict[str, float]:
    """Share of applicable values, their mean and unbiased standard deviation (0 for one value), and the counts that are not 0."""
    result = {f"{prefix}/applicable": len(values) / batch if batch else 0.0}
    if values:
        std, mean = torch.std_mean(torch.tensor(values, dtype=torch.float64), correction=min(1, len(values) - 1))
        result |= {f"{prefix}/mean": mean.item(), f"{prefix}/std": std.item()}
    return result | {f"{prefix}/{name}": float(count) for name, count in counts.items() if count}


def _short(value: object) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"
