"""Finds the temperature that a sampler must have used, from its log-probabilities and the trainer's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_fast.trainer.temperature import check_positive

__all__ = ["Mismatch", "explain_mismatch"]


class Mismatch(NamedTuple):
    """How a sampler's log-probabilities compare with the trainer's. Gaps are mean absolute differences, in nats per token."""

    temperature: float  # explains the sampler's log-probabilities best
    gap: float  # at that temperature
    assumed_gap: float  # at the temperature that was assumed
    tokens: int  # how many were compared

    def explains(self, share: float = 0.25) -> bool:
        """Whether the gap at the best temperature is at most this share of the gap at the assumed one."""
        return self.gap <= share * self.assumed_gap

    def sentence(self, assumed: float) -> str:
        """Return a message for a log or an error with the cause and the fix. ``assumed`` is the temperature that was assumed."""
        found = f"The sampler's log-probabilities differ from ours at T = {assumed:g} by {self.assumed_gap:.3g} nats a token"
        if not self.explains():
            return (
                f"{found}, and no temperature explains it (the best, {self.temperature:.3g}, leaves {self.gap:.3g}). Fix: look for other "
                "weights in the sampler, a truncation or penalty, another precision, or position ids that ignore the padding."
            )
        cause = "reports log-probabilities before the temperature is applied" if abs(self.temperature - 1) < 0.02 else "draws at it"
        return (
            f"{found}; at T = {self.temperature:.3g} by {self.gap:.3g}. Most likely it {cause}. Fix: give sampler and loss one temperature."
        )


@torch.no_grad()
def explain_mismatch(
    logits_or_callable: Tensor | Callable[[float], Tensor],
    sampler_logprobs: Tensor,  # [B, T] or [N]
    token_ids: Tensor | None = None,  # int64 like sampler_logprobs; not needed with a callable
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    grid: Sequence[float] = (0.1, 0.2, 0.3, 0.5, 0.6, 0.7, 0.85, 1.0, 1.2, 1.4, 1.7, 2.0, 3.0, 5.0),
    tolerance: float = 1e-3,
    max_tokens: int = 512,
) -> Mismatch:
    """Find the temperature T* at which the trainer's log-probabilities are closest to the sampler's.

    The mean of abs(l(T) - l_sampler) is evaluated on a grid, then minimised by golden-section search around its best point.

    Args:
        logits_or_callable: logits [B, T, V] or [N, V] of the tokens that were drawn; or, if they do not fit into memory, a function from T
            to the tokens' log-probabilities, shaped like ``sampler_logprobs`` (about 30 calls).
        sampler_logprobs: the sampler's log-probabilities. Tokens for which they are not finite are ignored.
        token_ids: the tokens that were drawn; required with logits.
        mask: bool or 0/1, like ``sampler_logprobs``; None = all tokens.
        temperature: the temperature that was assumed.
        grid: the temperatures to try first, ascending.
        tolerance: relative accuracy of T*.
        max_tokens: how many tokens, evenly spread, to compare; with a callable all are compared.

    Returns:
        The temperature, the gaps and the number of tokens.

    Raises:
        ValueError: shapes do not match, no token is left to compare, or ``temperature`` is not above 0.

    Example:
        >>> logits, ids = torch.randn(64, 50), torch.randint(50, (64,))
        >>> theirs = (logits / 0.6).log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1)
        >>> round(explain_mismatch(logits, theirs, ids, temperature=1.0).temperature, 2)
        0.6
    """
    check_positive("temperature", temperature)
    valid = torch.isfinite(sampler_logprobs) if mask is None else torch.isfinite(sampler_logprobs) & mask.bool()
    if not bool(valid.any()):
        raise ValueError("sampler_logprobs has no finite value on an unmasked token; expected at least one.")
    theirs = sampler_logprobs[valid].double()
    if callable(logits_or_callable):
        ours = _from_callable(logits_or_callable, sampler_logprobs.shape, valid)
    else:
        _check_shapes(logits_or_callable, sampler_logprobs, token_ids)
        assert token_ids is not None
        kept = torch.linspace(0, theirs.numel() - 1, min(max_tokens, theirs.numel()), device=theirs.device).round().long()
        theirs = theirs[kept]
        ours = _from_logits(logits_or_callable[valid][kept].double(), token_ids[valid][kept])

    def gap(value: float) -> float:
        return float((ours(value) - theirs).abs().mean())

    gaps = [gap(value) for value in grid]
    best = min(range(len(grid)), key=gaps.__getitem__)
    refined, refined_gap = _golden_section(gap, grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)], tolerance)
    smallest, where = min((refined_gap, refined), (gaps[best], grid[best]))
    return Mismatch(where, smallest, gap(temperature), int(theirs.numel()))


def _from_callable(score: Callable[[float], Tensor], shape: torch.Size, valid: Tensor) -> Callable[[float], Tensor]:
    """The caller's function, restricted to the valid tokens, with its result's shape checked."""

    def logprobs(temperature: float) -> Tensor:
        found = score(temperature)
        if found.shape != shape:
            raise ValueError(f"the callable returned shape {list(found.shape)}; expected {list(shape)}, as sampler_logprobs.")
        return found[valid].double()

    return logprobs


def _from_logits(logits: Tensor, token_ids: Tensor) -> Callable[[float], Tensor]:
    """The tokens' log-probabilities as a function of the temperature, from logits [N, V] and ids [N]."""

    def logprobs(temperature: float) -> Tensor:
        scaled = logits / temperature
        return scaled.gather(-1, token_ids[:, None]).squeeze(-1) - scaled.logsumexp(-1)

    return logprobs


def _check_shapes(logits: Tensor, sampler_logprobs: Tensor, token_ids: Tensor | None) -> None:
    if token_ids is None or token_ids.shape != sampler_logprobs.shape or logits.shape[:-1] != sampler_logprobs.shape:
        shapes = f"logits {list(logits.shape)}, sampler_logprobs {list(sampler_logprobs.shape)}, token_ids "
        shapes += "None" if token_ids is None else str(list(token_ids.shape))
        raise ValueError(f"{shapes}; expected [..., V], and the same shape without V for the other two.")


def _golden_section(function: Callable[[float], float], low: float, high: float, tolerance: float) -> tuple[float, float]:
    """The minimum of a function with a single minimum between two points: (where, value)."""
    ratio = (math.sqrt(5) - 1) / 2
    a, b = high - ratio * (high - low), low + ratio * (high - low)
    at_a, at_b = function(a), function(b)
    while high - low > tolerance * low:
        if at_a <= at_b:
            high, b, at_b = b, a, at_a
            a = high - ratio * (high - low)
            at_a = function(a)
        else:
            low, a, at_a = a, b, at_b
            b = low + ratio * (high - low)
            at_b = function(b)
    return (a, at_a) if at_a <= at_b else (b, at_b)
