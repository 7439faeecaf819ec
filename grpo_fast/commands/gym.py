"""Tasks of reasoning-gym as rows and reward: real problems without a download (github.com/open-thought/reasoning-gym)."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from grpo_fast.commands.settings import SettingsError
from grpo_fast.rewards import extract_answer
from grpo_fast.rewards.common import Completion

__all__ = ["PREFIX", "ReasoningGymReward", "gym_rows"]

PREFIX = "reasoning_gym:"


def gym_rows(task: str, size: int, seed: int) -> list[dict[str, str]]:
    """Rows of a task: ``prompt``, ``answer``, and ``entry``, the whole problem as JSON, by which `ReasoningGymReward` scores.

    Args:
        task: ``chain_sum``, or with settings ``chain_sum(min_terms=2, max_terms=3)``.
        size: how many rows.
        seed: the same seed gives the same rows.
    """
    name, bracket, settings = task.partition("(")
    gym = _gym()
    try:
        call = ast.parse(f"_({settings}" if bracket else "_()", mode="eval").body
        assert isinstance(call, ast.Call) and not call.args
        options = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
        problems = gym.create_dataset(name.strip(), size=size, seed=seed, **options)
    except Exception as error:  # an unknown task, a setting it does not have or refuses
        raise SettingsError(
            f"dataset {PREFIX}{task}: {type(error).__name__}: {error}. Expected {PREFIX}TASK or {PREFIX}TASK(setting=1)."
        ) from error
    rows = []
    for index in range(size):
        entry = problems[index]
        answer = entry.get("answer")
        rows.append(
            {"prompt": str(entry["question"]), "answer": "" if answer is None else str(answer), "entry": json.dumps(entry, default=str)}
        )
    return rows


@dataclass(frozen=True)
class ReasoningGymReward:
    """The task's own verdict on the answer that `extract_answer` finds, else on the whole text; 0 if the task's scorer fails on it.

    Scorers give part of a point for what is no answer (some 0.5 for any number that can be read), which invites reward hacking: so only the
    full point counts, unless ``partial``.
    """

    partial: bool = False
    __name__ = "reasoning_gym"

    def __call__(
        self,
        prompts: Sequence[Completion],
        completions: Sequence[Completion],
        completion_ids: Sequence[Sequence[int]] | None = None,
        *,
        entry: Sequence[str],
        **columns: Any,
    ) -> list[float | None]:
        return [self._score(_text(completion), json.loads(problem)) for completion, problem in zip(completions, entry, strict=True)]

    def _score(self, text: str, problem: dict[str, Any]) -> float:
        scorer = _gym().get_score_answer_fn(problem["metadata"]["source_dataset"])
        found = extract_answer(text)
        try:
            score = float(scorer(answer=text.strip() if found is None else found, entry=problem))
        except Exception:  # scorers of reasoning-gym raise on junk: ValueError, KeyError, TypeError were seen
            return 0.0
        if not math.isfinite(score):
            return 0.0
        return min(max(score, 0.0), 1.0) if self.partial else float(score >= 1)


def _text(completion: Completion) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"] if completion else ""


def _gym() -> Any:
    try:
        import reasoning_gym
    except ImportError as error:
        raise SettingsError(
            f"{PREFIX}... needs the package reasoning-gym, which is not installed. Cure: pip install reasoning-gym"
        ) from error
    return reasoning_gym
