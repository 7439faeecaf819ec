"""Reward functions by name, for the command line and settings files: the package's own, or from a module or file."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable
from typing import Any

from grpo_fast.rewards.accuracy import accuracy_reward
from grpo_fast.rewards.coherence import CoherenceReward
from grpo_fast.rewards.common import Reward
from grpo_fast.rewards.fluency import ReferenceFluencyReward, SentenceReward
from grpo_fast.rewards.language import LanguageConsistencyReward
from grpo_fast.rewards.length import CosineLengthReward, LengthReward, SoftOverlongPunishment
from grpo_fast.rewards.mathematics import MathReward
from grpo_fast.rewards.repetition import CertainRunPenalty, RepetitionPenalty
from grpo_fast.rewards.structure import FormatReward, TagCountReward
from grpo_fast.utils.load_object import load_object

__all__ = ["BUILT_IN", "load_reward", "parse_call"]

BUILT_IN: dict[str, Callable[..., Any]] = {
    "accuracy": accuracy_reward,
    "math": MathReward,
    "format": FormatReward,
    "tag_count": TagCountReward,
    "coherence": CoherenceReward,
    "sentences": SentenceReward,
    "reference_fluency": ReferenceFluencyReward,
    "repetition": RepetitionPenalty,
    "certain_run": CertainRunPenalty,
    "length": LengthReward,
    "cosine_length": CosineLengthReward,
    "soft_overlong": SoftOverlongPunishment,
    "language": LanguageConsistencyReward,
}

_CALL = re.compile(r"(?P<what>[^()]+?)\s*(?P<settings>\(.*\))?", re.DOTALL)


def load_reward(name: str) -> Reward:
    """Load a reward function by name.

    - ``"accuracy"``: one of the package's own, see ``BUILT_IN``;
    - ``"package.module:function"`` or ``"package.module.function"``: imported;
    - ``"path/to/file.py:function"``: imported after the file's folder is added to ``sys.path``.

    Settings may follow in parentheses, as keyword arguments with plain values: ``"repetition(ngram_size=6)"``, ``"mine:Reward(weight=2)"``.
    A class is instantiated, with or without parentheses. A function is the reward itself; with parentheses it is called and returns it.

    Raises:
        ValueError: there is no such reward, or it does not take these settings.
        TypeError: what the name refers to cannot be called.

    Example:
        >>> load_reward("repetition(ngram_size=6, max_penalty=0.5)")
        RepetitionPenalty(ngram_size=6, max_penalty=0.5)
    """
    what, settings = parse_call(name)
    own = f"the package's own rewards, {', '.join(BUILT_IN)}"
    found = BUILT_IN[what] if what in BUILT_IN else load_object(what, by="load_reward", others=own)
    if settings is None and not inspect.isclass(found):
        reward = found
    else:
        try:
            reward = found(**(settings or {}))
        except TypeError as error:
            raise ValueError(f"load_reward: {what!r} does not take the settings {settings or {}} of {name!r}: {error}") from error
    if not callable(reward):
        raise TypeError(f"load_reward: {name!r} is {reward!r} ({type(reward).__name__}); expected a function that scores completions.")
    return reward


def parse_call(text: str) -> tuple[str, dict[str, Any] | None]:
    """Parse ``"name(setting=1)"`` into the name and its settings; the settings are None if there are no parentheses.

    Raises:
        ValueError: the parentheses contain something other than keyword arguments with plain values.

    Example:
        >>> parse_call("repetition(ngram_size=6)")
        ('repetition', {'ngram_size': 6})
    """
    match = _CALL.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is no name; expected 'name', or 'name(setting=1)'.")
    if match["settings"] is None:
        return match["what"], None
    try:
        call = ast.parse(f"_{match['settings']}", mode="eval").body
        if isinstance(call, ast.Call) and not call.args and all(keyword.arg for keyword in call.keywords):
            return match["what"], {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError):
        pass
    raise ValueError(f"the settings of {text!r} are {match['settings']}; expected keywords with plain values: '(ngram_size=6)'.")
