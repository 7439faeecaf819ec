"""The runner: the right values beside the right completions, whatever a reward function does; and reward functions by name."""

from __future__ import annotations

import asyncio
import math
import os
import sys
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hang import HANG

from grpo_fast.rewards import (
    BUILT_IN,
    CosineLengthReward,
    RepetitionPenalty,
    RewardError,
    RewardRunner,
    accuracy_reward,
    format_reward,
    load_reward,
    reward_matrix,
)
from grpo_fast.rewards.execution import ProcessExecution, ThreadExecution

BATCH: dict[str, Any] = {"prompts": ["p", "p", "q"], "completions": ["a", "bb", "ccc"], "completion_ids": [[1], [1, 2], [1, 2, 3]]}
NAN = math.nan


def lengths(completions, **columns):
    return [float(len(completion)) for completion in completions]


def check(table: torch.Tensor, expected: list[list[float]]) -> None:
    torch.testing.assert_close(table, torch.tensor(expected, dtype=torch.float32), rtol=0, atol=0, equal_nan=True)


def test_values_and_metrics_by_hand():
    def some(completions, answer):
        return [None, 3, 1.0]

    values, metrics = RewardRunner([some, lengths])(**BATCH, answer=[0, 0, 0])
    check(values, [[NAN, 1], [3, 2], [1, 3]])
    assert values.dtype == torch.float32
    seconds = {name: metrics.pop(name) for name in list(metrics) if name.endswith("/seconds")}
    assert set(seconds) == {"rewards/some/seconds", "rewards/lengths/seconds"} and all(0 <= value < 5 for value in seconds.values())
    assert metrics == pytest.approx(
        {
            "rewards/some/applicable": 2 / 3,
            "rewards/some/mean": 2.0,
            "rewards/some/std": math.sqrt(2),
            "rewards/lengths/applicable": 1.0,
            "rewards/lengths/mean": 2.0,
            "rewards/lengths/std": 1.0,
        }
    )


def test_one_value_and_none():
    def first(completions):
        return [5.0, None, None]

    def never(completions):
        return [None] * 3

    metrics = RewardRunner([first, never])(**BATCH).metrics
    assert metrics["rewards/first/mean"] == 5.0 and metrics["rewards/first/std"] == 0.0
    assert "rewards/never/mean" not in metrics and metrics["rewards/never/applicable"] == 0.0


def test_a_function_gets_what_it_names():
    seen: dict[str, Any] = {}

    def picky(completions, trainer_state):
        seen["picky"] = (completions, trainer_state)
        return [0.0] * 3

    def everything(**kwargs):
        seen["everything"] = set(kwargs)
        return [0.0] * 3

    def optional(completions, ref_logprobs=None):
        seen["optional"] = ref_logprobs
        return [0.0] * 3

    runner = RewardRunner([picky, everything, optional])
    runner(**BATCH, answer=[1, 2, 3], extras={"trainer_state": "state", "logprobs": torch.zeros(3, 3)})
    assert seen["picky"] == (BATCH["completions"], "state")
    assert seen["everything"] == {"prompts", "completions", "completion_ids", "answer", "trainer_state", "logprobs"}
    assert seen["optional"] is None


def test_a_function_cannot_disturb_the_others():
    def vandal(prompts, completions, completion_ids, answer):
        values = lengths(completions)
        completion_ids[0].append(9)
        prompts[0][0]["content"] = "gone"
        for each in (prompts, completions, completion_ids, answer):
            each.reverse()
            each.pop()
        return values

    completions, answer = list(BATCH["completions"]), ["x", "y", "z"]
    prompts, ids = [[{"role": "user", "content": "?"}] for _ in range(3)], [list(ids) for ids in BATCH["completion_ids"]]
    values = reward_matrix([vandal, lengths], prompts, completions, ids, answer=answer)
    check(values, [[1, 1], [2, 2], [3, 3]])
    assert completions == BATCH["completions"] and answer == ["x", "y", "z"]
    assert ids == BATCH["completion_ids"] and [prompt[0]["content"] for prompt in prompts] == ["?"] * 3


