"""Statistics of generated text: sections, repetition, endless loops, coherence and diversity. Rules only; standard library only.

Each function measures one text, one sequence of tokens, or one group of completions; `grpo_fast.rewards` makes rewards of some of them.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Hashable, Sequence
from statistics import fmean
from typing import NamedTuple

__all__ = [
    "NUMBER_PATTERN",
    "STEP_PATTERN",
    "Sections",
    "coherence",
    "completion_statistics",
    "distinct_ngrams",
    "distinct_share",
    "distinct_shares",
    "is_truncated",
    "longest_certain_run",
    "loop_period",
    "parse_sections",
    "repeated_ngrams",
    "truncated_share",
]

NUMBER_PATTERN = r"\d+(?:\.\d+)?"  # default key pattern of `coherence`: the numbers of the question
STEP_PATTERN = r"[\n;]"  # default step pattern of `coherence`: what separates two steps of the reasoning

_SECTIONS = re.compile(r"\s*<think>(?P<reasoning>.*)</think>\s*<answer>(?P<answer>.*)</answer>\s*", re.DOTALL)
_TAG = re.compile(r"</?(?:think|answer)>")


class Sections(NamedTuple):
    """The two parts of a well-formed completion."""

    reasoning: str
    answer: str


def parse_sections(text: str) -> Sections | None:
    """Split ``<think>…</think><answer>…</answer>`` (the template of DeepSeek-R1-Zero, arXiv:2501.12948, table 1) into its two parts.

    Returns:
        None unless each of the four tags occurs exactly once, in this order, with only white space outside of them.

    Example:
        >>> parse_sections("<think>3 + 4</think> <answer>7</answer>")
        Sections(reasoning='3 + 4', answer='7')
    """
    if len(_TAG.findall(text)) != 4:  # checked first: the regular expression takes quadratic time on a tag repeated a thousand times
        return None
    match = _SECTIONS.fullmatch(text)
    return None if match is None else Sections(match["reasoning"], match["answer"])


def repeated_ngrams(tokens: Sequence[Hashable], n: int = 4) -> float:
    """Share of the n-grams that occurred before: ``1 - |distinct n-grams| / |n-grams|``; 0 for a sequence shorter than ``n``.

    The measure behind the repetition penalty of arXiv:2502.03373, appendix C.2.

    Example:
        >>> repeated_ngrams([1, 2, 1, 2, 1], n=2)  # 12 21 12 21
        0.5
    """
    if n < 1:
        raise ValueError(f"repeated_ngrams: n is {n}; expected at least 1, the length of the n-grams.")
    count = len(tokens) - n + 1
    if count < 1:
        return 0.0
    return 1.0 - len({tuple(tokens[i : i + n]) for i in range(count)}) / count


def is_truncated(completion_ids: Sequence[int], eos_token_id: int | Collection[int]) -> bool:
    """Whether a completion was truncated at the length limit, that is, holds no end-of-sequence token. An empty one counts as truncated.

    Args:
        completion_ids: token ids of one completion.
        eos_token_id: one id, or several of which any ends a completion (as in the generation config of many chat models).
    """
    ends = (eos_token_id,) if isinstance(eos_token_id, int) else eos_token_id
    return not any(end in completion_ids for end in ends)


def truncated_share(completions: Sequence[Sequence[int]], eos_token_id: int | Collection[int]) -> float:
    """Share of the completions (token ids) that `is_truncated`; 0 for an empty list."""
    return fmean(is_truncated(ids, eos_token_id) for ids in completions) if completions else 0.0


def longest_certain_run(logprobs: Sequence[float], threshold: float = 0.99) -> int:
    """Length of the longest run of consecutive tokens whose probabilities all exceed ``threshold``.

    In a loop the probability of every token rises: MiniMax-M1 (arXiv:2506.13585) stops generating when this length reaches 3,000.

    Args:
        logprobs: the sampler's log-probability of each token, in nats.
        threshold: a probability above 0 and below 1.

    Example:
        >>> longest_certain_run([-0.001, -2.0, -0.001, -0.002, -0.02])
        2
    """
    if not 0 < threshold < 1:
        raise ValueError(f"longest_certain_run: threshold is {threshold}; expected a probability above 0 and below 1.")
    limit = math.log(threshold)
    longest = current = 0
    for logprob in logprobs:
        current = current + 1 if logprob > limit else 0
        longest = max(longest, current)
    return longest


def loop_period(tokens: Sequence[Hashable], min_repeats: int = 3) -> int | None:
    """The smallest ``p`` such that the sequence ends in ``min_repeats`` copies of one block of ``p`` tokens; None if there is none.

    A truncated completion with a loop period is an endless loop. The position in the block at which it was truncated does not matter.

    Example:
        >>> loop_period("ab" + "xyz" * 3)
        3
    """
    if min_repeats < 2:
        raise ValueError(f"loop_period: min_repeats is {min_repeats}; expected at least 2: a single block is not a loop.")
    length = len(tokens)
    for period in range(1, length // min_repeats + 1):
        if all(tokens[i] == tokens[i - period] for i in range(length - 1, length - 1 - period * (min_repeats - 1), -1)):
            return period
    return None


def completion_statistics(completion_ids: Sequence[Sequence[int]], truncated: Sequence[bool], n: int = 4) -> dict[str, list[float]]:
    """Truncation, endless loops, repetition and length of each of B completions; none of them depends on whether it is correct.

    Args:
        completion_ids: B lists of token ids, with the end-of-sequence token where there is one.
        truncated: B flags, see `is_truncated`.
        n: length of the n-grams, see `repeated_ngrams`.

    Returns:
        Four lists of B numbers: ``truncated`` (0 or 1), ``endless`` (1: truncated, and with a `loop_period`), ``repetition``
        (`repeated_ngrams`) and ``length`` (tokens).

    Example:
        >>> completion_statistics([[5, 6] * 3, [5, 1]], [True, False], n=2)["endless"]
        [1.0, 0.0]
    """
    return {
        "truncated": [float(flag) for flag in truncated],
        "endless": [float(flag and loop_period(ids) is not None) for ids, flag in zip(completion_ids, truncated, strict=True)],
        "repetition": [repeated_ngrams(ids, n) for ids in completion_ids],
        "length": [float(len(ids)) for ids in completion_ids],
    }


def coherence(prompt: str, completion: str, *, key_pattern: str = NUMBER_PATTERN, step_pattern: str = STEP_PATTERN) -> float:
    """How coherent a completion is, from 0 to 1: the mean of three rules (of the first two if the question contains no key).

    1. *Well formed*: the completion is ``<think>…</think><answer>…</answer>`` (`parse_sections`): 1 or 0.
    2. *Answer and reasoning agree*: the answer occurs in the last step of the reasoning, as a whole word: 1 or 0.
    3. *Reasoning and question agree*: the share of the question's keys (by default its numbers, counted with repetition) that the
       reasoning mentions. This rule is skipped if the question contains no key.

    A truncated completion can still earn rule 3; rules 1 and 2 give 0. No rule depends on whether the answer is correct.

    Args:
        prompt: the question.
        completion: the generated text.
        key_pattern: regular expression of the parts of the question that the reasoning must mention.
        step_pattern: regular expression of what separates two steps of the reasoning.

    Example:
        >>> coherence("What is 3 + 4?", "<think>3 + 4; so 7</think><answer>7</answer>")
        1.0
    """
    sections = parse_sections(completion)
    if sections is None:
        answer, reasoning = "", completion.partition("<think>")[2].partition("</think>")[0]
    else:
        answer, reasoning = sections.answer.strip(), sections.reasoning
    steps = [step for step in re.split(step_pattern, reasoning) if step.strip()]
    concluded = bool(answer) and bool(steps) and re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", steps[-1]) is not None
    rules = [float(sections is not None), float(concluded)]
    keys = Counter(re.findall(key_pattern, prompt))
    if keys:
        rules.append((keys & Counter(re.findall(key_pattern, reasoning))).total() / keys.total())
    return sum(rules) / len(rules)


def distinct_share(group: Sequence[Hashable]) -> float:
    """Diversity within a group: ``|distinct completions| / G``; ``1 / G`` if all are equal."""
    if not group:
        raise ValueError("distinct_share: group is empty; expected the completions of one prompt, at least one.")
    return len(set(group)) / len(group)


def distinct_shares(completions: Sequence[Hashable], group_size: int) -> list[float]:
    """`distinct_share` of each group.

    Args:
        completions: B = N * group_size completions, those of one group consecutive.
        group_size: completions per prompt.

    Returns:
        N numbers.

    Example:
        >>> distinct_shares(["7", "7", "7", "8"], group_size=2)
        [0.5, 1.0]
    """
    return [distinct_share(completions[start : start + group_size]) for start in range(0, len(completions), group_size)]


def distinct_ngrams(group: Sequence[Sequence[Hashable]], n: int = 4) -> float:
    """Diversity of a group's n-grams: ``|distinct n-grams| / |n-grams|`` over all its completions together (arXiv:1510.03055).

    `repeated_ngrams` measures one completion; this also counts what several completions share. 1 if none has ``n`` tokens.

    Example:
        >>> distinct_ngrams(["abc", "abd"], n=2)  # ab bc ab bd
        0.75
    """
    if n < 1:
        raise ValueError(f"distinct_ngrams: n is {n}; expected at least 1, the length of the n-grams.")
    grams = [tuple(tokens[i : i + n]) for tokens in group for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0
