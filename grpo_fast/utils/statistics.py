"""Statistics of repeated evaluations: pass@1, pass@k, majority vote, and the standard error of a mean. Standard library only."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from statistics import fmean, variance
from typing import NamedTuple

__all__ = ["PassAt1", "consensus_at_k", "pass_at_1", "pass_at_k", "standard_error"]


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean of N independent values: ``s / sqrt(N)``, s the unbiased standard deviation; NaN for a single value.

    Example:
        >>> standard_error([0.5, 1.0])
        0.25
    """
    return math.sqrt(variance(values) / len(values)) if len(values) > 1 else math.nan


class PassAt1(NamedTuple):
    """Mean accuracy over k samples per prompt, with two standard errors; an error is NaN where there are too few samples or prompts."""

    mean: float
    sampling_error: float  # if the same prompts were sampled again: for a comparison on fixed prompts
    prompt_error: float  # if other prompts of the same kind were drawn: for a claim about the kind of prompt
    prompts: int
    rounds: int


def pass_at_1(correct: Sequence[Sequence[float]]) -> PassAt1:
    """pass@1 as DeepSeek-R1 reports it (arXiv:2501.12948): the mean over k samples per prompt instead of one greedy sample.

    ``sampling_error = sqrt(sum_i s_i^2 / k) / N``, where s_i^2 is the unbiased variance of prompt i's k results; ``prompt_error`` is the
    `standard_error` of the prompts' means (arXiv:2411.00640).

    Args:
        correct: ``[N][k]``: the k results of each of N prompts, 0 or 1 or a fraction.

    Raises:
        ValueError: no prompt, no result, or rows of different lengths.

    Example:
        >>> result = pass_at_1([[1, 0], [1, 1]])
        >>> result.mean, result.sampling_error, result.prompt_error
        (0.75, 0.25, 0.25)
    """
    rounds = _row_length("pass_at_1", correct)
    means = [fmean(row) for row in correct]
    sampling = math.sqrt(sum(variance(row) / rounds for row in correct)) / len(correct) if rounds > 1 else math.nan
    return PassAt1(fmean(means), sampling, standard_error(means), len(correct), rounds)


def pass_at_k(correct: Sequence[Sequence[float]], k: int) -> float:
    """Probability that at least one of k samples is correct, estimated without bias from n >= k samples (arXiv:2107.03374).

    ``1 - C(n - c, k) / C(n, k)`` with c the number of correct samples, averaged over the prompts.

    Args:
        correct: ``[N][n]``: the n results of each prompt; a result above 0 is correct.
        k: from 1 to n.

    Raises:
        ValueError: k is out of range, or ``correct`` is empty or ragged.

    Example:
        >>> pass_at_k([[1, 0, 0, 0], [0, 0, 0, 0]], k=2)  # first prompt: 1 - C(3,2)/C(4,2) = 1/2
        0.25
    """
    samples = _row_length("pass_at_k", correct)
    if not 1 <= k <= samples:
        raise ValueError(f"pass_at_k: k is {k}; expected 1 to {samples}, the samples of each prompt.")
    wrong = [sum(value <= 0 for value in row) for row in correct]
    return fmean(1 - math.comb(count, k) / math.comb(samples, k) for count in wrong)


def consensus_at_k(answers: Sequence[Sequence[Hashable | None]], correct: Sequence[Sequence[float]]) -> float:
    """cons@k: the share of prompts whose most frequent answer is correct (majority vote, arXiv:2203.11171; cons@64 of arXiv:2501.12948).

    A sample without an answer (None) has no vote, and a prompt without any vote is wrong. A tie counts as the mean over the tied answers,
    the expectation of a random choice. An answer's correctness is the mean over the samples that gave it.

    Args:
        answers: ``[N][k]``: the answer of each sample, in a form that compares equal for equal answers
            (`grpo_fast.rewards.canonical_answer`).
        correct: ``[N][k]``: the result of each sample, 0 or 1.

    Raises:
        ValueError: ``correct`` is empty or ragged, or ``answers`` has another shape.

    Example:
        >>> consensus_at_k([["7", "7", "8"], ["3", "4", None]], [[1, 1, 0], [1, 0, 0]])
        0.75
    """
    rounds = _row_length("consensus_at_k", correct)
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


def _row_length(where: str, correct: Sequence[Sequence[float]]) -> int:
    lengths = {len(row) for row in correct}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(
            f"{where}: correct has rows of {sorted(lengths)} results; expected one row per prompt, all of the same length >= 1."
        )
    return lengths.pop()