def test_columns_are_checked_before_training():
    def needs(completions, answer, trainer_state, log_metric, logprobs, ref_logprobs, log_extra):
        raise AssertionError("is not called")

    runner = RewardRunner([lengths, needs])
    runner.check_columns(["answer", "entry"])
    with pytest.raises(ValueError, match=r"reward 'needs' needs 'answer', neither a column .* the columns are: entry"):
        runner.check_columns(["entry"])


def test_what_counts_as_numbers():
    tensor: Any = lambda completions: torch.tensor([1.0, 2.0, 3.0])  # noqa: E731
    array: Any = lambda completions: np.array([1, 2, 3])  # noqa: E731
    assert RewardRunner(tensor)(**BATCH).values.flatten().tolist() == [1, 2, 3]
    assert RewardRunner(array)(**BATCH).values.flatten().tolist() == [1, 2, 3]
    mixed = [True, np.float32(0.5), torch.tensor(2)]
    assert RewardRunner(lambda completions: mixed)(**BATCH).values.flatten().tolist() == [1.0, 0.5, 2.0]


WRONG = {
    "too few": ([1.0, 2.0], "returned 2 values for 3 completions; expected one per completion"),
    "too many": ([1.0] * 4, "returned 4 values for 3 completions"),
    "nothing": (None, r"returned None \(NoneType\); expected a list"),
    "one number": (1.0, r"returned 1.0 \(float\); expected a list"),
    "text": ("abc", r"returned 'abc' \(str\); expected a list"),
    "dict": ({"a": 1.0, "b": 2.0, "c": 3.0}, r"\(dict\); expected a list"),
    "generator": ((x for x in [1.0, 2.0, 3.0]), r"\(generator\); expected a list"),
    "scalar tensor": (torch.tensor(1.0), r"returned 1.0 \(float\); expected a list"),
}
WRONG_ITEM = {
    "text": ("2", r"returned '2' \(str\) for completion 1; expected a finite number"),
    "nan": (NAN, r"returned nan \(float\) for completion 1; .* or None where it does not apply"),
    "inf": (math.inf, "returned inf"),
    "beyond float32": (1e39, "returned 1e[+]39"),
    "list": ([1.0], "returned .* for completion 1"),
    "complex": (1j, "returned 1j"),
    "huge": (10**400, "returned 1000"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_column_is_named_or_does_not_apply(case):
    returned, message = WRONG[case]

    def odd(completions):
        return returned

    with pytest.raises(RewardError, match=f"reward 'odd' .*{message}"):
        RewardRunner([lengths, odd])(**BATCH)
    runner = RewardRunner([odd, lengths], on_error="not_applicable")
    values, metrics = runner(**BATCH)
    check(values, [[NAN, 1], [NAN, 2], [NAN, 3]])
    assert metrics["rewards/odd/errors"] == 1 and "rewards/lengths/errors" not in metrics
    runner(**BATCH)
    assert runner.counters == {"odd": Counter(errors=2), "lengths": Counter()}


@pytest.mark.parametrize("case", WRONG_ITEM)
def test_a_wrong_value_is_named_or_does_not_apply(case):
    item, message = WRONG_ITEM[case]

    def odd(completions):
        return [1.0, item, 3.0]

    with pytest.raises(RewardError, match=f"reward 'odd' .*{message}"):
        RewardRunner([odd])(**BATCH)
    values, metrics = RewardRunner([odd], on_error="not_applicable")(**BATCH)
    check(values, [[1], [NAN], [3]])
    assert metrics["rewards/odd/errors"] == 1 and metrics["rewards/odd/mean"] == 2.0


@pytest.mark.parametrize("error", [KeyError("gone"), SystemExit(1), AssertionError()])
def test_a_function_that_raises(error):
    def broken(completions, **columns):
        raise error

    with pytest.raises(RewardError, match=f"reward 'broken' failed: {type(error).__name__}") as caught:
        RewardRunner([broken])(**BATCH)
    assert caught.value.__cause__ is error
    values, metrics = RewardRunner([broken, lengths], on_error="not_applicable")(**BATCH)
    check(values, [[NAN, 1], [NAN, 2], [NAN, 3]])
    assert metrics["rewards/broken/errors"] == 1


def test_the_users_interrupt_is_not_swallowed():
    def interrupted(completions):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        RewardRunner([interrupted], on_error="not_applicable")(**BATCH)


def test_a_hung_thread_is_left_behind_and_the_rest_goes_on():
    release = threading.Event()

    def hangs(completions):
        release.wait(60)
        completions.clear()  # it has copies: nobody sees this
        return [0.0] * 3

    runner = RewardRunner([hangs, lengths], timeout=0.5, on_error="not_applicable")
    begin = time.monotonic()
    for _ in range(4):
        values, metrics = runner(**BATCH)
        check(values, [[NAN, 1], [NAN, 2], [NAN, 3]])
        assert metrics["rewards/hangs/timeouts"] == 1
    assert time.monotonic() - begin < 50  # not the minute that they would take
    with pytest.raises(RuntimeError, match=r"4 threads of reward 'hangs' hang .* Fix: mend it, or isolation='process'"):
        runner(**BATCH)
    with pytest.raises(RewardError, match=r"reward 'hangs' failed: it took longer than 0.5 s and was left behind"):
        RewardRunner([hangs], timeout=0.5)(**BATCH)
    release.set()
    deadline = time.monotonic() + HANG
    assert isinstance(runner._execution, ThreadExecution)
    abandoned = runner._execution.abandoned
    while any(thread.is_alive() for thread in abandoned[0]) and time.monotonic() < deadline:
        time.sleep(0.01)
    check(runner(**BATCH).values, [[0, 1], [0, 2], [0, 3]])  # those threads have ended: it may try again


def test_async_functions_run_at_the_same_time():
    together = []

    def waiting(name: str) -> Any:
        async def reward(completions, **columns):
            together.append(name)
            for _ in range(2000):  # each waits for the other: one after the other this would never end
                if len(together) == 2:
                    return [float(len(name))] * len(completions)
                await asyncio.sleep(0.005)
            raise AssertionError("alone")

        reward.__name__ = name
        return reward

    values, _ = RewardRunner([waiting("a"), lengths, waiting("bb")])(**BATCH)
    check(values, [[1, 1, 2], [1, 2, 2], [1, 3, 2]])


def test_async_functions_that_fail_or_are_late():
    async def broken(completions):
        raise KeyError("gone")

    async def own_timeout(completions):
        raise TimeoutError("of its own server")

    async def sleeps(completions):
        await asyncio.sleep(60)

    async def fine(completions):
        return [1.0] * 3

    begin = time.monotonic()
    runner = RewardRunner([broken, own_timeout, sleeps, fine], timeout=0.5, on_error="not_applicable")
    values, metrics = runner(**BATCH)
    assert time.monotonic() - begin < 50  # not the minute that they would take
    check(values, [[NAN, NAN, NAN, 1]] * 3)
    assert [metrics[f"rewards/{name}"] for name in ("broken/errors", "own_timeout/errors", "sleeps/timeouts")] == [1, 1, 1]
    with pytest.raises(RewardError, match=r"reward 'sleeps' failed: it took longer than 0.5 s and was cancelled"):
        RewardRunner([sleeps], timeout=0.5)(**BATCH)


def test_inside_a_running_event_loop():
    async def fine(completions):
        return [1.0] * 3

    async def notebook():
        return RewardRunner([fine, lengths])(**BATCH).values

    check(asyncio.run(notebook()), [[1, 1], [1, 2], [1, 3]])


def test_an_async_function_that_blocks_the_loop_is_left_behind():
    release = threading.Event()

    async def blocks(completions):
        release.wait(60)

    runner = RewardRunner([blocks, lengths], timeout=0.5, on_error="not_applicable")
    for _ in range(4):
        values, metrics = runner(**BATCH)
        check(values, [[NAN, 1], [NAN, 2], [NAN, 3]])
        assert metrics["rewards/blocks/timeouts"] == 1
    with pytest.raises(RuntimeError, match="4 threads of reward 'blocks' hang"):
        runner(**BATCH)
    release.set()


MODULE = """
import asyncio, os, time
from collections import Counter

def pids(completions, **columns):
    return [float(os.getpid())] * len(completions)

def hangs(completions, **columns):
    time.sleep(60)

def crashes(completions, **columns):
    os.abort()

async def waits(completions, answer):
    await asyncio.sleep(0)
    return [float(a) for a in answer]

def logs(completions, log_metric=None):
    return [0.0] * len(completions)

def named(completions, logprobs=None, **columns):
    return [None if logprobs is None else len(columns)] * len(completions)

class Counting:
    def __init__(self):
        self.counters = Counter()
    def __call__(self, completions, **columns):
        self.counters["seen"] += len(completions)
        return [0.0] * len(completions)

counting = Counting()

def maker(value):
    return lambda completions, **columns: [value] * len(completions)

number = 5
"""


@pytest.fixture
def my_rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"my_rewards_{os.getpid()}_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def test_in_processes(my_rewards):
    """One call of everything, since each process imports torch: what hangs is killed, what crashes is counted, the others do not notice."""
    names = ("pids", "hangs", "crashes", "waits", "named", "counting")
    runner = RewardRunner([f"{my_rewards}:{name}" for name in names], isolation="process", timeout=3.0, on_error="not_applicable")
    try:
        values, metrics = runner(**BATCH, answer=[4, 5, 6], extras={"logprobs": [[0.0]] * 3, "log_metric": lambda name, value: None})
        assert values[0, 0] != os.getpid()
        check(values[:, 1:], [[NAN, NAN, 4, 3, 0], [NAN, NAN, 5, 3, 0], [NAN, NAN, 6, 3, 0]])  # 3: prompts, ids, answer; no log_metric
        assert metrics["rewards/hangs/timeouts"] == 1 and metrics["rewards/crashes/errors"] == 1
        assert metrics["rewards/Counting/seen"] == 3
        assert runner.counters["Counting"] == Counter(seen=3)
        assert isinstance(runner._execution, ProcessExecution)
        assert runner._execution.pools[0]._workers and not runner._execution.pools[1]._workers  # the one that hung is gone
    finally:
        runner.close()
    assert not any(pool._workers for pool in runner._execution.pools)


def test_a_process_that_cannot_load_its_function_is_no_reward_of_nan(my_rewards, tmp_path, monkeypatch):
    runner = RewardRunner(f"{my_rewards}:pids", isolation="process", on_error="not_applicable")
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(tmp_path)])
    with pytest.raises(RuntimeError, match=f"reward 'pids' cannot run in a process: (.|\n)*No module named '{my_rewards}'"):
        runner(**BATCH)


