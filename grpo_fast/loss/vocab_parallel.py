"""Vocabulary parallelism: each process holds a shard of the vocabulary; statistics of the whole vocabulary are combined from the shards."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from grpo_fast.ops.token_logprobs import RowStatistics

__all__ = ["Shard", "all_reduce_min", "combine_over_shards", "gather_vocab_shards", "sum_in_rank_order_"]

_SUMMED = 2**22  # elements that sum_in_rank_order_ gathers of each process at a time


class Shard(NamedTuple):
    """The part of the vocabulary that this process holds: ids ``begin`` up to ``begin + size``."""

    begin: int
    size: int
    total: int  # size of the whole vocabulary
    group: ProcessGroup


def gather_vocab_shards(size: int, group: ProcessGroup, device: torch.device) -> Shard:
    """Exchange the sizes of the shards and return this process's shard.

    The shards follow one another in the order of the ranks and may differ in size.

    Args:
        size: number of vocabulary entries that this process holds.
        group: the processes that share the vocabulary.
        device: where the exchanged tensor lives; the group's backend must support it.

    Raises:
        TypeError: ``group`` is not a ProcessGroup that this process belongs to.
    """
    if not isinstance(group, ProcessGroup):
        raise TypeError(
            f"process_group is a {type(group).__name__}; expected a ProcessGroup that this process belongs to. Take "
            "torch.distributed.new_group() or a device mesh's get_group()."
        )
    own_size = torch.tensor([size], device=device)
    gathered = [torch.empty_like(own_size) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(gathered, own_size, group=group)
    sizes, rank = torch.cat(gathered).tolist(), torch.distributed.get_rank(group)
    return Shard(sum(sizes[:rank]), size, sum(sizes), group)


def all_reduce_min(value: int, group: ProcessGroup, device: torch.device) -> int:
    """Return the smallest value of all processes. Every process must take the same number of chunks, since each chunk is a collective."""
    smallest = torch.tensor([value], device=device)
    torch.distributed.all_reduce(smallest, torch.distributed.ReduceOp.MIN, group=group)
    return int(smallest)


def sum_in_rank_order_(x: Tensor, group: ProcessGroup) -> Tensor:
    """Replace x by its sum over the processes, added in the order of the ranks. The order of an all-reduce is the backend's own and may
    vary with the number of elements.

    Args:
        x: contiguous, of one shape in all processes.
    """
    processes = torch.distributed.get_world_size(group)
    for part in x.view(-1).split(_SUMMED):
        parts = [torch.empty_like(part) for _ in range(processes)]
        torch.distributed.all_gather(parts, part, group=group)
        part.copy_(parts[0])
        for other in parts[1:]:
            part += other
    return x


def combine_over_shards(own: RowStatistics, has_target: Tensor, mask: Tensor, group: ProcessGroup) -> RowStatistics:
    """Compute the statistics over the whole vocabulary from each shard's own statistics, with one exchange of four numbers per token.

    All quantities are taken relative to the target's ``s_y``. For the shard that holds the target, with lp the log-probability within the
    shard, ``lse_shard - s_y = -lp`` and ``lse_others_of_shard - s_y = log(-expm1(lp)) - lp``; both are exact for an almost certain token.

    Args:
        own: statistics within this process's shard.
        has_target: bool ``[B, T]``, whether this shard holds the target token.
        mask: bool ``[B, T]``, the tokens that are computed.
    """
    lp, entropy, lse = (x.double() for x in own)
    nan = torch.full_like(lp, torch.nan)
    margin_of_others = torch.where(has_target, torch.log(-torch.expm1(lp)) - lp, nan)
    packet = torch.stack([lse, entropy, torch.where(has_target, lse + lp, nan), margin_of_others])  # [4, B, T]
    packets = [torch.empty_like(packet) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(packets, packet, group=group)
    lses, entropies, targets, margins_of_others = torch.stack(packets, 1)  # [shards, B, T] each

    holds_target = ~targets.isnan()
    s_target = torch.where(holds_target, targets, 0).sum(0)
    s_target = torch.where(holds_target.any(0), s_target, torch.nan)  # no shard holds the id: NaN, as for every id out of range
    margins = torch.where(holds_target, margins_of_others, lses - s_target)
    logprob = torch.nn.functional.logsigmoid(-margins.logsumexp(0))
    # Chain rule of the entropy: the expected entropy within a shard, plus the entropy of the shard's share of the probability.
    lse = lses.logsumexp(0)
    exact = holds_target & s_target.isfinite()
    log_share = torch.where(exact, logprob - (targets - lses), lses - lse)
    share = log_share.exp()
    total_entropy = torch.where(share > 0, share * (entropies - log_share), 0).sum(0)
    statistics = (logprob, torch.where(logprob.isnan(), logprob, total_entropy), torch.where(logprob.isnan(), logprob, lse))
    return RowStatistics(*(torch.where(mask, x, 0).float() for x in statistics))
