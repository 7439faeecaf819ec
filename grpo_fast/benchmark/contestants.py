"""Who is measured: this package, what a user would write instead, and the floors that no implementation can go under."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

import grpo_fast as gf
from grpo_fast.benchmark.data import CONFIG, Batch
from grpo_fast.ops.environment import cache_bytes

__all__ = ["LABELS", "Contestant", "Result", "UnavailableError", "make", "readable_logprobs", "readable_loss"]

LABELS = {
    "floor": "floor (read / copy)",
    "ours": "grpo_fast",
    "ours_inplace": "grpo_fast inplace=True",
    "eager": "PyTorch eager",
    "compile": "torch.compile of eager",
    "trl": "TRL",
}


class UnavailableError(RuntimeError):
    """A contestant cannot take part here; the text says why."""


class Result(NamedTuple):
    """What a pass gives; the gate looks at what is there."""

    logprobs: Tensor | None = None  # [B, T]
    entropy: Tensor | None = None  # [B, T]
    loss: Tensor | None = None
    gradient: Tensor | None = None  # [B, T, V]


@dataclass(frozen=True)
class Contestant:
    """One side of the comparison. A pass that it does not have is None."""

    name: str
    forward: Callable[[Batch], Result] | None
    forward_backward: Callable[[Batch], Result] | None
    arithmetic: str = "float32"  # "float64_sums", "float32" or "own" (of the logits' type): what gate.tolerance may ask for

    def step(self, name: str) -> Callable[[Batch], Result] | None:
        return self.forward if name == "forward" else self.forward_backward


def make(name: str, *, temperature: float, entropy: bool, threads: int) -> Contestant:
    """A contestant by name.

    Raises:
        UnavailableError: it cannot take part here.
    """
    if name == "floor":
        return _floor()
    if name in ("ours", "ours_inplace"):
        return _ours(name, temperature)
    if name == "trl":
        from grpo_fast.benchmark import trl_contestant  # ten seconds of imports, for those who want them

        return trl_contestant.make(temperature, entropy)
    return _readable(name, temperature, entropy, threads)


# Floors -----------------------------------------------------------------------------------------------------------------------------------


def _floor() -> Contestant:
    """A read of the logits, and a copy of them into memory that is there already: the fastest of several ways, found by the first call from
    cold caches, as they are when it is timed."""
    chosen: dict[str, Callable[[Tensor, Tensor], object]] = {}
    target = torch.empty(0)

    def run(step: str, batch: Batch) -> Result:
        nonlocal target
        source = batch.logits.detach().view(-1)
        if step == "forward_backward" and (target.shape != source.shape or target.dtype != source.dtype):
            target = torch.zeros_like(source)
            chosen.pop(step, None)
        if step not in chosen:
            chosen[step] = min(_WAYS[step], key=lambda way: _usual_time(way, source, target))
        chosen[step](source, target)
        return Result()

    return Contestant("floor", lambda batch: run("forward", batch), lambda batch: run("forward_backward", batch))


_CACHED = ctypes.create_string_buffer(128 << 10)


def _copy_into_the_cache(source: Tensor, target: Tensor) -> None:
    begin, end = source.data_ptr(), source.data_ptr() + source.numel() * source.element_size()
    for address in range(begin, end, len(_CACHED)):
        ctypes.memmove(_CACHED, address, min(len(_CACHED), end - address))


def _sum_of_words(source: Tensor, target: Tensor) -> Tensor:
    words = source.numel() * source.element_size() // 8
    return source[: words * 8 // source.element_size()].view(torch.int64).sum()


_WAYS: dict[str, list[Callable[[Tensor, Tensor], object]]] = {
    "forward": [_sum_of_words, _copy_into_the_cache, lambda source, target: source.amax(), lambda source, target: source.sum()],
    "forward_backward": [
        lambda source, target: target.copy_(source),
        lambda source, target: ctypes.memmove(target.data_ptr(), source.data_ptr(), source.numel() * source.element_size()),
    ],
}


def _usual_time(way: Callable[[Tensor, Tensor], object], source: Tensor, target: Tensor) -> float:
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter  # what will be reported
    times, flush = [], torch.zeros(2 * cache_bytes() // 8, dtype=torch.int64)
    for _ in range(5):
        flush.add_(1)
        start = clock()
        way(source, target)
        times.append(clock() - start)
    return statistics.median(times)


# This package -----------------------------------------------------------------------------------------------------------------------------


def _ours(name: str, temperature: float) -> Contestant:
    status = gf.backends()["cpu"]
    if not status.usable:
        raise UnavailableError(f"the C++ backend is not usable: {status.why}. {status.cure}")

    def forward(batch: Batch) -> Result:
        with torch.no_grad():
            out = gf.token_logprobs(batch.logits, batch.token_ids, mask=batch.mask, temperature=temperature)
        return Result(logprobs=out.logprobs, entropy=out.entropy)

    def forward_backward(batch: Batch) -> Result:
        out = gf.grpo_loss(
            batch.logits,
            batch.token_ids,
            batch.advantages,
            config=CONFIG,
            old_logprobs=batch.old_logprobs,
            mask=batch.mask,
            temperature=temperature,
            inplace=name == "ours_inplace",
        )
        return with_gradient(out.loss, batch)

    return Contestant(name, forward if name == "ours" else None, forward_backward, arithmetic="float64_sums")


# What a user would write ------------------------------------------------------------------------------------------------------------------


def with_gradient(loss: Tensor, batch: Batch) -> Result:
    """Backward to the logits, which in training are a model's output and no parameter: nothing is accumulated."""
    return Result(loss=loss.detach(), gradient=torch.autograd.grad(loss, batch.logits)[0])


