"""The data of one case with the truth over its sets in float64, and the implementations that are timed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import grpo_fast as gf
from grpo_fast.benchmark.eager import eager_logprobs, eager_loss
from grpo_fast.benchmark.harness.gate import Verdict
from grpo_fast.benchmark.head.implementations import TEMPERATURE, Gradients, HeadCase, Step, arguments, compare_with_truth, make
from grpo_fast.head import kept

__all__ = ["BY_SIZE", "DEFAULT", "LABELS", "OVER_SETS", "KeptCase", "check", "make_kept", "make_kept_case"]

LABELS = {
    "kept": "grpo_fast, kept sets",
    "logits": "grpo_fast, all logits, then the sets",
    "gather": "PyTorch, gathered rows",
    "masked": "PyTorch, all logits, dense mask",
    "ours": "grpo_fast, whole vocabulary",
    "trl": "TRL, whole vocabulary",
    "liger": "Liger, whole vocabulary",
    "cce": "cut-cross-entropy, whole vocabulary",
    "apart": "grpo_fast, every set by itself",
    "chunks": "grpo_fast, no set by itself",
}
OVER_SETS = ("kept", "logits", "gather", "masked", "apart", "chunks")  # the others compute another loss, over the whole vocabulary
BY_SIZE = ("kept", "gather", "apart", "chunks")  # the time of the others does not depend on the sets
DEFAULT = tuple(name for name in LABELS if name not in ("apart", "chunks"))  # these two measure the size from which the second is faster
_TOKENS_AT_ONCE = 64  # whose rows the gathering implementation copies together
_IDS_AT_ONCE = 1 << 15  # of the truth


class KeptCase(NamedTuple):
    """A case of the benchmark of heads, with a kept set per token, and with old log-probabilities and truth over the sets."""

    head: HeadCase
    support: gf.Support


def make_kept_case(case: HeadCase, sizes: Tensor, seed: int) -> KeptCase:
    """Give the tokens of a case sets of these sizes, int64 [N]: the sampled token and other ids at random, as far apart as they can be."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary, ids = case.weight.shape[0], case.token_ids.flatten()
    sets = []
    for token, size in zip(ids.cpu(), sizes.tolist(), strict=True):
        drawn = torch.randint(vocabulary, (2 * size + 8,), generator=generator).unique()
        drawn = drawn[drawn != token]
        sets.append(torch.cat([token.view(1), drawn[torch.randperm(drawn.numel(), generator=generator)][: size - 1]]).int())
    support = gf.Support(torch.cat(sets), F.pad(sizes.cumsum(0), (1, 0))).to(ids.device)

    at, columns, first = support.positions(), support.token_ids.long(), support.offsets[:-1]  # of every id; the sampled token is the first
    flat, weight = case.hidden.flatten(0, 1).double(), case.weight
    parts = list(zip(at.split(_IDS_AT_ONCE), columns.split(_IDS_AT_ONCE), strict=True))
    logits = torch.cat([(flat[n] * weight[v].double()).sum(-1) for n, v in parts]) / TEMPERATURE
    largest = logits.new_full(ids.shape, -math.inf).scatter_reduce_(0, at, logits, "amax")
    lse = largest + torch.zeros_like(largest).index_add_(0, at, (logits - largest[at]).exp()).log()
    logprobs = (logits[first] - lse).view(case.token_ids.shape).requires_grad_()
    noise = torch.randn(logprobs.shape, generator=generator, dtype=torch.float64).to(ids.device) * 0.2
    case = replace(case, old_logprobs=(logprobs.detach() + noise).float())
    loss = eager_loss(logprobs, case.old_logprobs, case.advantages[:, None], case.mask)
    g = torch.autograd.grad(loss, logprobs)[0].flatten() / TEMPERATURE
    d_logits = -g[at] * (logits - lse[at]).exp()
    d_logits[first] += g

    tokens = case.truth.tokens
    entries = columns[torch.linspace(0, columns.numel() - 1, case.truth.entries.numel()).long().to(ids.device)]
    d_hidden = torch.stack([d_logits[at == n] @ weight[columns[at == n]].double() for n in tokens.tolist()])
    d_weight = torch.stack([d_logits[columns == v] @ flat[at[columns == v]] for v in entries.tolist()])
    truth = case.truth._replace(loss=loss.item(), d_hidden=d_hidden, entries=entries, d_weight=d_weight)
    return KeptCase(replace(case, truth=truth), support)


