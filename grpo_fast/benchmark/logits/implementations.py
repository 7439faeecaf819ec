"""What is compared: grpo_fast, the baselines that a user would take instead, and the roofline that no implementation can beat."""

from __future__ import annotations

import ctypes
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import grpo_fast as gf
from grpo_fast.benchmark.eager import CONFIG, eager_logprobs, eager_loss
from grpo_fast.benchmark.harness.gate import UnavailableError, Verdict, row_error
from grpo_fast.benchmark.harness.measure import Record, measure
from grpo_fast.benchmark.logits.cases import Batch
from grpo_fast.ops.environment import cache_bytes

__all__ = ["FOOTPRINT", "LABELS", "Implementation", "Outputs", "compare_with_truth", "make", "tolerance"]

LABELS = {
    "roofline": "roofline (read / copy)",
    "ours": "grpo_fast",
    "ours_inplace": "grpo_fast inplace=True",
    "eager": "PyTorch eager",
    "compile": "torch.compile of eager",
    "trl": "TRL",
}
# Memory that an implementation takes beside the logits, in their multiples as float32, rounded up: for the malloc mode "touched", where it
# is touched beforehand, and for the estimate that refuses a run that would swap.
FOOTPRINT = {"roofline": 1.5, "ours": 2.5, "ours_inplace": 0.5, "eager": 6.0, "compile": 5.0, "trl": 6.0}

Score = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]  # of logits and token_ids the logprobs and, if wanted, entropy: [B, T]


class Outputs(NamedTuple):
    """What a pass computes; the gate looks at what is there."""

    logprobs: Tensor | None = None  # [B, T]
    entropy: Tensor | None = None  # [B, T]
    loss: Tensor | None = None
    gradient: Tensor | None = None  # [B, T, V]


@dataclass(frozen=True)
class Implementation:
    """One side of the comparison. A pass that it does not have is None."""

    name: str
    forward: Callable[[Batch], Outputs] | None
    forward_backward: Callable[[Batch], Outputs]
    arithmetic: str = "float32"  # see tolerance()

    def step(self, name: str) -> Callable[[Batch], Outputs] | None:
        return self.forward if name == "forward" else self.forward_backward