def readable_logprobs(logits: Tensor, token_ids: Tensor, temperature: float, entropy: bool) -> tuple[Tensor, Tensor | None]:
    """Float32 log-softmax and gather; the entropy of the policy if wanted, as a metric without gradient."""
    log_p = torch.log_softmax(logits.float() / temperature, dim=-1)
    logprobs = log_p.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
    if not entropy:
        return logprobs, None
    with torch.no_grad():
        return logprobs, -(log_p.exp() * log_p).sum(-1)


def readable_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """The clipped surrogate, averaged over the tokens that count."""
    ratio = torch.exp(logprobs - old_logprobs)
    clipped = ratio.clamp(1 - CONFIG.epsilon_low, 1 + CONFIG.epsilon_high)
    per_token = -torch.min(ratio * advantages, clipped * advantages)
    return (per_token * mask).sum() / mask.sum().clamp(min=1)


def _readable(name: str, temperature: float, entropy: bool, threads: int) -> Contestant:
    def score(logits: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor | None]:
        return readable_logprobs(logits, token_ids, temperature, entropy)

    def whole_loss(
        logits: Tensor, token_ids: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        logprobs, metric = score(logits, token_ids)
        return readable_loss(logprobs, old_logprobs, advantages, mask), metric

    if name == "compile":
        score_compiled, loss_compiled = _compiled(score, threads), _compiled(whole_loss, threads)
    else:
        score_compiled, loss_compiled = score, whole_loss

    def forward(batch: Batch) -> Result:
        with torch.no_grad():
            logprobs, metric = score_compiled(batch.logits, batch.token_ids)
        return Result(logprobs=logprobs, entropy=metric)

    def forward_backward(batch: Batch) -> Result:
        loss, _ = loss_compiled(batch.logits, batch.token_ids, batch.old_logprobs, batch.advantages, batch.mask)
        return with_gradient(loss, batch)

    return Contestant(name, forward, forward_backward)


def _compiled(function: Callable[..., tuple[Tensor, Tensor | None]], threads: int) -> Callable[..., tuple[Tensor, Tensor | None]]:
    import torch._inductor.config as inductor

    inductor.cpp.threads = threads  # part of the key of the compilation cache, as the ambient number is not
    # A graph for each shape, the best case of the compiler; the limit is not meant for eight shapes on purpose.
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(function, dynamic=False)
