"""The operators ``kept_token_logprobs``: log-probability and entropy of the softmax over a kept set of the vocabulary per token.

A position whose set is empty is scored over the whole vocabulary, by ``token_logprobs``. For the others the logits of the sets are gathered
into small matrices of rows with similar sizes, and scored by the same operator: of these rows no other logit is read. The padding of the
small matrices is -inf, so scale and soft cap are applied while gathering.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_fast.ops.library import LIBRARY, define
from grpo_fast.ops.token_logprobs import RowStatistics, TokenLogprobsArguments

__all__ = ["KeptArguments", "KeptRows", "KeptSets", "capped", "kept_rows"]

ELEMENTS_AT_ONCE = 1 << 20  # of a small matrix: bounds the memory where sets are large
DUPLICATES_ARE_REFUSED = ("cpu",)  # by Support, which may read values there; sorting costs up to 7% of the loss over sets in no order
_GROUPS = 33  # of sizes: none, 1, 2, up to 4, ... up to 2^31


class KeptSets(NamedTuple):
    """The kept sets of ``[B, T]`` positions, in compressed form (see grpo_fast.Support); an empty set is the whole vocabulary."""

    token_ids: Tensor  # int32 [K]
    offsets: Tensor  # int64 [B * T + 1]

    def take(self, positions: Tensor) -> KeptSets:
        """Return the sets of some positions, int64 ``[n]``, in their order."""
        sizes = self.offsets.diff()[positions]
        offsets = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
        shift = torch.repeat_interleave(self.offsets[positions] - offsets[:-1], sizes)
        return KeptSets(self.token_ids[shift + torch.arange(shift.shape[0], device=shift.device)], offsets)


class KeptRows(NamedTuple):
    """Some positions whose sets are of similar size, and the columns of the logits that hold their ids."""

    positions: Tensor  # int64 [n], into the flattened [B, T]
    columns: Tensor  # int64 [n, K]; -1 in the padding, and for ids that another process holds
    target: Tensor  # int64 [n], the place of the sampled token in the row; -1 if this process does not hold it, or it is not in the set
    elsewhere: Tensor  # bool [n]: another process holds the sampled token, and the set is valid

    @property
    def valid(self) -> Tensor:
        return self.columns >= 0


class KeptArguments(NamedTuple):
    """The arguments of ``kept_token_logprobs`` after the logits, in the order of the schema."""

    token_ids: Tensor  # int64 [B, T], ids of the whole vocabulary
    mask: Tensor  # bool [B, T]
    set_ids: Tensor
    set_offsets: Tensor
    temperatures: Tensor | None
    temperature: float
    softcap: float
    logit_scale: float
    first_id: int  # the id of the first column
    vocabulary: int  # 0, or the number of ids of all processes: the statistics are then those of this process's part of each set

    @property
    def sharded(self) -> bool:
        return self.vocabulary > 0

    def of_whole_vocabulary(self, columns: int, *, gradient: bool) -> TokenLogprobsArguments:
        """Return the arguments of ``token_logprobs`` for the positions without restriction."""
        unrestricted = self.mask & (self.set_offsets.diff() == 0).view(self.mask.shape)
        ids = self.token_ids - self.first_id
        if self.sharded:  # -1 stands for a token that another process holds; the forward operator needs a valid id
            ids = torch.where((ids >= 0) & (ids < columns), ids, -1 if gradient else 0)
        return TokenLogprobsArguments(ids, unrestricted, self.temperatures, self.temperature, self.softcap, self.logit_scale)

    def of_kept(self, rows: KeptRows, target: Tensor) -> TokenLogprobsArguments:
        """Return the arguments of ``token_logprobs`` for a small matrix of scaled and capped logits ``[1, n, K]``."""
        temperatures = None
        if self.temperatures is not None:
            temperatures = self.temperatures.expand(self.mask.shape).reshape(1, -1)[:, rows.positions]
        mask = torch.ones_like(target, dtype=torch.bool).unsqueeze(0)
        return TokenLogprobsArguments(target.unsqueeze(0), mask, temperatures, self.temperature, 0.0, 1.0)

    def rows(self, columns: int) -> Iterator[KeptRows]:
        """The restricted positions, see ``kept_rows``."""
        sets = KeptSets(self.set_ids, self.set_offsets)
        return kept_rows(sets, self.token_ids, self.mask, first_id=self.first_id, columns=columns, vocabulary=self.vocabulary)

    def statistics(self, s: Tensor, rows: KeptRows) -> list[Tensor]:
        """Return log-probability, entropy and log-sum-exp ``[n]`` of scaled and capped logits ``[n, K]``, -inf in the padding."""
        target = torch.where(rows.elsewhere, 0, rows.target) if self.sharded else rows.target
        found = torch.ops.grpo_fast.token_logprobs.default(s.unsqueeze(0), *self.of_kept(rows, target))
        if self.sharded:  # a process that holds no id of a set has no share in its probability
            none = rows.elsewhere & ~rows.valid.any(1)
            found = [torch.where(none, empty, x) for x, empty in zip(found, (0.0, 0.0, -torch.inf), strict=True)]
        return [x.squeeze(0) for x in found]

    def gradient_(self, s: Tensor, rows: KeptRows, statistics: RowStatistics, g: Tensor, h: Tensor) -> None:
        """Overwrite scaled and capped logits ``[n, K]`` with their gradient; the other tensors are those of all positions, ``[B, T]``."""
        g_rows, h_rows, *of_rows = (x.reshape(1, -1)[:, rows.positions] for x in (g, h, *statistics))
        of_kept = self.of_kept(rows, rows.target)
        torch.ops.grpo_fast.token_logprobs_backward_.default(g_rows, h_rows, s.unsqueeze(0), *of_kept, *of_rows)


def kept_rows(sets: KeptSets, token_ids: Tensor, mask: Tensor, *, first_id: int, columns: int, vocabulary: int) -> Iterator[KeptRows]:
    """Yield the restricted positions that the mask selects, grouped by the size of their sets: 1, 2, up to 4, up to 8, ... ids.

    A set without the sampled token, with an id twice or outside of the vocabulary, or with offsets that decrease or are outside of the ids,
    has no target in any process, so that its log-probability is NaN; nothing outside of the columns is read.

    The number of positions of each size is read from the device: one synchronisation on a GPU.

    Args:
        sets: of all positions.
        token_ids: int64 ``[B, T]``, the sampled tokens.
        mask: bool ``[B, T]``.
        first_id: the id of the first column of the logits.
        columns: the number of columns. Ids outside of them are never read.
        vocabulary: if other processes hold other ids, the number of the ids of all; else 0.
    """
    sizes, device = sets.offsets.diff(), sets.offsets.device
    exponents = (2 * sizes - 1).clamp(min=1).double().log2().floor().long()  # ceil(log2(size))
    groups = torch.where(mask.flatten() & (sizes != 0), exponents + 1, 0)
    per_group = (groups.unsqueeze(1) == torch.arange(_GROUPS, device=device)).sum(0)
    *counts, unordered = torch.cat([per_group, _unordered(sets)]).tolist()
    ids_of_all = sets.token_ids if sets.token_ids.shape[0] > 0 else sets.token_ids.new_full((1,), -1)
    order = groups.argsort(stable=True).split(counts)
    for exponent, positions_of_group in enumerate(order[1:]):
        for positions in positions_of_group.split(max(ELEMENTS_AT_ONCE >> exponent, 1)):
            if positions.numel() == 0:
                continue
            place = torch.arange(1 << exponent, device=device)
            valid = place < sizes[positions].unsqueeze(1)
            index = torch.where(valid, sets.offsets[positions].unsqueeze(1) + place, 0)
            inside = (index >= 0) & (index < ids_of_all.shape[0])
            all_ids = torch.where(inside, ids_of_all[index.clamp(0, ids_of_all.shape[0] - 1)].long(), -1)
            wrong = (sizes[positions] < 0) | (valid & ((all_ids < 0) | (all_ids >= (vocabulary or columns)))).any(1)
            if unordered and device.type not in DUPLICATES_ARE_REFUSED:
                in_order = torch.where(valid, all_ids, -1 - place).sort(1).values
                wrong |= (in_order[:, 1:] == in_order[:, :-1]).any(1)
            ids, token = all_ids - first_id, token_ids.flatten()[positions] - first_id
            valid &= (ids >= 0) & (ids < columns)
            is_target = valid & (ids == token.unsqueeze(1))
            target = torch.where(is_target.any(1) & ~wrong, is_target.int().argmax(1), -1)
            yield KeptRows(positions, torch.where(valid, ids, -1), target, ((token < 0) | (token >= columns)) & ~wrong)


def _unordered(sets: KeptSets) -> Tensor:
    """Return whether the ids of any set are not in increasing order, int64 [1]. Ordered sets, which samplers return, have no duplicates."""
    ids = sets.token_ids
    begins = torch.zeros(ids.shape[0] + 1, dtype=torch.bool, device=ids.device)
    begins.index_fill_(0, sets.offsets.clamp(0, ids.shape[0]), True)
    return ((ids[1:] <= ids[:-1]) & ~begins[1:-1][: max(ids.shape[0] - 1, 0)]).any().long().unsqueeze(0)


def capped(logits: Tensor, softcap: float, logit_scale: float) -> tuple[Tensor, Tensor | float]:
    """Apply scale and soft cap in float32; return the result and its derivative.

    The derivative is computed from the exponential, which keeps its relative precision where tanh is almost 1.
    """
    s = logits.float() * logit_scale
    if softcap == 0:
        return s, logit_scale
    e = torch.exp(-2 * (s / softcap).abs())
    return softcap * torch.tanh(s / softcap), 4 * e / (1 + e).square() * logit_scale


_ROWS = (
    "{logits}, Tensor token_ids, Tensor mask, Tensor set_ids, Tensor set_offsets, Tensor? temperatures, float temperature, float softcap, "
    "float logit_scale, int first_id, int vocabulary"
)
_BACKWARD = "(Tensor g, Tensor h, " + _ROWS + ", Tensor logprobs, Tensor entropy, Tensor lse) -> {result}"
define(f"kept_token_logprobs({_ROWS.format(logits='Tensor logits')}) -> (Tensor logprobs, Tensor entropy, Tensor lse)")
define("kept_token_logprobs_backward" + _BACKWARD.format(logits="Tensor logits", result="Tensor"))
define("kept_token_logprobs_backward_" + _BACKWARD.format(logits="Tensor(a!) logits", result="()"))  # overwrites the logits


def _index(rows: KeptRows, given: KeptArguments) -> tuple[Tensor, Tensor, Tensor]:
    """Return an index of the logits ``[B, T or T + 1, V]`` at the columns of these rows, broadcastable to ``[n, K]``."""
    length = given.mask.shape[1]
    return (rows.positions // length).unsqueeze(1), (rows.positions % length).unsqueeze(1), rows.columns.clamp(min=0)


def _gathered(logits: Tensor, rows: KeptRows, given: KeptArguments) -> tuple[Tensor, Tensor | float]:
    """Return the scaled and capped logits ``[n, K]``, -inf in the padding, and the derivative of scale and soft cap."""
    s, derivative = capped(logits[_index(rows, given)], given.softcap, given.logit_scale)
    return torch.where(rows.valid, s, -torch.inf), derivative


def _forward(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    given, columns = KeptArguments(*arguments), logits.shape[-1]
    of_vocabulary = given.of_whole_vocabulary(columns, gradient=False)
    statistics = torch.ops.grpo_fast.token_logprobs.default(logits, *of_vocabulary)
    for rows in given.rows(columns):
        s, _ = _gathered(logits, rows, given)
        for into, part in zip(statistics, given.statistics(s, rows), strict=True):
            into.view(-1)[rows.positions] = part
    return statistics


def _backward(g: Tensor, h: Tensor, logits: Tensor, *arguments: Any) -> Tensor:
    return _gradient(g, h, logits, *arguments, inplace=False)


def _backward_inplace(g: Tensor, h: Tensor, logits: Tensor, *arguments: Any) -> None:
    _gradient(g, h, logits, *arguments, inplace=True)


def _gradient(g: Tensor, h: Tensor, logits: Tensor, *arguments: Any, inplace: bool) -> Tensor:
    *of_tokens, logprobs, entropy, lse = arguments
    given, statistics, columns = KeptArguments(*of_tokens), RowStatistics(logprobs, entropy, lse), logits.shape[-1]
    g, h = g.expand_as(logprobs), h.expand_as(logprobs)

    def gradients() -> Iterator[tuple[KeptRows, Tensor]]:  # [n, K] each
        for rows in given.rows(columns):
            s, derivative = _gathered(logits, rows, given)
            given.gradient_(s, rows, statistics, g, h)
            yield rows, (s * derivative).to(logits.dtype)

    # The operator below writes 0 to the rows of restricted positions. Where it overwrites the logits, their gradients are computed before.
    found: Iterable[tuple[KeptRows, Tensor]] = list(gradients()) if inplace else gradients()
    of_vocabulary = given.of_whole_vocabulary(columns, gradient=True)
    if inplace:
        into = logits
        torch.ops.grpo_fast.token_logprobs_backward_.default(g, h, logits, *of_vocabulary, *statistics)
    else:
        into = torch.ops.grpo_fast.token_logprobs_backward.default(g, h, logits, *of_vocabulary, *statistics)
    for rows, gradient in found:
        # The padding writes what another place of its row writes, or 0 to a row without any: a GPU need not wait for the number of places.
        place = rows.valid.int().argmax(1, keepdim=True)
        gradient = torch.where(rows.valid, gradient, torch.where(rows.valid, gradient, 0).gather(1, place))
        rows = rows._replace(columns=torch.where(rows.valid, rows.columns, rows.columns.gather(1, place)))
        into[_index(rows, given)] = gradient
    return into


for _name, _function in (
    ("kept_token_logprobs", _forward),
    ("kept_token_logprobs_backward", _backward),
    ("kept_token_logprobs_backward_", _backward_inplace),
):
    LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")


@torch.library.register_fake("grpo_fast::kept_token_logprobs", lib=LIBRARY)
def _fake(logits: Tensor, token_ids: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    logprobs = torch.empty_like(token_ids, dtype=torch.float32, memory_format=torch.contiguous_format)
    return logprobs, torch.empty_like(logprobs), torch.empty_like(logprobs)


@torch.library.register_fake("grpo_fast::kept_token_logprobs_backward", lib=LIBRARY)
def _backward_fake(g: Tensor, h: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@torch.library.register_fake("grpo_fast::kept_token_logprobs_backward_", lib=LIBRARY)
def _backward_inplace_fake(g: Tensor, h: Tensor, logits: Tensor, *_: Any) -> None:
    return None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, given = inputs[0], KeptArguments(*inputs[1:])
    ctx.numbers = (given.temperature, given.softcap, given.logit_scale, given.first_id, given.vocabulary)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(logits, given.token_ids, given.mask, given.set_ids, given.set_offsets, given.temperatures, *output)


def _autograd(ctx: Any, g: Tensor | None, h: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    none = (None,) * len(KeptArguments._fields)
    if g is None and h is None:
        return None, *none
    logits, token_ids, mask, set_ids, set_offsets, temperatures, *statistics = ctx.saved_tensors
    zeros = torch.zeros_like(statistics[0])
    given = KeptArguments(token_ids, mask, set_ids, set_offsets, temperatures, *ctx.numbers)
    g, h = zeros if g is None else g, zeros if h is None else h
    return torch.ops.grpo_fast.kept_token_logprobs_backward.default(g, h, logits, *given, *statistics), *none


torch.library.register_autograd("grpo_fast::kept_token_logprobs", _autograd, setup_context=_setup_context, lib=LIBRARY)