def make(name: str, *, temperature: float, entropy: bool, threads: int) -> Implementation:
    """An implementation by name.

    Raises:
        UnavailableError: it cannot take part here.
    """
    if name == "roofline":
        return _roofline(threads)
    if name in ("ours", "ours_inplace"):
        return _ours(name, temperature)

    def eager_score(logits: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor | None]:
        return eager_logprobs(logits.float(), token_ids, temperature, entropy=entropy)

    score = _trl_score(temperature, entropy) if name == "trl" else eager_score

    def loss(logits: Tensor, token_ids: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
        logprobs, metric = score(logits, token_ids)
        return eager_loss(logprobs, old_logprobs, advantages, mask), metric

    if name == "compile":
        score, loss = _compiled(score, threads), _compiled(loss, threads)

    def forward(batch: Batch) -> Outputs:
        with torch.no_grad():
            return Outputs(*score(batch.logits, batch.token_ids))

    def forward_backward(batch: Batch) -> Outputs:
        return _with_gradient(loss(batch.logits, batch.token_ids, batch.old_logprobs, batch.advantages, batch.mask)[0], batch)

    return Implementation(name, forward, forward_backward, arithmetic="own" if name == "trl" else "float32")


# The gate ---------------------------------------------------------------------------------------------------------------------------------


def tolerance(dtype: torch.dtype, arithmetic: str) -> dict[str, float]:
    """The largest errors that pass, by how an implementation computes: absolute for log-probabilities and entropy (nats) and for the loss
    (whose tokens are about 1); of a row of the gradient see row_error.

    float64_sums  the promise of grpo_fast: float32 terms summed in float64, an error that does not grow with the vocabulary
    float32       plain float32 sums over the vocabulary: 1e-4 at 150,000 entries; a gradient rounded once into the type of the logits
    own           everything in the type of the logits: with bfloat16 an error of 0.1 in a log-probability, so 10 % in a ratio, and that in
                  rows of up to three times the typical size
    """
    eps, wide = torch.finfo(dtype).eps, dtype == torch.float32  # eps is 2^-7 for bfloat16
    if arithmetic == "own" and not wide:
        logprobs, loss, gradient = 16 * eps, 4 * eps, 40 * eps
    elif arithmetic == "float64_sums":
        logprobs, loss, gradient = 1e-5, 1e-5, 1e-4 if wide else eps
    else:
        logprobs, loss, gradient = 2e-4, 5e-5, 3e-4 if wide else eps
    # The entropy is a sum over the vocabulary of such terms.
    return {"logprobs": logprobs, "entropy": 5 * logprobs, "loss": loss, "gradient": gradient}


def compare_with_truth(outputs: Outputs, batch: Batch, true_loss: float, limits: dict[str, float]) -> Verdict:
    """Compare what there is: every unmasked row of logprobs and the loss, the gate's rows of entropy and gradient."""
    errors: dict[str, float | None] = dict.fromkeys(limits)
    rows, mask = batch.gate_rows, batch.mask.flatten()
    if outputs.logprobs is not None:
        errors["logprobs"] = float((outputs.logprobs.double() - batch.true_logprobs).abs().flatten()[mask].max())
    if outputs.entropy is not None:
        difference = (outputs.entropy.double().flatten()[rows] - batch.true_entropy).abs()[mask[rows]]
        errors["entropy"] = float(difference.max()) if difference.numel() else 0.0
    if outputs.loss is not None:
        errors["loss"] = abs(float(outputs.loss) - true_loss)
    if outputs.gradient is not None:
        errors["gradient"] = row_error(outputs.gradient.flatten(0, -2)[rows], batch.true_gradient)
    return Verdict(errors, limits)


# The roofline -----------------------------------------------------------------------------------------------------------------------------


def _roofline(threads: int) -> Implementation:
    """A read of the logits, and a copy of them into memory that is there already: the fastest of several ways, found by the first call from
    cold caches, as they are when it is timed."""
    chosen: dict[str, Callable[[Tensor, Tensor], object]] = {}
    target = torch.empty(0)

    def run(step: str, batch: Batch) -> Outputs:
        nonlocal target
        source = batch.logits.detach().view(-1)
        if step == "forward_backward" and (target.shape != source.shape or target.dtype != source.dtype):
            target = torch.zeros_like(source)
            chosen.pop(step, None)
        if step not in chosen:
            flush = torch.zeros(2 * cache_bytes() // 8, dtype=torch.int64)

            def median_time(way: Callable[[Tensor, Tensor], object]) -> float:
                times = (measure(lambda: way(source, target), threads, flush=flush, return_freed_memory=False) for _ in range(5))
                return statistics.median(each.seconds for each in times)

            chosen[step] = min(_WAYS[step], key=median_time)
        chosen[step](source, target)
        return Outputs()

    return Implementation("roofline", lambda batch: run("forward", batch), lambda batch: run("forward_backward", batch))


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


# Implementations --------------------------------------------------------------------------------------------------------------------------


def _with_gradient(loss: Tensor, batch: Batch) -> Outputs:
    """Backward to the logits, which in training are a model's output and no parameter: nothing is accumulated."""
    return Outputs(loss=loss.detach(), gradient=torch.autograd.grad(loss, batch.logits)[0])


def _ours(name: str, temperature: float) -> Implementation:
    status = gf.backends()["cpu"]
    if not status.usable:
        raise UnavailableError(f"the C++ backend is not usable: {status.why}. {status.fix}")

    def forward(batch: Batch) -> Outputs:
        with torch.no_grad():
            out = gf.token_logprobs(batch.logits, batch.token_ids, mask=batch.mask, temperature=temperature)
        return Outputs(out.logprobs, out.entropy)

    def forward_backward(batch: Batch) -> Outputs:
        given: Record = {"config": CONFIG, "old_logprobs": batch.old_logprobs, "mask": batch.mask, "temperature": temperature}
        out = gf.grpo_loss(batch.logits, batch.token_ids, batch.advantages, **given, inplace=name == "ours_inplace")
        return _with_gradient(out.loss, batch)

    return Implementation(name, forward if name == "ours" else None, forward_backward, arithmetic="float64_sums")


def _compiled(function: Callable[..., Any], threads: int) -> Callable[..., Any]:
    import torch._inductor.config as inductor

    inductor.cpp.threads = threads  # part of the key of the compilation cache, as the ambient number is not
    # A graph for each shape, the best case of the compiler; the limit is not meant for eight shapes on purpose.
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(function, dynamic=False)


def _trl_score(temperature: float, entropy: bool) -> Score:
    """selective_log_softmax, or selective_log_softmax_and_entropy with an entropy that is a metric and has no gradient."""
    name = "selective_log_softmax_and_entropy" if entropy else "selective_log_softmax"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from trl.trainer import utils

        function = getattr(utils, name)
    except Exception as error:  # an import may fail in any way
        raise UnavailableError(
            f"trl.trainer.utils has no {name} ({type(error).__name__}: {error}). Fix: pip install 'trl>=1.16'"
        ) from error
    if entropy:
        return partial(function, entropy_requires_grad=False, temperature=temperature)
    return lambda logits, token_ids: (function(logits, token_ids, temperature=temperature), None)
