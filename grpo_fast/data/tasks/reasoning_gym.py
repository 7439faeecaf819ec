"""The generators of the reasoning-gym package (arXiv:2505.24760) as tasks, with scores that can be trusted in training."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_fast.data.tasks.common import INSTRUCTION, Task, TaskRows, as_dataset, check_instruction
from grpo_fast.rewards.accuracy import canonical_answer, extract_answer
from grpo_fast.rewards.common import Completion, check_range, check_same_length, text_of
from grpo_fast.rewards.pool import CallResult, WorkerPool
from grpo_fast.utils.install_hints import install
from grpo_fast.utils.warn import warn

if TYPE_CHECKING:
    from reasoning_gym.dataset import ProceduralDataset

__all__ = ["ReasoningGymReward", "reasoning_gym_task"]

_WRONG_ANSWERS = ("", "junk", "qwxz vbn", "-987654321", "(((", "None", "[]", "{}", "0.1234567", "yes")
_PROBED = 6  # entries on which a score function is tested


@dataclass(frozen=True)
class ReasoningGymReward:
    """The score, from 0 to 1, that a reasoning-gym generator gives to the stated answer (`extract_answer`); 0 if no answer is stated.

    Scores are corrected for training. A score below ``floor`` counts as 0: many generators give 0.01 to any wrong answer, which after
    division by the group's standard deviation becomes a full-sized advantage in a group whose answers are all wrong. A score function that
    raises an error gives 0; ``counters["scorer_raised"]`` counts it. Some answers make a score function run for minutes or fill the memory
    (a large number for "rubiks_cube"), so scores are computed in a worker process of limited memory, which is killed after ``timeout``;
    the reward then does not apply (None), and ``counters["timeouts"]`` counts it.

    Args:
        name: of the generator.
        settings: its configuration, as JSON.
        exact: compare with the stored answer (1 or 0) instead of asking the generator.
        floor: the smallest score that counts, above 0 and at most 1.
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
        """Score each stated answer to the question of its entry; None where the reward does not apply.

        Args:
            stated: answers, None for a completion without one.
            entries: the entries of the questions, as JSON.
        """
        pairs = list(zip(stated, entries, strict=True))
        if self.exact:
            return [float(text is not None and canonical_answer(text) == canonical_answer(json.loads(e)["answer"])) for text, e in pairs]
        different = list(dict.fromkeys((self.name, self.settings, text, entry) for text, entry in pairs if text is not None))
        results = dict(zip(different, _scorer().map(different, timeout=self.timeout), strict=True))
        return [0.0 if text is None else self._score_of(results[self.name, self.settings, text, entry]) for text, entry in pairs]

    def _score_of(self, result: CallResult) -> float | None:
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
    """A task of the reasoning-gym package (arXiv:2505.24760), which has over a hundred generators of questions with a score function each.

    The rows have ``prompt``, ``answer`` (None where a question has several) and ``entry``, the input of the score function, as JSON. They
    are a `datasets.Dataset` if that package is installed, else a list.

    The score function is first tested on wrong answers and on the true answers. If a wrong answer earns ``floor`` or more
    ("game_of_life_halting" gives it 1.0), or a true answer earns less than 1 after conversion to JSON, answers are compared with the
    stored one instead, with a warning. Without a stored answer such a task is refused.

    Args:
        name: of the generator, "chain_sum" for instance.
        size: number of rows.
        seed: of the generator; use another one for the evaluation.
        floor: the smallest score that counts, see `ReasoningGymReward`; 1.0 gives rewards of 0 or 1 only.
        instruction: the prompt; ``{question}`` is replaced by the question.
        config: the generator's own settings, ``min_terms=2`` for example; plain values, because they are stored as JSON.

    Raises:
        ImportError: the package is missing: ``pip install '.[tasks]'`` in the checkout.
        ValueError: there is no such generator, it does not take a setting, or its scores are unusable and it stores no answers.
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
    probes = _generator(name, settings, size=_PROBED)  # of a fixed seed: how a task is scored must not depend on its seed
    problem = _scoring_problem(reward, [probes[i] for i in range(_PROBED)])
    if problem is not None:
        if any(entry["answer"] is None for entry in entries):
            raise ValueError(
                f"reasoning_gym_task: name is {name!r}, whose {problem}, and it stores no answers to compare with. Take another one."
            )
        warn(f"reasoning_gym_task: {name}'s {problem}; answers are compared with the stored one instead.")
        reward = ReasoningGymReward(name, settings, exact=True, floor=floor)
    rows = TaskRows(
        {
            "prompt": instruction.replace("{question}", entry["question"]),
            "answer": None if entry["answer"] is None else str(entry["answer"]),
            "entry": _as_json(entry),
        }
        for entry in entries
    )
    try:
        return Task(as_dataset(rows), reward)
    except ImportError:
        return Task(rows, reward)


def _scoring_problem(reward: ReasoningGymReward, entries: Sequence[dict[str, Any]]) -> str | None:
    """Why the scores of a generator are unusable for training; None if they are usable."""
    stored = [_as_json(entry) for entry in entries]
    truths = [json.loads(entry)["answer"] for entry in stored]
    true_answers = [(str(truth), entry) for truth, entry in zip(truths, stored, strict=True) if truth is not None]
    for credit in reward.scores(*_columns(true_answers)):
        if credit != 1:
            return "score function does not give 1 to the true answer of a stored entry"
    wrong_answers = [
        (junk, entry)
        for truth, entry in zip(truths, stored, strict=True)
        for junk in _WRONG_ANSWERS
        if truth is None or canonical_answer(truth) != canonical_answer(junk)
    ]
    for (junk, _), credit in zip(wrong_answers, reward.scores(*_columns(wrong_answers)), strict=True):
        if credit:
            return f"score function gives {credit:.2g} to {junk!r}"
    reward.counters.clear()
    return None


def _columns(pairs: Sequence[tuple[str, str]]) -> tuple[list[str | None], list[str]]:
    return [text for text, _ in pairs], [entry for _, entry in pairs]


def _as_json(entry: dict[str, Any]) -> str:
    return json.dumps(entry, default=str)


@lru_cache(maxsize=64)
def _generator(name: str, settings: str, *, size: int = 1, seed: int = 0) -> ProceduralDataset:
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