def test_what_lives_in_the_trainers_process_is_refused_in_another(my_rewards):
    with pytest.raises(ValueError, match="reward 'logs' takes log_metric, which is of the trainer's process; expected isolation='thread'"):
        RewardRunner(f"{my_rewards}:logs", isolation="process")


def test_the_counters_of_a_reward_are_reported_by_batch(my_rewards):
    runner = RewardRunner(f"{my_rewards}:counting")
    runner(**BATCH)
    assert runner(**BATCH).metrics["rewards/Counting/seen"] == 3
    assert runner.counters["Counting"]["seen"] == 6


def test_no_gradient_is_recorded():
    weight = torch.ones((), requires_grad=True)

    def model(completions):
        assert not torch.is_grad_enabled()
        return weight.expand(3) * 2

    check(RewardRunner([model], timeout=HANG)(**BATCH).values, [[2], [2], [2]])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: RewardRunner([]), ValueError, "reward_funcs is empty"),
        (lambda: RewardRunner([lengths], weights=[1.0, 2.0]), ValueError, "weights has 2 numbers; expected 1, one for each of lengths"),
        (lambda: RewardRunner([lengths], weights=[NAN]), ValueError, "the weight of lengths is nan; expected a finite number"),
        (lambda: RewardRunner([lengths], timeout=0), ValueError, "timeout is 0; expected a finite number of above 0"),
        (lambda: RewardRunner([lengths], on_error="ignore"), ValueError, "on_error is 'ignore'; expected 'raise' or 'not_applicable'"),
        (lambda: RewardRunner([lengths], isolation="pod"), ValueError, "isolation is 'pod'; expected 'thread' or 'process'"),
        (
            lambda: RewardRunner([lambda completions: []], isolation="process"),
            ValueError,
            "cannot be pickled .* Fix: define it in a module",
        ),
        (lambda: RewardRunner([3]), TypeError, r"a reward function is 3 \(int\); expected a function"),  # type: ignore[list-item]
        (lambda: RewardRunner([torch.nn.Linear(1, 1)]), TypeError, r"is a module \(Linear\); expected a function of texts"),
        (lambda: RewardRunner([accuracy_reward])(**BATCH, solution=["7"] * 3), ValueError, "needs 'answer', .*; the columns are: solution"),
        (lambda: RewardRunner([lengths])(**BATCH, x=[1, 2, 3], extras={"x": 1}), ValueError, "x is given twice"),
        (lambda: RewardRunner([lengths])(["p"], ["a", "b"], [[1]]), ValueError, "RewardRunner: completions has 2 items; expected 1"),
    ],
)
def test_wrong_use_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_wrong_use_is_refused_also_where_errors_are_not():
    with pytest.raises(ValueError, match="needs 'answer'"):
        RewardRunner([accuracy_reward], on_error="not_applicable")(**BATCH)


