"""Rule-based rewards: correctness, format, coherence, fluency, repetition, length, language. No reward model is used.

DeepSeek-R1 (arXiv:2501.12948, section 2.2) trains its reasoning on such rules alone, since a neural reward model invites reward hacking.

Every reward is called as in TRL, ``reward(prompts, completions, completion_ids, **columns) -> list[float | None]``: one number per
completion, None where the rule does not apply. A completion is a string, or a list of chat messages, whose last one is read. The columns
are lists as long as ``prompts``. Rewards with settings are frozen dataclasses, so that they can be pickled for worker processes.
`RewardRunner` calls them and your own, with time limits and error handling; `load_reward` loads them by name.
"""

from __future__ import annotations

from grpo_fast.rewards.accuracy import accuracy_reward, canonical_answer, extract_answer
from grpo_fast.rewards.coherence import CoherenceReward
from grpo_fast.rewards.common import Completion, Reward
from grpo_fast.rewards.fluency import ReferenceFluencyReward, SentenceReward
from grpo_fast.rewards.language import LanguageConsistencyReward
from grpo_fast.rewards.length import CosineLengthReward, LengthReward, SoftOverlongPunishment
from grpo_fast.rewards.loading import BUILT_IN, load_reward
from grpo_fast.rewards.mathematics import MathReward, math_reward
from grpo_fast.rewards.pool import WorkerPool
from grpo_fast.rewards.repetition import CertainRunPenalty, RepetitionPenalty
from grpo_fast.rewards.runner import RewardError, RewardRunner, RewardTable, reward_matrix
from grpo_fast.rewards.structure import FormatReward, TagCountReward, format_reward, tag_count_reward

__all__ = [
    "BUILT_IN",
    "CertainRunPenalty",
    "CoherenceReward",
    "Completion",
    "CosineLengthReward",
    "FormatReward",
    "LanguageConsistencyReward",
    "LengthReward",
    "MathReward",
    "ReferenceFluencyReward",
    "RepetitionPenalty",
    "Reward",
    "RewardError",
    "RewardRunner",
    "RewardTable",
    "SentenceReward",
    "SoftOverlongPunishment",
    "TagCountReward",
    "WorkerPool",
    "accuracy_reward",
    "canonical_answer",
    "extract_answer",
    "format_reward",
    "load_reward",
    "math_reward",
    "reward_matrix",
    "tag_count_reward",
]
