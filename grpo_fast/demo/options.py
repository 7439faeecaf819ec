"""Settings of the demonstration, and its rewards."""

from __future__ import annotations

import math
from dataclasses import dataclass

import grpo_fast as gf
from grpo_fast.data.tasks.sorting import split_questions
from grpo_fast.demo.evaluate import KEY_PATTERN, NGRAM
from grpo_fast.demo.grpo import LoopSettings
from grpo_fast.rewards import CoherenceReward, RepetitionPenalty, Reward, accuracy_reward, format_reward

__all__ = ["MAX_NEW_TOKENS", "REWARDS", "DemoOptions"]

# Accuracy has a larger weight than the others together, so that no form pays better than the correct answer.
REWARDS: dict[Reward, float] = {
    accuracy_reward: 1.0,
    format_reward: 0.2,
    CoherenceReward(key_pattern=KEY_PATTERN): 0.2,
    RepetitionPenalty(ngram_size=NGRAM): 0.2,
}
MAX_NEW_TOKENS = 32  # five lines of reasoning do not fit: repetition runs into the limit


@dataclass(frozen=True)
class DemoOptions:
    """Options of the command line.

    Raises:
        ValueError: names the option that is wrong.
    """

    seed: int = 0
    steps: int = 60
    temperature: float = 1.0
    group_size: int = 8
    prompts: int = 32
    learning_rate: float = 3e-4
    loss_type: str = "dapo"
    warm_start_steps: int = 160
    evaluation_prompts: int = 96

    def __post_init__(self) -> None:
        for name in ("steps", "prompts", "warm_start_steps", "evaluation_prompts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1.")
        available = len(split_questions()[1])
        if self.evaluation_prompts > available:
            raise ValueError(f"evaluation_prompts is {self.evaluation_prompts}; expected at most {available}, the held-out questions.")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate is {self.learning_rate}; expected a number above 0 (3e-4 works for this model).")
        self.settings()  # checks the other options

    def settings(self) -> LoopSettings:
        """Return the settings of the loop. CISPO's ``epsilon_high`` is an upper bound of the ratio itself, so it is above 1."""
        loss = gf.LossConfig(
            loss_type=self.loss_type, epsilon_high=5.0 if self.loss_type == "cispo" else 0.28, max_completion_length=MAX_NEW_TOKENS
        )
        return LoopSettings(
            steps=self.steps,
            group_size=self.group_size,
            max_new_tokens=MAX_NEW_TOKENS,
            temperature=self.temperature,
            learning_rate=self.learning_rate,
            loss=loss,
        )
