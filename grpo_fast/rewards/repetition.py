"""Penalties for repetition: repeated n-grams, and long runs of tokens with a probability near 1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from grpo_fast.rewards.common import Completion, TokenValues, check_range, check_same_length, rows_of
from grpo_fast.utils.text_statistics import longest_certain_run, repeated_ngrams

__all__ = ["CertainRunPenalty", "RepetitionPenalty"]


@dataclass(frozen=True)
class RepetitionPenalty:
    """From ``-max_penalty`` to 0: minus the share of token n-grams that occurred before (arXiv:2502.03373, appendix C.2).

    The paper penalises the repeating tokens; here the penalty is one number per completion, as group advantages need it.

    Args:
        ngram_size: length of the n-grams in tokens; longer than the repetitions of a good answer, shorter than a loop.
        max_penalty: the penalty of a completion that consists of repetition only, at least 0.

    Example:
        >>> RepetitionPenalty(ngram_size=2)(["?"] * 2, ["", ""], [[5, 6, 5, 6, 5], [1, 2, 3, 4, 5]])
        [-0.5, 0.0]
    """

    ngram_size: int = 4
    max_penalty: float = 1.0
    __name__ = "repetition_penalty"

    def __post_init__(self) -> None:
        if self.ngram_size < 1:
            raise ValueError(f"RepetitionPenalty: ngram_size is {self.ngram_size}; expected at least 1.")
        check_range("RepetitionPenalty", "max_penalty", self.max_penalty, 0, what="since it is subtracted")

    def __call__(
        self, prompts: Sequence[Completion], completions: Sequence[Completion], completion_ids: Sequence[Sequence[int]], **columns: object
    ) -> list[float | None]:
        check_same_length(self.__name__, prompts=prompts, completions=completions, completion_ids=completion_ids)
        return [0.0 - self.max_penalty * repeated_ngrams(ids, self.ngram_size) for ids in completion_ids]


@dataclass(frozen=True)
class CertainRunPenalty:
    """``-penalty`` for a completion with ``run`` tokens in a row that each had a probability above ``threshold``, else 0.

    "Once a model enters a repetitive cycle, the probability for each token soars": MiniMax-M1 (arXiv:2506.13585) stops a sample after
    3,000 such tokens, since loops of changing wording escape n-grams. Reads ``logprobs``, the sampler's log-probability of each token;
    None without them. A short ``run`` would penalise good text, because a copied formula has high probabilities as well.

    Args:
        run: tokens, at least 1; the paper's 3,000 fits its completions of up to 80,000 tokens.
        threshold: a probability, above 0 and below 1.
        penalty: at least 0.

    Example:
        >>> import math
        >>> likely, unsure = math.log(0.999), math.log(0.5)
        >>> CertainRunPenalty(run=2)(["?"] * 2, ["", ""], [[1, 2, 3]] * 2, logprobs=[[likely, likely, unsure], [likely, unsure, likely]])
        [-1.0, 0.0]
    """

    run: int = 3000
    threshold: float = 0.99
    penalty: float = 1.0
    __name__ = "certain_run_penalty"

    def __post_init__(self) -> None:
        check_range("CertainRunPenalty", "run", self.run, 1)
        check_range("CertainRunPenalty", "penalty", self.penalty, 0, what="since it is subtracted")
        if not 0 < self.threshold < 1:
            raise ValueError(f"CertainRunPenalty: threshold is {self.threshold}; expected a probability above 0 and below 1.")

    def __call__(
        self,
        prompts: Sequence[Completion],
        completions: Sequence[Completion],
        completion_ids: Sequence[Sequence[int]],
        *,
        logprobs: TokenValues | None = None,
        **columns: object,
    ) -> list[float | None]:
        check_same_length(self.__name__, prompts=prompts, completions=completions, completion_ids=completion_ids)
        rows = rows_of(self.__name__, "logprobs", logprobs, completion_ids)
        return [None if r is None else -self.penalty if longest_certain_run(r, self.threshold) >= self.run else 0.0 for r in rows]
