"""The kernels of token_logprobs over the rows of one chunk, alone or with the vocabulary divided among processes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from grpo_fast.ops.operators import call_below_autograd

__all__ = ["RowStatistics", "Rows", "Shard", "all_vocabulary_parts", "fewest"]


class RowStatistics(NamedTuple):
    """Of tokens, float32 [1, n]; 0 under the mask's zeros."""

    logprobs: Tensor
    entropy: Tensor
    lse: Tensor


class Shard(NamedTuple):
    """The part of the vocabulary that this process holds."""

    begin: int
    size: int
    total: int  # of all processes' parts
    group: ProcessGroup


class Rows(NamedTuple):
    """Tokens and how they are scored; tensors [B, T], a chunk's [1, n]."""

    token_ids: Tensor
    mask: Tensor
    temperatures: Tensor | None  # float32; None: the number
    temperature: float
    softcap: float  # 0: none
    logit_scale: float
    shard: Shard | None = None

    def take(self, tokens: Tensor | slice) -> Rows:
        """The same of some tokens."""
        temperatures = None if self.temperatures is None else self.temperatures[:, tokens]
        return self._replace(token_ids=self.token_ids[:, tokens], mask=self.mask[:, tokens], temperatures=temperatures)

    @property
    def scoring(self) -> tuple[Tensor | None, float, float, float]:
        """As the operators take it."""
        return self.temperatures, self.temperature, self.softcap, self.logit_scale

    @property
    def own_ids(self) -> Tensor:
        """Ids within this process's part of the vocabulary, -1 where another process has the token."""
        if self.shard is None:
            return self.token_ids
        ids = self.token_ids - self.shard.begin
        return torch.where((ids >= 0) & (ids < self.shard.size), ids, -1)

    def statistics(self, logits: Tensor) -> RowStatistics:  # [B, T or T + 1, V]
        """Log-probability, entropy and log-sum-exp over the whole vocabulary."""
        ids = self.own_ids
        known = ids if self.shard is None else ids.clamp(min=0)  # any token will do where the true one is elsewhere
        operator = torch.ops.grpo_fast.token_logprobs.default
        statistics = RowStatistics(*call_below_autograd(operator, logits, known, self.mask, *self.scoring))
        if self.shard is None:
            return statistics
        return _over_all_parts(statistics, ids >= 0, self.mask, self.shard.group)

    def gradient_(self, logits: Tensor, statistics: RowStatistics, g: Tensor, h: Tensor) -> None:
        """Write d loss / d logits over the logits, from g = d loss / d logprob and h = d loss / d entropy of every token."""
        operator = torch.ops.grpo_fast.token_logprobs_backward_.default
        call_below_autograd(operator, g, h, logits, self.own_ids, self.mask, *self.scoring, *statistics)

    def gradient(self, logits: Tensor, statistics: RowStatistics, g: Tensor, h: Tensor) -> Tensor:
        """The same in new memory."""
        operator = torch.ops.grpo_fast.token_logprobs_backward.default
        return call_below_autograd(operator, g, h, logits, self.own_ids, self.mask, *self.scoring, *statistics)


class ShardedLogprobsFunction(torch.autograd.Function):
    """Log-probability and entropy from logits of which each process holds a part of the vocabulary; the gradient is that of its part."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        statistics = rows.statistics(logits)
        ctx.rows = rows
        ctx.save_for_backward(logits, *statistics)
        return statistics.logprobs, statistics.entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor, h: Tensor) -> tuple[Tensor, None]:
        logits, *statistics = ctx.saved_tensors
        return ctx.rows.gradient(logits, RowStatistics(*statistics), g, h), None


def all_vocabulary_parts(size: int, group: ProcessGroup, device: torch.device) -> Shard:
    """Where this process's part of the vocabulary begins: the parts follow one another in the order of the ranks, of any size each."""
    if not isinstance(group, ProcessGroup):
        raise TypeError(
            f"process_group is a {type(group).__name__}; expected a ProcessGroup that this process belongs to. Take "
            "torch.distributed.new_group() or a device mesh's get_group()."
        )
    mine = torch.tensor([size], device=device)
    sizes = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(sizes, mine, group=group)
    every, rank = torch.cat(sizes).tolist(), torch.distributed.get_rank(group)
    return Shard(sum(every[:rank]), size, sum(every), group)


def fewest(rows: int, group: ProcessGroup, device: torch.device) -> int:
    """The smallest of the processes' numbers: parts and free memory differ, the exchanges of statistics must not."""
    smallest = torch.tensor([rows], device=device)
    torch.distributed.all_reduce(smallest, torch.distributed.ReduceOp.MIN, group=group)
    return int(smallest)


def _over_all_parts(own: RowStatistics, has_target: Tensor, mask: Tensor, group: ProcessGroup) -> RowStatistics:
    """Statistics over the whole vocabulary from those over each part: one exchange of four numbers per token.

    Everything is taken relative to the target's s_y. For the part that holds it, with lp the log-probability within the part,
    ``lse_part - s_y = -lp`` and ``lse_others_of_part - s_y = log(-expm1(lp)) - lp``, both exact where the token is almost certain.
    """
    lp, entropy, lse = (x.double() for x in own)
    nan = torch.full_like(lp, torch.nan)
    margin_of_others = torch.where(has_target, torch.log(-torch.expm1(lp)) - lp, nan)
    packet = torch.stack([lse, entropy, torch.where(has_target, lse + lp, nan), margin_of_others])  # [4, 1, n]
    packets = [torch.empty_like(packet) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(packets, packet, group=group)
    lses, entropies, targets, margins_of_others = torch.stack(packets, 1)  # [parts, 1, n] each

    holds_target = ~targets.isnan()
    s_target = torch.where(holds_target, targets, 0).sum(0)
    s_target = torch.where(holds_target.any(0), s_target, torch.nan)  # in nobody's part: NaN, as for any id out of range
    margins = torch.where(holds_target, margins_of_others, lses - s_target)
    logprob = torch.nn.functional.logsigmoid(-margins.logsumexp(0))
    # The chain rule of entropy: that within the parts, and that of which part.
    lse = lses.logsumexp(0)
    exact = holds_target & s_target.isfinite()
    log_share = torch.where(exact, logprob - (targets - lses), lses - lse)
    share = log_share.exp()
    within = torch.where(share > 0, share * (entropies - log_share), 0).sum(0)
    statistics = (logprob, torch.where(logprob.isnan(), logprob, within), torch.where(logprob.isnan(), logprob, lse))
    return RowStatistics(*(torch.where(mask, x, 0).float() for x in statistics))
