"""The reward of a study that says whether an answer is correct."""

from __future__ import annotations

from collections.abc import Sequence

from grpo_fast.data.tasks import Task
from grpo_fast.rewards import Reward
from grpo_fast.utils.errors import SettingsError

__all__ = ["correctness_index"]

CORRECTNESS_REWARDS = ("accuracy_reward", "math_reward")


def correctness_index(correct: str | None, asked: Sequence[str], names: Sequence[str], rewards: Sequence[Reward], task: Task | None) -> int:
    """Return the index of the reward that says whether an answer is correct.

    Args:
        correct: its name, if it was given; by default accuracy, math, or the task's own.
        asked: the rewards as they were named in the settings.
        names: of the reward functions.
        rewards: the reward functions.
        task: whose rows they score, if any.

    Raises:
        SettingsError: there is no reward of this name, or, without a name, none of those.
    """
    if correct is not None:
        for known in (asked, names):
            if correct in known:
                return list(known).index(correct)
        raise SettingsError(f"correct is {correct!r}; expected one of the rewards: {', '.join(asked)}.")
    for i, reward in enumerate(rewards):
        if names[i] in CORRECTNESS_REWARDS or (task is not None and reward is task.reward):
            return i
    raise SettingsError(
        f"no reward says whether an answer is correct: rewards are {', '.join(asked)}; expected accuracy, math, or a task's own. "
        "Fix: --correct NAME, of a reward whose full marks are 1."
    )
