"""The fixed cost of a call, measured where there is next to nothing to compute: checks, weights, operator, autograd, rest."""

from __future__ import annotations

import statistics
import time
import timeit
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

import grpo_fast as gf
from grpo_fast.benchmark.eager import CONFIG
from grpo_fast.benchmark.harness.measure import Record
from grpo_fast.loss.aggregation import aggregation_weights
from grpo_fast.loss.sequences import Sequences
from grpo_fast.loss.token_inputs import token_inputs

__all__ = ["measure_overhead"]

SHAPE = (8, 100)


def measure_overhead(*, blocks: int = 40, calls: int = 50) -> Record:
    """Microseconds of thread CPU time per call, the median over blocks of calls.

    The split: ``checks`` is token_inputs, ``weights`` aggregation_weights, ``operator`` the registered operator with the very arguments of
    the call; each is timed by itself. ``autograd`` is what a wanted gradient adds to the call beyond the operator's own share of it, and
    backward. ``rest`` is what remains: the other arguments' checks, packing and unpacking of the result.
    """
    rows, vocabulary = SHAPE
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, vocabulary, generator=generator)
    leaf = logits.clone().requires_grad_()
    token_ids = torch.randint(vocabulary, (rows,), generator=generator)
    advantages = torch.randn(rows, generator=generator)
    old_logprobs = torch.randn(rows, generator=generator)
    mask = torch.ones(1, rows, dtype=torch.bool)
    sequences = Sequences(token_ids.unsqueeze(0))

    def loss(x: torch.Tensor) -> torch.Tensor:
        return gf.grpo_loss(x, token_ids, advantages, config=CONFIG, old_logprobs=old_logprobs, temperature=0.9).loss

    with torch.no_grad():
        arguments = _operator_arguments(lambda: loss(logits))
    arguments_with_gradient = _operator_arguments(lambda: loss(leaf))

    pieces: dict[str, Callable[[], object]] = {
        "no_grad": lambda: loss(logits),
        "grad": lambda: loss(leaf),
        "forward_backward": lambda: torch.autograd.grad(loss(leaf), leaf),
        "checks": lambda: token_inputs(logits, token_ids, mask=None, temperature=0.9, softcap=None, logit_scale=1.0),
        "weights": lambda: aggregation_weights(CONFIG.resolved_aggregation, mask, sequences),
        "operator": lambda: torch.ops.grpo_fast.grpo_loss.default(*arguments),
        "operator_with_gradient": lambda: torch.ops.grpo_fast.grpo_loss.default(*arguments_with_gradient),
    }
    times: dict[str, list[float]] = {name: [] for name in pieces}
    for _ in range(blocks):  # interleaved, so that other load on the machine affects all alike
        for name, piece in pieces.items():
            with torch.set_grad_enabled(name in ("grad", "forward_backward")):
                times[name].append(timeit.timeit(piece, timer=time.thread_time, number=calls) / calls * 1e6)
    median = {name: statistics.median(values[1:] or values) for name, values in times.items()}
    operator = median["operator_with_gradient"]
    split = {
        "checks": median["checks"],
        "weights": median["weights"],
        "operator": operator,
        "autograd": median["forward_backward"] - median["no_grad"] - (operator - median["operator"]),
        "rest": median["no_grad"] - median["checks"] - median["weights"] - median["operator"],
    }
    return {"shape": [rows, vocabulary], "microseconds": median, "split_of_forward_backward": split}


def _operator_arguments(call: Callable[[], object]) -> tuple[Any, ...]:
    """The arguments with which a call reaches the operator, whatever its schema is. (A TorchDispatchMode would import torch._dynamo, which
    takes longer than everything that is measured here.)"""
    seen: list[tuple[Any, ...]] = []
    packet = torch.ops.grpo_fast.grpo_loss
    operator = packet.default

    def recorded(*arguments: Any) -> Any:
        seen.append(tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in arguments))
        return operator(*arguments)

    with mock.patch.object(packet, "default", recorded):
        call()
    if not seen:
        raise RuntimeError("grpo_loss did not reach the operator grpo_fast::grpo_loss: the C++ backend is not in use")
    return seen[0]
