"""What a sample of completions looks like: repetition, endless loops, coherence, diversity, entropy and accuracy, all by rule.

Each function is a plain measure of one text, one sequence of tokens, or one group; `grpo_fast.rewards` turns some of them into rewards.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Hashable, Sequence
from statistics import fmean, variance
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_fast.loss.advantages import group_advantages

__all__ = [
    "NUMBER",
    "EntropySummary",
    "PassAt1",
    "Sections",
    "coherence",
    "consensus_at_k",
    "distinct_ngrams",
    "distinct_share",
    "distinct_shares",
    "entropy_summary",
    "is_truncated",
    "longest_certain_run",
    "loop_period",
    "parse_sections",
    "pass_at_1",
    "pass_at_k",
    "repeated_ngrams",
    "shape_of",
    "standard_error",
    "truncated_share",
    "zero_variance_share",
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
    if len(_TAG.findall(text)) != 4:  # first: with a tag repeated a thousand times the match takes quadratic time
        return None
    match = _SECTIONS.fullmatch(text)
    return None if match is None else Sections(match["reasoning"], match["answer"])


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


def is_truncated(completion_ids: Sequence[int], eos_token_id: int | Collection[int]) -> bool:
    """Whether a completion was cut at the length limit: it holds no end-of-sequence token. (An empty one was cut as well.)

    ``eos_token_id`` is one id or, as in many chat models' generation settings, several of which any ends a completion.
    """
    ends = (eos_token_id,) if isinstance(eos_token_id, int) else eos_token_id
    return not any(end in completion_ids for end in ends)


def truncated_share(completions: Sequence[Sequence[int]], eos_token_id: int | Collection[int]) -> float:
    """The share of the completions (token ids) that were cut at the length limit (`is_truncated`); 0 for none at all."""
    return fmean(is_truncated(ids, eos_token_id) for ids in completions) if completions else 0.0


def longest_certain_run(logprobs: Sequence[float], threshold: float = 0.99) -> int:
    """The most tokens in a row that each had a probability above ``threshold``; ``logprobs`` are the sampler's, in nats.

    In a loop the probability of every token soars: MiniMax-M1 (arXiv:2506.13585) stops a sample when this reaches 3,000.

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


def shape_of(completion_ids: Sequence[Sequence[int]], cut: Sequence[bool], n: int = 4) -> dict[str, list[float]]:
    """How each of B completions was written, whatever it says.

    Args:
        completion_ids: B lists of token ids, with the end token where there is one.
        cut: B: whether it ran into the length limit, see `is_truncated`.
        n: length of the n-grams, see `repeated_ngrams`.

    Returns:
        B numbers each: ``truncated`` (0 or 1), ``endless`` (1: cut, and with a `loop_period`), ``repetition`` (`repeated_ngrams`) and
        ``length`` (tokens).

    Example:
        >>> shape_of([[5, 6] * 3, [5, 1]], [True, False], n=2)["endless"]
        [1.0, 0.0]
    """
    return {
        "truncated": [float(was_cut) for was_cut in cut],
        "endless": [float(was_cut and loop_period(ids) is not None) for ids, was_cut in zip(completion_ids, cut, strict=True)],
        "repetition": [repeated_ngrams(ids, n) for ids in completion_ids],
        "length": [float(len(ids)) for ids in completion_ids],
    }


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


def distinct_shares(completions: Sequence[Hashable], group_size: int) -> list[float]:
    """`distinct_share` of each group.

    Args:
        completions: B = N * group_size, the completions of a group side by side.
        group_size: completions per prompt.

    Returns:
        N numbers.

    Example:
        >>> distinct_shares(["7", "7", "7", "8"], group_size=2)
        [0.5, 1.0]
    """
    return [distinct_share(completions[start : start + group_size]) for start in range(0, len(completions), group_size)]


