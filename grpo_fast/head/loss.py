"""The GRPO loss from hidden states: logits of a chunk of tokens, their gradient in the same memory, the products with it, the next chunk.

Every token's gradient coefficients are known as soon as its own log-probability is (or its sequence's: chunks then end where sequences
do), so the logits are made once and forgotten: 6 N D V operations with a trainable head, 4 with a frozen one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_fast.head.chunking import Chunk, Plan, plan_of
from grpo_fast.head.products import Head, HeadTensors
from grpo_fast.loss.inputs import LossInputs
from grpo_fast.loss.logprob_loss import policy_loss
from grpo_fast.loss.operator_arguments import loss_arguments
from grpo_fast.loss.token_rows import RowStatistics, TokenRows
from grpo_fast.ops.grpo_loss import METRICS
from grpo_fast.ops.library import call_below_autograd

__all__ = ["LINEAR_METRICS", "LinearLoss", "linear_loss"]

LINEAR_METRICS = (*METRICS, "recomputed_fraction")


class LinearLoss(NamedTuple):
    """Of one call, and its gradients for an upstream gradient of 1."""

    loss: Tensor  # 0-d float32
    logprobs: Tensor  # float32 [1, N], 0 where not computed
    entropy: Tensor  # float32 [1, N]
    metrics: Tensor  # float32, in the order of LINEAR_METRICS
    gradients: HeadTensors


def linear_loss(
    make_head: Callable[[Plan], Head],
    rows: TokenRows,
    policy: LossInputs,  # packed
    *,
    only_active: bool,
    want_gradient: bool,
    limit: int,  # tokens per chunk
) -> LinearLoss:
    """Loss, metrics and gradients, nothing recorded by autograd."""
    active = policy.active()
    computed = active if only_active else policy.mask
    rows, token_level = rows._replace(mask=computed), policy.token_level()
    wanted = active if want_gradient else torch.zeros_like(active)
    order = plan_of(computed[0], wanted[0], limit, policy.sequences if token_level is None else None)
    head = make_head(order)
    head.reserve(order.largest)
    whole = RowStatistics(*(torch.zeros_like(computed, dtype=torch.float32) for _ in range(3)))

    def logits_and_statistics(begin: int, end: int) -> Tensor:
        tokens = order.tokens(begin, end)
        logits = head.logits(tokens)
        for into, part in zip(whole, rows.take(tokens).statistics(logits.unsqueeze(0)), strict=True):
            into[:, tokens] = part
        return logits

    def in_one_pass(begin: int, end: int) -> None:
        assert token_level is not None
        tokens = order.tokens(begin, end)
        logits = head.logits(tokens)
        arguments = loss_arguments(rows.take(tokens), token_level.take(tokens))
        _, whole.logprobs[:, tokens], whole.entropy[:, tokens], _ = call_below_autograd(
            torch.ops.grpo_fast.grpo_loss_.default, logits.unsqueeze(0), *arguments
        )
        head.add_gradient(logits, tokens)

    def in_two_passes(chunk: Chunk) -> None:
        for begin, end in chunk.pieces:
            logits = logits_and_statistics(begin, end)
        tokens = order.tokens(chunk.begin, chunk.end)
        found = RowStatistics(*(x[:, tokens] for x in whole))
        g, h = coefficients(found, (token_level or policy).take(tokens), computed[:, tokens])
        for begin, end in reversed(chunk.pieces):  # the logits of the last piece are still there
            tokens, within = order.tokens(begin, end), slice(begin - chunk.begin, end - chunk.begin)
            if end != chunk.end:
                logits = head.logits(tokens)
            piece = RowStatistics(*(x[:, within] for x in found))
            rows.take(tokens).gradient_(logits.unsqueeze(0), piece, g[:, within], h[:, within])
            head.add_gradient(logits, tokens)

    for chunk in order.rest:
        logits_and_statistics(chunk.begin, chunk.end)
    for chunk in order.chunks:
        if token_level is not None and rows.shard is None:
            in_one_pass(chunk.begin, chunk.end)
        else:
            in_two_passes(chunk)
    loss, metrics = policy_loss(whole.logprobs, whole.entropy, policy, computed)
    recomputed = torch.full_like(loss, order.recomputed) / computed.sum().clamp(min=1)
    return LinearLoss(
        loss.float(), whole.logprobs, whole.entropy, torch.stack([*(metrics[name] for name in METRICS), recomputed]), head.gradients()
    )


def coefficients(statistics: RowStatistics, policy: LossInputs, computed: Tensor) -> tuple[Tensor, Tensor]:
    """g = d loss / d logprob and h = d loss / d entropy of every token, by autograd through what stands behind the logits."""
    below_autograd = torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)
    with below_autograd, torch.enable_grad():  # an operator's own implementation runs with autograd switched off
        logprobs, entropy = (x.detach().requires_grad_() for x in statistics[:2])
        loss, _ = policy_loss(logprobs, entropy, policy, computed)
        if not loss.requires_grad:
            return torch.zeros_like(logprobs), torch.zeros_like(entropy)
        g, h = torch.autograd.grad(loss, (logprobs, entropy), allow_unused=True, materialize_grads=True)
    return g, h
