"""The function that a worker process of `ReasoningGymReward` calls. It is loaded by its path, so that the process does not import torch."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import reasoning_gym


def score(item: tuple[str, str, str, str]) -> float:
    """Score an answer with its generator.

    Args:
        item: name of the generator, its settings as JSON, the answer, and the entry as JSON.
    """
    name, settings, stated, entry = item
    return float(_generator(name, settings).score_answer(stated, json.loads(entry)))


@lru_cache(maxsize=8)
def _generator(name: str, settings: str) -> Any:
    return reasoning_gym.create_dataset(name, size=1, seed=0, **json.loads(settings))