def test_names_are_unique_and_weights_a_tensor():
    runner = RewardRunner([RepetitionPenalty(2), RepetitionPenalty(3), partial(lengths)], weights=[1, 0.5, -2])
    assert runner.names == ["repetition_penalty", "repetition_penalty_2", "lengths"]
    torch.testing.assert_close(runner.weights, torch.tensor([1.0, 0.5, -2.0]))
    assert RewardRunner(lengths).weights.tolist() == [1.0]


def test_no_completions():
    values, metrics = RewardRunner([lengths, format_reward])([], [], [])
    assert values.shape == (0, 2) and metrics["rewards/lengths/applicable"] == 0.0


def test_load_built_in():
    assert load_reward("accuracy") is accuracy_reward
    assert load_reward(" repetition ") == RepetitionPenalty()
    assert load_reward("cosine_length(max_length=8, right=(2, 1))") == CosineLengthReward(8, right=(2, 1))
    settings = {"cosine_length": "(max_length=8)", "soft_overlong": "(max_length=8, margin=2)"}
    for name in BUILT_IN:
        assert callable(load_reward(name + settings.get(name, "")))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def f(:", r"cannot be imported: SyntaxError: invalid syntax \(broken_rewards.py, line 1\)"),
        ("x = 1\ny = x + missing", r"cannot be imported: NameError: .*'missing'.* \(.*broken_rewards.py, line 2\)"),
    ],
)
def test_a_file_with_a_mistake_is_told_by_its_line(text, message, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "broken_rewards.py").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_reward(f"{tmp_path}/broken_rewards.py:f")


