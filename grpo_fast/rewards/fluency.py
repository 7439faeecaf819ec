"""Fluency: the form of the sentences, and the log-probability of the tokens under a reference model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from grpo_fast.rewards.common import Completion, TokenValues, check_range, check_same_length, reasoning_of, rows_of, text_of

__all__ = ["ReferenceFluencyReward", "SentenceReward", "well_formed_sentence"]

_CLOSING = r"[\"'»”’)\]]"
# White space behind a full stop (3.14 has none), which up to two quotes or brackets may follow; signs of scripts without spaces; line ends.
_SENTENCE_END = re.compile(rf"(?:(?<=[.!?…])|(?<=[.!?…]{_CLOSING})|(?<=[.!?…]{_CLOSING}{{2}}))\s+|(?<=[。！？])|\n+")
_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
_CLOSED = re.compile(r"[.!?…。！？:][\"'»”’)\]*]*\Z")
_LIST_MARK = re.compile(r"\A\s*(?:[-*•#>]+|\(?(?:\d+|[A-Za-z])[.)])\s+")
_THRICE = re.compile(r"\b([^\W\d_]+)(?:\s+\1\b){2}", re.IGNORECASE)
_PAIRS = {"(": ")", "[": "]", "{": "}", "“": "”", "«": "»"}


@dataclass(frozen=True)
class SentenceReward:
    """From 0 to 1: the share of the reasoning's sentences that are complete and well formed (`well_formed_sentence`).

    The text is the content of ``<think>`` (without that tag, everything but the answer), split after ``. ! ? …`` and at line ends. A piece
    with fewer than ``min_words`` words is a formula, a heading or a label and is skipped. None if no sentence remains; 0 for an empty
    text. The rule is this package's own; it measures what DeepSeek-R1 (arXiv:2501.12948) calls fluency. A single short sentence earns the
    whole reward, so give it a small weight beside a reward for correct answers.

    Args:
        min_words: minimum number of words (runs of letters) of a sentence, at least 1.

    Example:
        >>> SentenceReward()(["?"] * 3, ["We add three and four. that makes seven the the the", "3 + 4 = 7", ""])
        [0.5, None, 0.0]
    """

    min_words: int = 3
    __name__ = "sentence_reward"

    def __post_init__(self) -> None:
        check_range("SentenceReward", "min_words", self.min_words, 1)

    def __call__(
        self,
        prompts: Sequence[Completion],
        completions: Sequence[Completion],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: object,
    ) -> list[float | None]:
        check_same_length(self.__name__, prompts=prompts, completions=completions)
        return [self._share(reasoning_of(text_of(completion))) for completion in completions]

    def _share(self, text: str) -> float | None:
        if not text.strip():
            return 0.0
        sentences = [s.strip() for s in _SENTENCE_END.split(text) if len(_WORD.findall(s)) >= self.min_words]
        return fmean(map(well_formed_sentence, sentences)) if sentences else None


def well_formed_sentence(sentence: str) -> bool:
    """Whether a sentence satisfies four rules. A list mark ("- ", "2. ") at its beginning is skipped.

    1. It does not begin with a lower-case letter.
    2. It ends with one of ``. ! ? … :``, followed by closing quotes or brackets only.
    3. Its brackets and directed quotes are closed in the right order.
    4. No word occurs three times in a row.

    Example:
        >>> well_formed_sentence("So (as shown) it is seven."), well_formed_sentence("So (as shown it is seven.")
        (True, False)
    """
    body = _LIST_MARK.sub("", sentence).strip()
    if not body or body[0].islower() or not _CLOSED.search(body) or _THRICE.search(body):
        return False
    expected: list[str] = []
    for character in body:
        if character in _PAIRS:
            expected.append(_PAIRS[character])
        elif character in _PAIRS.values() and (not expected or expected.pop() != character):
            return False
    return not expected


@dataclass(frozen=True)
class ReferenceFluencyReward:
    """Fluency under the reference model, from 0 to 1, by the mean of ``-ref_logprobs`` over the tokens (the surprise, in nats).

    1 up to a surprise of ``expected``, then linear to 0 at ``limit``. Perplexity, the exponential of the surprise, under another language
    model is a usual measure of fluency (arXiv:1912.02164). A surprise below ``expected`` earns nothing more, because an endless loop is
    more likely than any good text (arXiv:2506.13585).

    Reads ``ref_logprobs``, the reference model's log-probability of each token, which a trainer has if it computes a KL term. None without
    them, and for an empty completion.

    Args:
        expected: the surprise of good text in nats per token, at least 0. Measure it on samples of the reference model.
        limit: the surprise at which the reward is 0, in nats per token; above ``expected``.

    Example:
        >>> ReferenceFluencyReward(1.0, 5.0)(["?"] * 3, ["", "", ""], [[1, 2]] * 3, ref_logprobs=[[-0.1, -0.3], [-2.0, -4.0], None])
        [1.0, 0.5, None]
    """

    expected: float = 1.0
    limit: float = 5.0
    __name__ = "reference_fluency_reward"

    def __post_init__(self) -> None:
        check_range("ReferenceFluencyReward", "expected", self.expected, 0)
        check_range("ReferenceFluencyReward", "limit", self.limit, self.expected, above=True, what="the surprise of good text")

    def __call__(
        self,
        prompts: Sequence[Completion],
        completions: Sequence[Completion],
        completion_ids: Sequence[Sequence[int]],
        *,
        ref_logprobs: TokenValues | None = None,
        **columns: object,
    ) -> list[float | None]:
        check_same_length(self.__name__, prompts=prompts, completions=completions, completion_ids=completion_ids)
        rows = rows_of(self.__name__, "ref_logprobs", ref_logprobs, completion_ids)
        return [self._value(-fmean(row)) if row else None for row in rows]

    def _value(self, surprise: float) -> float:
        return min(max((self.limit - surprise) / (self.limit - self.expected), 0.0), 1.0)