def distinct_ngrams(group: Sequence[Sequence[Hashable]], n: int = 4) -> float:
    """Diversity within a group, in its words: ``|different n-grams| / |n-grams|`` over all its completions together (arXiv:1510.03055).

    `repeated_ngrams` looks into one completion, this also sees what several have in common. 1 where no completion is ``n`` tokens long.

    Example:
        >>> distinct_ngrams(["abc", "abd"], n=2)  # ab bc ab bd
        0.75
    """
    if n < 1:
        raise ValueError(f"distinct_ngrams: n is {n}; expected at least 1, the length of the n-grams.")
    grams = [tuple(tokens[i : i + n]) for tokens in group for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def zero_variance_share(rewards: Tensor, group_size: int) -> float:
    """The share of groups whose rewards are all equal: they teach nothing (all right: too easy, or T too low; all wrong: too hard).

    Args:
        rewards: ``[B]``, groups of ``group_size`` consecutive completions; NaN where no reward applies. Several rewards: sum them first.
        group_size: completions per prompt.
    """
    if rewards.dim() != 1:
        raise ValueError(
            f"zero_variance_share: rewards has shape {tuple(rewards.shape)}; expected [B]: the weighted sum of several rewards."
        )
    if rewards.numel() == 0:
        return 0.0
    return group_advantages(rewards, group_size=group_size).degenerate.float().mean().item()


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of N independent values: ``s / sqrt(N)`` with s the unbiased standard deviation; NaN where there is one value only.

    Example:
        >>> standard_error([0.5, 1.0])
        0.25
    """
    return math.sqrt(variance(values) / len(values)) if len(values) > 1 else math.nan


class PassAt1(NamedTuple):
    """Mean accuracy over rounds of one sample per prompt, with two errors of it; NaN where there are too few rounds or prompts to tell."""

    mean: float
    sampling_error: float  # standard error if the same prompts were sampled again: what a comparison on fixed prompts needs
    prompt_error: float  # ... and if other prompts of the same kind had been drawn: what a claim about the kind of prompt needs
    prompts: int
    rounds: int


def pass_at_1(correct: Sequence[Sequence[float]]) -> PassAt1:
    """pass@1 as DeepSeek-R1 reports it (arXiv:2501.12948): the mean of k samples per prompt, since one greedy sample misleads.

    ``sampling_error = sqrt(sum_i s_i^2 / k) / N`` with s_i^2 the unbiased variance of prompt i's k results; ``prompt_error`` is the
    `standard_error` of the prompts' means (arXiv:2411.00640).

    Args:
        correct: ``[N][k]``: for each of N prompts its k results (0 or 1, or a share), as many for each.

    Example:
        >>> result = pass_at_1([[1, 0], [1, 1]])
        >>> result.mean, result.sampling_error, result.prompt_error
        (0.75, 0.25, 0.25)
    """
    rounds = _rounds("pass_at_1", correct)
    means = [fmean(row) for row in correct]
    sampling = math.sqrt(sum(variance(row) / rounds for row in correct)) / len(correct) if rounds > 1 else math.nan
    return PassAt1(fmean(means), sampling, standard_error(means), len(correct), rounds)


def pass_at_k(correct: Sequence[Sequence[float]], k: int) -> float:
    """The chance that at least one of k samples is right, without bias from n >= k samples: ``1 - C(n-c, k) / C(n, k)`` (arXiv:2107.03374).

    Args:
        correct: ``[N][n]``: for each prompt its n results, right if above 0; c of them are. The mean over prompts is returned.
        k: from 1 to n.

    Example:
        >>> pass_at_k([[1, 0, 0, 0], [0, 0, 0, 0]], k=2)  # the first: 1 - C(3,2)/C(4,2) = 1/2
        0.25
    """
    samples = _rounds("pass_at_k", correct)
    if not 1 <= k <= samples:
        raise ValueError(f"pass_at_k: k is {k}; expected 1 to {samples}, the samples of each prompt.")
    wrong = [sum(value <= 0 for value in row) for row in correct]
    return fmean(1 - math.comb(count, k) / math.comb(samples, k) for count in wrong)


def consensus_at_k(answers: Sequence[Sequence[Hashable | None]], correct: Sequence[Sequence[float]]) -> float:
    """cons@k: the share of prompts whose most frequent answer is right (majority vote, arXiv:2203.11171; cons@64 of arXiv:2501.12948).

    A sample without an answer (None) has no vote; a prompt without any is wrong. A tie counts as its expectation if a lot decides: the mean
    over the answers that share the lead. An answer's correctness is that of the samples that gave it.

    Args:
        answers: ``[N][k]``: what each sample stated, in a form in which equal answers are equal (`grpo_fast.rewards.canonical_answer`).
        correct: ``[N][k]``: its result, 0 or 1.

    Example:
        >>> consensus_at_k([["7", "7", "8"], ["3", "4", None]], [[1, 1, 0], [1, 0, 0]])
        0.75
    """
    rounds = _rounds("consensus_at_k", correct)
    if len(answers) != len(correct) or any(len(row) != rounds for row in answers):
        raise ValueError(
            f"consensus_at_k: answers is not of the shape of correct, [{len(correct)}][{rounds}]; expected one for each result."
        )
    scores = []
    for stated, results in zip(answers, correct, strict=True):
        votes = Counter(answer for answer in stated if answer is not None)
        leaders = [answer for answer, count in votes.items() if count == max(votes.values())]
        by_leader = [fmean(result for answer, result in zip(stated, results, strict=True) if answer == leader) for leader in leaders]
        scores.append(fmean(by_leader) if by_leader else 0.0)
    return fmean(scores)


def _rounds(where: str, correct: Sequence[Sequence[float]]) -> int:
    lengths = {len(row) for row in correct}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(
            f"{where}: correct has rows of {sorted(lengths)} results; expected one row per prompt, all of the same length >= 1."
        )
    return lengths.pop()


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
