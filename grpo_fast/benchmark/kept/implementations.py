"""The data of one case with the truth over its sets in float64, and the implementations that are timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

import grpo_fast as gf
from grpo_fast.benchmark.eager import eager_logprobs, eager_loss
from grpo_fast.benchmark.harness.gate import Verdict
from grpo_fast.benchmark.head.implementations import TEMPERATURE, Gradients, HeadCase, Step, arguments, compare_with_truth, make

__all__ = ["IMPLEMENTATIONS", "LABELS", "OVER_SETS", "KeptCase", "check", "make_kept", "make_kept_case"]

LABELS = {
    "kept": "grpo_fast, kept sets",
    "masked": "grpo_fast, whole vocabulary, then the sets",
    "gather": "PyTorch, gathered rows",
    "ours": "grpo_fast, whole vocabulary",
    "trl": "TRL, whole vocabulary",
    "liger": "Liger, whole vocabulary",
    "cce": "cut-cross-entropy, whole vocabulary",
}
IMPLEMENTATIONS = tuple(LABELS)
OVER_SETS = ("kept", "masked", "gather")  # the others compute another loss, over the whole vocabulary, at the same time for any set
_TOKENS_AT_ONCE = 64  # whose rows the gathering implementation copies together


class KeptCase(NamedTuple):
    """A case of the benchmark of heads, with a kept set per token, and with old log-probabilities and truth over the sets."""

    head: HeadCase
    support: gf.Support


def make_kept_case(case: HeadCase, sizes: Tensor, seed: int) -> KeptCase:
    """Give the tokens of a case sets of these sizes, int64 [N]: the sampled token and other ids at random, as far apart as they can be."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary, ids = case.weight.shape[0], case.token_ids.flatten()
    sets = []
    for token, size in zip(ids.tolist(), sizes.tolist(), strict=True):
        drawn = torch.randint(vocabulary, (2 * size + 8,), generator=generator).unique()
        drawn = drawn[drawn != token]
        sets.append([token, *drawn[torch.randperm(drawn.numel(), generator=generator)][: size - 1].tolist()])
    support = gf.Support.from_lists(sets)
    logprobs = torch.cat(_by_gathering(case.hidden.double(), case.weight.double(), support))
    noise = torch.randn(ids.shape, generator=generator, dtype=torch.float64) * 0.2
    case = replace(case, old_logprobs=(logprobs + noise).float().view(case.token_ids.shape))
    leaves = case.hidden.double().requires_grad_(), case.weight.double().requires_grad_()
    loss = _gathered_loss(case, support)(*leaves)
    d_hidden, d_weight = torch.autograd.grad(loss, leaves)
    tokens = case.truth.tokens
    entries = support.token_ids[torch.linspace(0, support.token_ids.numel() - 1, case.truth.entries.numel()).long()].long()
    truth = case.truth._replace(loss=loss.item(), d_hidden=d_hidden.flatten(0, 1)[tokens], entries=entries, d_weight=d_weight[entries])
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


def _by_gathering(hidden: Tensor, weight: Tensor, support: gf.Support) -> list[Tensor]:
    """Log-probabilities of the first id of each set, by a copy of the rows of each set."""
    flat, sizes = hidden.flatten(0, -2), support.sizes
    found = []
    for some in torch.arange(len(support)).split(_TOKENS_AT_ONCE):
        sets, width = support.take(some), int(sizes[some].max())
        inside = torch.arange(width) < sizes[some].unsqueeze(1)
        ids = torch.zeros(len(some), width, dtype=torch.int64)
        ids[inside] = sets.token_ids.long()
        logits = (weight[ids] @ flat[some].unsqueeze(-1)).squeeze(-1)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        first = torch.zeros(len(some), dtype=torch.int64)
        found.append(eager_logprobs(logits.masked_fill(~inside, -torch.inf), first, TEMPERATURE)[0])
    return found


def _gathered_loss(case: HeadCase, support: gf.Support) -> Step:
    def step(hidden: Tensor, weight: Tensor) -> Tensor:
        logprobs = torch.cat(_by_gathering(hidden, weight, support)).view(case.token_ids.shape)
        return eager_loss(logprobs, case.old_logprobs, case.advantages[:, None], case.mask)

    return step


def _gather(case: KeptCase) -> Step:
    return _gathered_loss(*case)


def _kept(case: KeptCase) -> Step:
    head, support = case
    return lambda hidden, weight: (
        gf.linear_grpo_loss(hidden, weight, head.token_ids, head.advantages, support=support, **arguments(head)).loss
    )


def _masked(case: KeptCase) -> Step:
    """All logits of the vocabulary at once, and the loss over the sets from them."""
    head, support = case

    def step(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = torch.nn.functional.linear(hidden, weight)
        return gf.grpo_loss(logits, head.token_ids, head.advantages, support=support, inplace=True, **arguments(head)).loss

    return step


_MAKE: dict[str, Callable[[KeptCase], Step]] = {"kept": _kept, "masked": _masked, "gather": _gather}
