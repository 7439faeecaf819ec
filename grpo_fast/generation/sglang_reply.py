"""Reads a reply of SGLang's ``/generate``, for samplers that talk to an SGLang server."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from grpo_fast.generation.protocol import Completion, SamplerError
from grpo_fast.loss.support import Support

__all__ = ["completion_from_sglang"]


def completion_from_sglang(
    reply: Mapping[str, Any], *, top_logprobs_num: int | None = None, vocab_size: int | None = None, greedy: bool = False
) -> Completion:
    """Return the completion in a reply of SGLang's ``/generate``, with the sets of tokens that truncation has kept.

    Request it with ``"return_sampling_mask": True`` and ``"return_logprob": True``. SGLang has the first since its pull request 27408 (July
    2026), and requires a ``top_k`` (35205). ``meta_info`` then has, for each token of the completion,

    - ``output_token_sampling_mask``: the ids of its set;
    - ``output_token_sampling_logprobs``: its log-probability over the set, or with ``"sampling_logprobs_mode": "support"`` those of all ids
      of the set, in the order of the set; they must then sum to 1;
    - ``output_token_logprobs``: ``[log-probability, id, text]`` over the whole vocabulary.

    Without masks the sets are taken from ``output_top_logprobs`` if they are proved to be complete, see `Support.from_top_logprobs`.
    SGLang's are computed before truncation and have no -inf, so this is an error there. Its ``output_token_ids_logprobs`` are of ids that
    the client has chosen, and say nothing about sets.

    Args:
        reply: decoded JSON of a request that was not streamed.
        top_logprobs_num: as requested; None: the reply must have masks.
        vocab_size: size of the vocabulary; None = unknown, and ids have no upper bound but that of int32.
        greedy: decoded with temperature 0: neither log-probabilities nor sets are returned.

    Raises:
        SamplerError: the reply is not of this form, or a set may have more tokens than it lists. The message says what is wrong.

    Example:
        >>> meta = {"finish_reason": {"type": "stop"}, "output_token_logprobs": [[-0.9, 5, None]]}
        >>> meta |= {"output_token_sampling_mask": [[5, 7]], "output_token_sampling_logprobs": [-0.1]}
        >>> found = completion_from_sglang({"output_ids": [5], "meta_info": meta})
        >>> found.token_ids, found.logprobs, found.support.token_ids
        ([5], [-0.1], tensor([5, 7], dtype=torch.int32))
    """
    try:
        return _completion(reply, top_logprobs_num, vocab_size, greedy)
    except (TypeError, ValueError) as error:
        masks = "" if isinstance(_meta(reply).get("output_token_sampling_mask"), list) else ' Fix: request "return_sampling_mask": true.'
        raise SamplerError(f"SGLang's reply: {error}{masks}") from error


def _meta(reply: Any) -> Mapping[str, Any]:
    meta = reply.get("meta_info") if isinstance(reply, Mapping) else None
    return meta if isinstance(meta, Mapping) else {}


def _completion(reply: Mapping[str, Any], top_logprobs_num: int | None, vocab_size: int | None, greedy: bool) -> Completion:
    meta = _meta(reply)
    ended = _ended(meta.get("finish_reason"))
    entries = _entries("output_token_logprobs", meta.get("output_token_logprobs"))
    ids = [token for _, token in entries]
    listed = reply.get("output_ids", ids)
    if listed != ids:
        raise ValueError(f"output_ids are {reprlib.repr(listed)}, output_token_logprobs of {reprlib.repr(ids)}; expected the same tokens.")
    Support.from_sampling_mask([[token] for token in ids], ids, vocab_size=vocab_size)  # checks their type and range
    if greedy:
        return Completion(ids, ended)
    mask = meta.get("output_token_sampling_mask")
    if mask is None:
        if top_logprobs_num is None:
            raise ValueError("meta_info has no output_token_sampling_mask; expected the set of each token.")
        rows = meta.get("output_top_logprobs")
        if not isinstance(rows, list):
            raise TypeError(f"output_top_logprobs is {reprlib.repr(rows)}; expected one list for each token.")
        tops = [{token: value for value, token in _entries(f"output_top_logprobs[{n}]", row)} for n, row in enumerate(rows)]
        support = Support.from_top_logprobs(tops, ids, requested=top_logprobs_num, vocab_size=vocab_size)
        return Completion(ids, ended, _checked_logprobs([value for value, _ in entries]), support)
    support = Support.from_sampling_mask(mask, ids, vocab_size=vocab_size)
    return Completion(ids, ended, _sampling_logprobs(meta.get("output_token_sampling_logprobs"), mask, ids), support)


def _ended(reason: object) -> bool:
    """Whether an end token ended the completion, and not its length limit."""
    kind = reason.get("type") if isinstance(reason, Mapping) else None
    if kind not in ("stop", "length"):
        raise ValueError(f"finish_reason is {reprlib.repr(reason)}; expected the type 'stop' or 'length'.")
    return kind == "stop"


def _entries(name: str, rows: object) -> list[tuple[float, int]]:
    """Log-probabilities and ids from a list of ``[log-probability, id, text]``."""
    if not isinstance(rows, (list, tuple)) or not all(isinstance(row, (list, tuple)) and len(row) >= 2 for row in rows):
        raise TypeError(f"{name} is {reprlib.repr(rows)}; expected a list of [log-probability, token id, text].")
    return [(row[0], row[1]) for row in rows]


def _sampling_logprobs(values: object, mask: Sequence[Sequence[int]], ids: Sequence[int]) -> list[float]:
    """The log-probabilities of the sampled tokens over their sets."""
    name = "output_token_sampling_logprobs"
    if not isinstance(values, list) or len(values) != len(ids):
        raise ValueError(f"{name} is {reprlib.repr(values)}; expected one entry for each of the {len(ids)} tokens.")
    if not any(isinstance(value, list) for value in values):
        return _checked_logprobs(values)
    found = []
    for n, (row, kept, token) in enumerate(zip(values, mask, ids, strict=True)):
        if not isinstance(row, list) or len(row) != len(kept):
            raise ValueError(f"{name}[{n}] is {reprlib.repr(row)}; expected a log-probability for each of the {len(kept)} ids of its set.")
        Support.from_top_logprobs([dict(zip(kept, row, strict=True))], [token], requested=len(kept) + 1)  # they sum to 1
        found.append(row[kept.index(token)])
    return _checked_logprobs(found)


def _checked_logprobs(values: Sequence[object]) -> list[float]:
    for n, value in enumerate(values):
        if type(value) not in (float, int) or not -math.inf < float(value) < 1e-3:  # type: ignore[arg-type]
            raise ValueError(f"the log-probability of token {n} is {reprlib.repr(value)}; expected a finite number of at most 0.")
    return [float(value) for value in values]  # type: ignore[arg-type]
