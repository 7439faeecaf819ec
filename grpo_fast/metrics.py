"""What a sample of completions looks like: repetition, endless loops, coherence, diversity and entropy, all by rule.

Each function is a plain measure of one text, one sequence of tokens, or one group; `grpo_fast.rewards` turns some of them into rewards.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "NUMBER",
    "EntropySummary",
    "Sections",
    "coherence",
    "distinct_share",
    "entropy_summary",
    "is_truncated",
    "loop_period",
    "parse_sections",
    "repeated_ngrams",
]

NUMBER = r"\d+(?:\.\d+)?"  # what a question is about, when nothing else is said: its numbers
STEP = r"[\n;]"  # what separates the steps of a reasoning

_SECTIONS = re.compile(r"\s*<think>(?P<reasoning>.*)</think>\s*<answer>(?P<answer>.*)</answer>\s*", re.DOTALL)
_TAG = re.compile(r"</?(?:think|answer)>")


class Sections(NamedTuple):
    """The two parts of a well-formed completion."""

    reasoning: str
    answer: str


class EntropySummary(NamedTuple):
    """Entropy of the policy over the tokens that count, in nats."""

    mean: float
    median: float
    p90: float
    tokens: int


def parse_sections(text: str) -> Sections | None:
    """Split ``<think>…</think><answer>…</answer>`` (the template of DeepSeek-R1-Zero, arXiv:2501.12948, table 1) into its two parts.

    None unless each of the four tags occurs exactly once, in this order, with nothing but white space outside them.
    """
    match = _SECTIONS.fullmatch(text)
    if match is None or len(_TAG.findall(text)) != 4:
        return None
    return Sections(match["reasoning"], match["answer"])


def repeated_ngrams(tokens: Sequence[Hashable], n: int = 4) -> float:
    """Share of the n-grams that occurred before: ``1 - |different n-grams| / |n-grams|``; 0 for a sequence shorter than ``n``.

    The measure behind the repetition penalty of arXiv:2502.03373, appendix C.2.
    """
    if n < 1:
        raise ValueError(f"repeated_ngrams: n is {n}; expected at least 1, the length of the n-grams.")
    count = len(tokens) - n + 1
    if count < 1:
        return 0.0
    return 1.0 - len({tuple(tokens[i : i + n]) for i in range(count)}) / count


def is_truncated(completion_ids: Sequence[int], eos_token_id: int) -> bool:
    """Whether a completion was cut at the length limit: it holds no end-of-sequence token. (An empty one was cut as well.)"""
    return eos_token_id not in completion_ids


def loop_period(tokens: Sequence[Hashable], min_repeats: int = 3) -> int | None:
    """The smallest ``p`` such that the sequence ends in ``min_repeats`` copies of one block of ``p`` tokens, else None.

    A truncated completion with a loop period is an endless loop. Where in the block the cut fell does not matter.

    Example:
        >>> loop_period("ab" + "xyz" * 3)
        3
    """
    if min_repeats < 2:
        raise ValueError(f"loop_period: min_repeats is {min_repeats}; expected at least 2: one block alone is no loop.")
    length = len(tokens)
    for period in range(1, length // min_repeats + 1):
        if all(tokens[i] == tokens[i - period] for i in range(length - 1, length - 1 - period * (min_repeats - 1), -1)):
            return period
    return None


def coherence(prompt: str, completion: str, *, key_pattern: str = NUMBER, step_pattern: str = STEP) -> float:
    """How well a completion hangs together, from 0 to 1: the mean of three rules (of two, if the question holds no key).

    1. *Well formed*: the completion is ``<think>…</think><answer>…</answer>`` (`parse_sections`): 1 or 0.
    2. *The answer agrees with the reasoning*: the answer occurs in the last step of the reasoning, as a whole word: 1 or 0.
    3. *The reasoning agrees with the question*: the share of the question's keys (by default its numbers, each as often as the question
       has it) that the reasoning mentions. Left out if the question has none.

    A completion that breaks off is judged by what is there: rule 3 still counts, 1 and 2 do not hold. Neither rule looks at whether the
    answer is right.

    Args:
        prompt: the question.
        completion: the text that was generated.
        key_pattern: regular expression of what the reasoning must take up from the question.
        step_pattern: regular expression of what separates two steps of the reasoning.
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
    """Diversity within a group: the share of its completions that differ from all before them; ``1/G`` if all are the same."""
    if not group:
        raise ValueError("distinct_share: group is empty; expected the completions of one prompt, at least one.")
    return len(set(group)) / len(group)


def entropy_summary(
    entropy: Tensor,  # [B, T]
    mask: Tensor | None = None,  # bool or 0/1, [B, T]; None = all tokens
) -> EntropySummary:
    """Mean, median and 90th percentile of the tokens' entropy; all 0 where no token counts.

    A mean near 0 with a 90th percentile near 0 is a collapsed policy: it samples the same text again and again, and groups stop to differ.
    """
    if mask is not None and mask.shape != entropy.shape:
        raise ValueError(f"entropy_summary: mask has shape {tuple(mask.shape)}; expected that of entropy, {tuple(entropy.shape)}.")
    values = (entropy if mask is None else entropy[mask.bool()]).detach().flatten().float()
    if values.numel() == 0:
        return EntropySummary(0.0, 0.0, 0.0, 0)
    median, p90 = torch.quantile(values, torch.tensor([0.5, 0.9], device=values.device)).tolist()
    return EntropySummary(values.mean().item(), median, p90, values.numel())
