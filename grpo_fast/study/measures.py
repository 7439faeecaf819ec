"""What completions look like, one number per completion or per group: used by the study, and by the demonstration's evaluation."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from grpo_fast.metrics import distinct_share, loop_period, repeated_ngrams

__all__ = ["by_group", "distinct_shares", "shape_of"]


def shape_of(completion_ids: Sequence[Sequence[int]], cut: Sequence[bool], ngram: int) -> dict[str, list[float]]:
    """Of each of B completions: whether it was cut at the length limit, whether in an endless loop, its repetition and its length.

    Args:
        completion_ids: B lists of token ids, with the end token where there is one.
        cut: B; whether it ran into the length limit.
        ngram: length, in tokens, of the n-grams whose repetition is counted.

    Returns:
        ``truncated`` (0 or 1), ``endless`` (1: cut, and its last tokens are copies of one block), ``repetition`` (the share of n-grams
        that occurred before), ``length`` (tokens); B numbers each.
    """
    return {
        "truncated": [float(was_cut) for was_cut in cut],
        "endless": [float(was_cut and loop_period(ids) is not None) for ids, was_cut in zip(completion_ids, cut, strict=True)],
        "repetition": [repeated_ngrams(ids, ngram) for ids in completion_ids],
        "length": [float(len(ids)) for ids in completion_ids],
    }


def distinct_shares(texts: Sequence[Hashable], group_size: int) -> list[float]:
    """Of each group of ``group_size`` completions that stand side by side: the share that differs from all before (`distinct_share`)."""
    return [distinct_share(texts[start : start + group_size]) for start in range(0, len(texts), group_size)]


def by_group(values: Sequence[float], group_size: int) -> list[list[float]]:
    """``[B]`` as ``[B / group_size][group_size]``."""
    return [list(values[start : start + group_size]) for start in range(0, len(values), group_size)]
