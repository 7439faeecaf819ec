"""The rules by which samplers truncate a distribution: top-k, top-p and min-p."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from grpo_fast.loss import checks

__all__ = ["truncated"]

ROWS_AT_ONCE = 256  # rows of the vocabulary that are sorted at once


def truncated(
    logits: Tensor,  # [..., V]
    *,
    temperature: float | Tensor,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    order: str,
) -> Iterator[Tensor]:
    """Yield the masks of the tokens that are kept, bool ``[n, V]`` for up to ROWS_AT_ONCE positions at a time.

    The arguments are those of ``Support.from_logits``, which documents the rules; they are validated before the first mask.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, or outside of its range.
    """
    checks.tensor("logits", logits, like=None)
    if order not in ("transformers", "vllm"):
        raise ValueError(f"order is {order!r}; expected 'transformers' or 'vllm', which apply the rules in different orders.")
    top_k = _at_least_one("top_k", top_k)
    top_p = _fraction("top_p", top_p, zero=False, off=1.0)
    min_p = _fraction("min_p", min_p, zero=True, off=0.0)
    rows = logits.detach().reshape(-1, logits.shape[-1])
    if isinstance(temperature, Tensor):
        temperatures = temperature.expand(logits.shape[:-1]).reshape(-1, 1).float()
    else:
        number = checks.float32_positive("temperature", temperature, "Greedy decoding (0) has no policy to train.")
        temperatures = torch.full((rows.shape[0], 1), number, device=rows.device)

    def kept(scores: Tensor) -> Tensor:
        if order == "vllm" and min_p is not None:
            scores = _min_p(scores, min_p)
        if top_k is not None and top_k < scores.shape[-1]:
            scores = scores.masked_fill(scores < scores.topk(top_k).values[:, -1:], -torch.inf)
        if top_p is not None:
            scores = _top_p(scores, top_p)
        if order == "transformers" and min_p is not None:
            scores = _min_p(scores, min_p)
        return scores > -torch.inf

    parts = zip(rows.split(ROWS_AT_ONCE), temperatures.split(ROWS_AT_ONCE), strict=True) if rows.shape[0] else ()
    return (kept(part.float() / at) for part, at in parts)


def _top_p(scores: Tensor, top_p: float) -> Tensor:
    ordered, index = scores.sort(dim=-1, stable=True)
    drop = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
    drop[:, -1] = False
    return scores.masked_fill(torch.zeros_like(drop).scatter(-1, index, drop), -torch.inf)


def _min_p(scores: Tensor, min_p: float) -> Tensor:
    probabilities = scores.softmax(-1)
    return scores.masked_fill(probabilities < min_p * probabilities.amax(-1, keepdim=True), -torch.inf)


def _at_least_one(name: str, value: int | None) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r} ({type(value).__name__}); expected an integer >= 1, or None to turn it off.")
    if value < 1:
        raise ValueError(f"{name} is {value}; expected an integer >= 1. Fix: None turns it off (0 and -1 in some samplers).")
    return value


def _fraction(name: str, value: float | None, *, zero: bool, off: float) -> float | None:
    """Return a number in [0, 1] or (0, 1]; None if it has no effect."""
    if value is None:
        return None
    value = checks.number(name, value, "a number up to 1, or None", "None turns it off.")
    if not (0 <= value <= 1) or (value == 0 and not zero):
        raise ValueError(f"{name} is {value!r}; expected a number in {'[' if zero else '('}0, 1]. Fix: None turns it off.")
    return None if value == off else value