def check(found: Gradients, case: KeptCase) -> Verdict:
    """How far a result over the sets is from the truth."""
    return compare_with_truth(found, case.head.truth, case.head.hidden.dtype)


def make_kept(name: str, case: KeptCase) -> Step:
    """The implementation of that name.

    Raises:
        UnavailableError: its package is not installed, or cannot be imported.
    """
    return _MAKE[name](case) if name in _MAKE else make(name, case.head)


def _clipped(case: HeadCase, logprobs: Tensor) -> Tensor:
    return eager_loss(logprobs.view(case.token_ids.shape), case.old_logprobs, case.advantages[:, None], case.mask)


def _gather(case: KeptCase) -> Step:
    """Log-probabilities of the first id of each set, from a copy of the rows of each set."""
    head, support = case

    def step(hidden: Tensor, weight: Tensor) -> Tensor:
        flat, sizes = hidden.flatten(0, -2), support.sizes
        found = []
        for some in torch.arange(len(support), device=hidden.device).split(_TOKENS_AT_ONCE):
            inside = torch.arange(int(sizes[some].max()), device=hidden.device) < sizes[some].unsqueeze(1)
            ids = torch.zeros(inside.shape, dtype=torch.int64, device=hidden.device)
            ids[inside] = support.take(some).token_ids.long()
            logits = (weight[ids] @ flat[some].unsqueeze(-1)).squeeze(-1).float().masked_fill(~inside, -torch.inf)
            found.append(eager_logprobs(logits, torch.zeros_like(ids[:, 0]), TEMPERATURE)[0])
        return _clipped(head, torch.cat(found))

    return step


def _dense_mask(case: KeptCase) -> Step:
    """All logits, and -inf outside of the sets, as trainers do that replay the sampler's mask. The mask is there before."""
    head, support = case
    outside = ~support.dense(head.weight.shape[0]).view(*head.token_ids.shape, -1)

    def step(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = F.linear(hidden, weight).float().masked_fill(outside, -torch.inf)
        return _clipped(head, eager_logprobs(logits, head.token_ids, TEMPERATURE)[0])

    return step


def _kept(case: KeptCase, share: int | None = None) -> Step:
    """Sets of at most 1 / share of the vocabulary by themselves; None: as the package decides."""
    head, support = case

    def step(hidden: Tensor, weight: Tensor) -> Tensor:
        shares = dict(kept.LARGEST_SHARES)
        try:
            kept.LARGEST_SHARES |= dict.fromkeys(shares, share) if share else {}
            return gf.linear_grpo_loss(hidden, weight, head.token_ids, head.advantages, support=support, **arguments(head)).loss
        finally:
            kept.LARGEST_SHARES |= shares

    return step


def _logits(case: KeptCase) -> Step:
    """All logits of the vocabulary at once, and the loss over the sets from them."""
    head, support = case

    def step(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = F.linear(hidden, weight)
        return gf.grpo_loss(logits, head.token_ids, head.advantages, support=support, inplace=True, **arguments(head)).loss

    return step


_MAKE: dict[str, Callable[[KeptCase], Step]] = {
    "kept": _kept,
    "logits": _logits,
    "gather": _gather,
    "masked": _dense_mask,
    "apart": lambda case: _kept(case, 1),
    "chunks": lambda case: _kept(case, 1 << 30),
}
