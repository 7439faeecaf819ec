"""The generators of the reasoning-gym package (arXiv:2505.24760) as tasks, with scores that can be trusted in training."""

from __future__ import annotations

import json
import math
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from grpo_fast.data.tasks.common import INSTRUCTION, Task, check_instruction
from grpo_fast.rewards.accuracy import canonical_answer, extract_answer
from grpo_fast.rewards.common import Completion, check_range, check_same_length, text_of
from grpo_fast.rewards.pool import CallResult, WorkerPool
from grpo_fast.utils.install_hints import install

__all__ = ["ReasoningGymReward", "reasoning_gym_task"]


_JUNK = ("", "junk", "qwxz vbn", "-987654321", "(((", "None", "[]", "{}", "0.1234567", "yes")
_PROBED = 6  # entries that junk is tried on


@dataclass(frozen=True)
class ReasoningGymReward:
    """From 0 to 1: what the reasoning-gym generator ``name`` gives for the stated answer (`extract_answer`), clamped; 0 if none is stated.

    What these scores would do to training is undone. Credit below ``floor`` is 0: many generators give 0.01 to any wrong answer, and
    divided by the group's standard deviation that is a full-sized advantage in a group where all are wrong. Some score functions raise on
    junk: that means 0, and is counted in ``counters["scorer_raised"]``. Some can be made to work for minutes or to fill the memory
    ("rubiks_cube" by a large number): they run in a worker process of limited memory, which is killed after ``timeout``. That is counted
    in ``counters["timeouts"]``, and the reward does not apply (None).

    Args:
        name: of the generator.
        settings: its configuration, as JSON.
        exact: compare with the stored answer instead of asking the generator: 1 or 0.
        floor: the least credit that counts, above 0 and at most 1.
        timeout: seconds for one score, above 0.
    """

    name: str
    settings: str = "{}"
    exact: bool = False
    floor: float = 0.1
    timeout: float = 10.0
    counters: Counter[str] = field(default_factory=Counter, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_range("ReasoningGymReward", "floor", self.floor, 0, 1, above=True, what="the least credit that counts")
        check_range("ReasoningGymReward", "timeout", self.timeout, 0, above=True, what="the seconds of one score")

    @property
    def __name__(self) -> str:
        return f"reasoning_gym_{self.name}"

    def __call__(
        self,
        prompts: Sequence[Completion],
        completions: Sequence[Completion],
        completion_ids: Sequence[Sequence[int]] | None = None,
        *,
        entry: Sequence[str],
        **columns: object,
    ) -> list[float | None]:
        check_same_length(self.__name__, prompts=prompts, completions=completions, entry=entry)
        return self.scores([extract_answer(text_of(completion)) for completion in completions], entry)

    def scores(self, stated: Sequence[str | None], entries: Sequence[str]) -> list[float | None]:
        """The credit of each stated answer to the question of its entry."""
        pairs = list(zip(stated, entries, strict=True))
        if self.exact:
            return [float(text is not None and canonical_answer(text) == canonical_answer(json.loads(e)["answer"])) for text, e in pairs]
        different = list(dict.fromkeys((self.name, self.settings, text, entry) for text, entry in pairs if text is not None))
        results = dict(zip(different, _scorer().map(different, timeout=self.timeout), strict=True))
        return [0.0 if text is None else self._credit(results[self.name, self.settings, text, entry]) for text, entry in pairs]

    def _credit(self, result: CallResult) -> float | None:
        if result.timed_out:
            self.counters["timeouts"] += 1
            return None
        if not result.ok:
            self.counters["scorer_raised"] += 1
            return 0.0
        credit = 0.0 if math.isnan(result.value) else min(max(result.value, 0.0), 1.0)
        return credit if credit >= self.floor else 0.0


@lru_cache(maxsize=1)
def _scorer() -> WorkerPool:
    return WorkerPool((str(Path(__file__).with_name("scoring_worker.py")), "score"), memory_limit=4 << 30)


def reasoning_gym_task(
    name: str, *, size: int = 500, seed: int = 0, floor: float = 0.1, instruction: str = INSTRUCTION, **config: Any
) -> Task:
    """A task of the reasoning-gym package (arXiv:2505.24760): over a hundred generators of questions with a score function each.

    The rows have ``prompt``, ``answer`` (None where a question has many) and ``entry``, what the score function needs, as JSON. They are a
    `datasets.Dataset` if that package is there, else a list.

    Before training the score function is tried on junk and on the true answers. If junk earns ``floor`` or more ("game_of_life_halting"
    gives it 1.0), or a true answer no longer earns 1 after its way through JSON, answers are compared with the stored one instead, and a
    warning says so. Where there is no stored answer the task is refused.

    Args:
        name: of the generator, "chain_sum" for instance.
        size: rows.
        seed: of the generator; take another one for the evaluation.
        floor: the least credit that counts, see `ReasoningGymReward`; 1.0 for all or nothing.
        instruction: the prompt, with the question in place of ``{question}``.
        config: the generator's own settings, ``min_terms=2`` for instance; plain values, since they are kept as JSON.

    Raises:
        ImportError: the package is missing: ``pip install '.[tasks]'`` in the checkout.
        ValueError: no such generator, a setting that it does not take, or scores that cannot be trusted.
    """
    check_range("reasoning_gym_task", "size", size, 1)
    check_instruction("reasoning_gym_task", instruction)
    try:
        settings = json.dumps(config, sort_keys=True)
    except TypeError as error:
        raise TypeError(f"reasoning_gym_task: config is {config}; expected plain values, as JSON has them ({error}).") from error
    source = _generator(name, settings, size=size, seed=seed)
    entries = [source[i] for i in range(size)]
    reward = ReasoningGymReward(name, settings, floor=floor)
    probes = _generator(name, settings, size=_PROBED)  # not this task's entries: another seed must not be scored another way
    doubt = _doubt(reward, [probes[i] for i in range(_PROBED)])
    if doubt is not None:
        if any(entry["answer"] is None for entry in entries):
            raise ValueError(
                f"reasoning_gym_task: name is {name!r}, whose {doubt}, and it stores no answers to compare with. Take another one."
            )
        warnings.warn(f"reasoning_gym_task: {name}'s {doubt}; answers are compared with the stored one instead.", stacklevel=2)
        reward = ReasoningGymReward(name, settings, exact=True, floor=floor)
    rows = [
        {
            "prompt": instruction.replace("{question}", entry["question"]),
            "answer": None if entry["answer"] is None else str(entry["answer"]),
            "entry": _as_json(entry),
        }
        for entry in entries
    ]
    try:
        from datasets import Dataset
    except ImportError:
        return Task(rows, reward)
    return Task(Dataset.from_list(rows), reward)


def _doubt(reward: ReasoningGymReward, entries: Sequence[dict[str, Any]]) -> str | None:
    """Why the generator's scores cannot be trusted, in words; None if they can."""
    stored = [_as_json(entry) for entry in entries]
    truths = [json.loads(entry)["answer"] for entry in stored]
    known = [(str(truth), entry) for truth, entry in zip(truths, stored, strict=True) if truth is not None]
    for credit in reward.scores(*_columns(known)):
        if credit != 1:
            return "score function does not give 1 to the true answer of a stored entry"
    tries = [
        (junk, entry)
        for truth, entry in zip(truths, stored, strict=True)
        for junk in _JUNK
        if truth is None or canonical_answer(truth) != canonical_answer(junk)
    ]
    for (junk, _), credit in zip(tries, reward.scores(*_columns(tries)), strict=True):
        if credit:
            return f"score function gives {credit:.2g} to {junk!r}"
    reward.counters.clear()
    return None


def _columns(pairs: Sequence[tuple[str, str]]) -> tuple[list[str | None], list[str]]:
    return [text for text, _ in pairs], [entry for _, entry in pairs]


def _as_json(entry: dict[str, Any]) -> str:
    return json.dumps(entry, default=str)


@lru_cache(maxsize=64)
def _generator(name: str, settings: str, *, size: int = 1, seed: int = 0) -> Any:
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ImportError(f"reasoning_gym_task needs the reasoning-gym package, which is not installed. Fix: {install('tasks')}") from error
    if name not in DATASETS:
        raise ValueError(f"reasoning_gym_task: name is {name!r}; expected one of {', '.join(sorted(DATASETS))}.")
    try:
        return reasoning_gym.create_dataset(name, size=size, seed=seed, **json.loads(settings))
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"reasoning_gym_task: {name!r} does not take the settings {settings}: {error}") from error