def test_load_from_a_module_and_from_a_file(my_rewards, tmp_path):
    assert load_reward(f"{my_rewards}:pids") is load_reward(f"{my_rewards}.pids") is load_reward(str(tmp_path / f"{my_rewards}.py:pids"))
    assert load_reward(f"{my_rewards}:maker(value=3)")(completions=["a", "b"]) == [3, 3]
    assert load_reward(f"{my_rewards}:Counting")(completions=["a"]) == [0.0]
    assert load_reward(f"{my_rewards}:counting.__call__")(completions=["a"]) == [0.0]


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("accurate", ValueError, "'accurate' is none of the package's own rewards, accuracy, math, .*; expected"),
        ("no_such_module:f", ValueError, "there is no module 'no_such_module' .* Fix: install it, .* PYTHONPATH"),
        ("no_such_file.py:f", ValueError, "there is no file .*no_such_file.py"),
        ("grpo_fast.rewards:nothing", ValueError, "'grpo_fast.rewards' has no 'nothing'"),
        ("MODULE:number", TypeError, r"is 5 \(int\); expected a function"),
        ("repetition(6)", ValueError, r"the settings of 'repetition\(6\)' are \(6\); expected keywords with plain values"),
        ("repetition(ngram_size=open('x'))", ValueError, "expected keywords with plain values"),
        ("repetition(size=6)", ValueError, "does not take the settings {'size': 6}"),
        ("repetition(ngram_size=0)", ValueError, "ngram_size is 0"),
        ("soft_overlong", ValueError, "missing 2 required positional arguments: 'max_length' and 'margin'"),
        ("", ValueError, "expected 'name'"),
    ],
)
def test_load_reward_refuses(name, error, message, my_rewards):
    with pytest.raises(error, match=message):
        load_reward(name.replace("MODULE", my_rewards))
