"""The tokens of a batch or of one chunk with the settings that score them, and the token_logprobs operators applied to their logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_fast.loss.vocab_parallel import Shard, combine_over_shards
from grpo_fast.ops.kept_logprobs import KeptArguments, KeptSets
from grpo_fast.ops.library import call_below_autograd
from grpo_fast.ops.rounding import rounded_
from grpo_fast.ops.token_logprobs import RowStatistics

__all__ = ["RowLogprobsFunction", "RowStatistics", "TokenRows"]


class TokenRows(NamedTuple):
    """Token ids and the settings that score them; tensors are ``[B, T]``, or ``[1, n]`` for a chunk of n tokens."""

    token_ids: Tensor  # int64
    mask: Tensor  # bool: the tokens that are computed
    temperatures: Tensor | None  # float32, broadcastable to token_ids; None: ``temperature`` holds for all tokens
    temperature: float
    softcap: float  # 0: no soft cap
    logit_scale: float
    shard: Shard | None = None  # None: the logits span the whole vocabulary
    sets: KeptSets | None = None  # of all positions of token_ids; None: no token is restricted
    largest_kept_set: int = 0  # a head computes the logits of larger sets over the whole vocabulary

    def take(self, tokens: Tensor | slice) -> TokenRows:
        """Select some tokens of ``[1, n]``, by index or slice along the last dimension."""
        temperatures = None if self.temperatures is None else self.temperatures[:, tokens]
        sets = self.sets
        if sets is not None:
            sets = sets.take(torch.arange(self.token_ids.shape[1], device=self.token_ids.device)[tokens])
        return self._replace(token_ids=self.token_ids[:, tokens], mask=self.mask[:, tokens], temperatures=temperatures, sets=sets)

    @property
    def scoring(self) -> tuple[Tensor | None, float, float, float]:
        """``(temperatures, temperature, softcap, logit_scale)`` in the order of the operators' arguments."""
        return self.temperatures, self.temperature, self.softcap, self.logit_scale

    @property
    def own_ids(self) -> Tensor:
        """Ids relative to this process's shard of the vocabulary; -1 where another process holds the token."""
        if self.shard is None:
            return self.token_ids
        ids = self.token_ids - self.shard.begin
        return torch.where((ids >= 0) & (ids < self.shard.size), ids, -1)

    @property
    def kept(self) -> KeptArguments:
        """The arguments of the operators ``kept_token_logprobs`` after the logits; only with ``sets``."""
        assert self.sets is not None
        first_id, vocabulary = (0, 0) if self.shard is None else (self.shard.begin, self.shard.total)
        tokens = (self.token_ids, self.mask, self.sets.token_ids, self.sets.offsets)
        return KeptArguments(*tokens, *self.scoring, first_id, vocabulary)

    def statistics(self, logits: Tensor) -> RowStatistics:
        """Compute log-probability, entropy and log-sum-exp over the whole vocabulary, or over the kept set where there is one.

        Args:
            logits: ``[B, T or T + 1, V of the shard]``.
        """
        ids = self.own_ids
        if self.sets is not None:
            statistics = RowStatistics(*call_below_autograd(torch.ops.grpo_fast.kept_token_logprobs.default, logits, *self.kept))
        else:
            valid_ids = (
                ids if self.shard is None else ids.clamp(min=0)
            )  # the operator needs a valid id even if another process has the token
            operator = torch.ops.grpo_fast.token_logprobs.default
            statistics = RowStatistics(*call_below_autograd(operator, logits, valid_ids, self.mask, *self.scoring))
        if self.shard is None:
            return statistics
        return combine_over_shards(statistics, ids >= 0, self.mask, self.shard.group)

    def gradient_(self, logits: Tensor, statistics: RowStatistics, g: Tensor, h: Tensor, *, bfloat16: bool = False) -> None:
        """Overwrite the logits with d loss / d logits, from ``g = d loss / d logprob`` and ``h = d loss / d entropy`` of every token.

        With ``bfloat16`` the gradient of float32 logits is rounded to bfloat16, in the first half of each row.
        """
        if self.sets is not None:
            call_below_autograd(torch.ops.grpo_fast.kept_token_logprobs_backward_.default, g, h, logits, *self.kept, *statistics)
            if bfloat16:
                rounded_(logits, torch.bfloat16)
            return
        arguments = (self.own_ids, self.mask, *self.scoring, *statistics)
        call_below_autograd(torch.ops.grpo_fast.token_logprobs_backward_.default, g, h, logits, *arguments, bfloat16)

    def gradient(self, logits: Tensor, statistics: RowStatistics, g: Tensor, h: Tensor) -> Tensor:
        """Return d loss / d logits in new memory; arguments as in ``gradient_``."""
        if self.sets is not None:
            operator, arguments = torch.ops.grpo_fast.kept_token_logprobs_backward.default, tuple(self.kept)
        else:
            operator = torch.ops.grpo_fast.token_logprobs_backward.default
            arguments = (self.own_ids, self.mask, *self.scoring)
        return call_below_autograd(operator, g, h, logits, *arguments, *statistics)


class RowLogprobsFunction(torch.autograd.Function):
    """Log-probability and entropy of rows with kept sets, or of which each process holds a shard of the vocabulary.

    Backward fills the gradient of this process's logits, over the logits themselves with ``inplace``.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, rows: TokenRows, inplace: bool) -> tuple[Tensor, Tensor]:
        statistics = rows.statistics(logits)
        ctx.rows, ctx.inplace = rows, inplace
        ctx.save_for_backward(logits, *statistics)
        return statistics.logprobs, statistics.entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor, h: Tensor) -> tuple[Tensor, None, None]:
        logits, *statistics = ctx.saved_tensors
        if not ctx.inplace:
            return ctx.rows.gradient(logits, RowStatistics(*statistics), g, h), None, None
        ctx.rows.gradient_(logits, RowStatistics(*statistics), g, h)
        torch.autograd.graph.increment_version(logits)  # so that autograd rejects a graph that saved these logits
        return logits.detach(), None, None
