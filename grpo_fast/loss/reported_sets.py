"""Checks kept sets as inference servers report them: lists of ids, or the largest log-probabilities of the truncated distribution.

What a server reports is not trusted, and a set that may be incomplete is an error: a policy over a part of the set is another policy.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping, Sequence

__all__ = ["LARGEST_ID", "LOWEST_LOGPROB", "IncompleteSetError", "checked_sets", "sets_of_top_logprobs"]

LARGEST_ID = 2**31 - 1  # of int32
LOWEST_LOGPROB = -9999.0  # vLLM reports -inf as this number, because JSON has no infinity
NORMALISED = 1e-4  # how far the probabilities of a set may sum from 1; log-probabilities in float32 leave 1e-5


class IncompleteSetError(ValueError):
    """A server may have reported only a part of the set of a position."""


def checked_sets(
    sets: Sequence[Sequence[int]], token_ids: Sequence[int], vocab_size: int | None, *, name: str = "sampling_mask"
) -> list[list[int]]:
    """Check one list of ids per sampled token.

    Args:
        sets: for each position the ids that the sampler could have drawn.
        token_ids: the tokens that it drew, valid ids.
        vocab_size: number of ids; None = unknown, and ids have no upper bound but that of int32.
        name: of ``sets``, for messages.

    Returns:
        The lists; an empty one, which means no restriction, for a position that keeps the whole vocabulary.

    Raises:
        TypeError: something is no list, or an id is no integer.
        ValueError: another number of lists than of tokens; a list is empty, has an id twice or out of range, or lacks the sampled token.
    """
    if not isinstance(sets, (list, tuple)):
        raise TypeError(f"{name} is {reprlib.repr(sets)}; expected a list with one list of token ids for each sampled token.")
    if len(sets) != len(token_ids):
        raise ValueError(f"{name} has {len(sets)} entries for {len(token_ids)} sampled tokens; expected one for each.")
    size = LARGEST_ID + 1 if vocab_size is None else vocab_size
    return [_checked(f"{name}[{n}]", ids, token, size) for n, (ids, token) in enumerate(zip(sets, token_ids, strict=True))]


def _checked(where: str, ids: Sequence[int], token: int, size: int) -> list[int]:
    if not isinstance(ids, (list, tuple)):
        raise TypeError(f"{where} is {reprlib.repr(ids)}; expected a list of token ids.")
    if not set(map(type, ids)) <= {int}:
        bad = next(x for x in ids if type(x) is not int)
        raise TypeError(f"{where} holds {reprlib.repr(bad)}; expected integer token ids.")
    if not ids:
        raise ValueError(f"{where} is empty; expected at least the sampled token.")
    for bad in (min(ids), max(ids)):
        if not 0 <= bad < size:
            raise ValueError(f"{where} holds id {reprlib.repr(bad)}; expected 0 <= id < {size}, the size of the vocabulary.")
    distinct = set(ids)
    if len(distinct) != len(ids):
        raise ValueError(f"{where} holds {len(ids)} ids, of which {len(distinct)} are different; expected each id once.")
    if token not in distinct:
        raise ValueError(f"{where} has {len(ids)} ids, and the sampled token {token} is not among them; expected it in its set.")
    return [] if len(ids) == size else list(ids)


def sets_of_top_logprobs(
    top_logprobs: Sequence[Mapping[int, float]], requested: int, vocab_size: int | None, *, name: str = "top_logprobs"
) -> list[list[int]]:
    """Return the ids that have a probability, of each position, where that is proved to be all of the set.

    A server that computes log-probabilities after truncation gives -inf to each token outside of the set. So a set is complete if the
    ``requested`` largest ones include a -inf, if fewer finite ones exist than were requested, or if all tokens have one. A kept token whose
    log-probability is below -9999 counts as outside; its probability is 0 in float32.

    Args:
        top_logprobs: for each position the largest log-probabilities by token id; -inf may be written as -9999.
        requested: how many were requested for each position.
        vocab_size: number of ids; None = unknown.
        name: of ``top_logprobs``, for messages.

    Raises:
        TypeError: an entry is no mapping from ids to numbers.
        IncompleteSetError: a set may have more ids than were reported.
        ValueError: a number is NaN or above 0, or the probabilities of a set do not sum to 1.
    """
    if not isinstance(top_logprobs, (list, tuple)):
        raise TypeError(f"{name} is {reprlib.repr(top_logprobs)}; expected a list with one mapping for each sampled token.")
    return [_set_of(f"{name}[{n}]", entries, requested, vocab_size) for n, entries in enumerate(top_logprobs)]


def _set_of(where: str, entries: Mapping[int, float], requested: int, vocab_size: int | None) -> list[int]:
    if not isinstance(entries, Mapping):
        raise TypeError(f"{where} is {reprlib.repr(entries)}; expected log-probabilities by token id.")
    for token, value in entries.items():
        if type(value) not in (float, int):
            raise TypeError(f"{where} has the log-probability {reprlib.repr(value)} for token {reprlib.repr(token)}; expected a number.")
        if not value < 1e-3:  # NaN too
            raise ValueError(f"{where} has the log-probability {reprlib.repr(value)} for token {reprlib.repr(token)}; expected at most 0.")
    kept = [token for token, value in entries.items() if value > LOWEST_LOGPROB]
    if len(kept) == len(entries) and len(kept) >= requested and (vocab_size is None or len(kept) < vocab_size):
        raise IncompleteSetError(
            f"{where} has {len(kept)} tokens, {requested} were requested, and none of them is outside of the set (-inf), so that the set "
            "may have more; expected one that is proved to be complete."
        )
    total = math.fsum(math.exp(entries[token]) for token in kept)
    if abs(total - 1) > NORMALISED:
        raise ValueError(
            f"{where}: the probabilities of the {len(kept)} tokens sum to {total:.6g}; expected 1, since they must be those after "
            "truncation, which leaves tokens outside of the set none."
        )
    return kept
