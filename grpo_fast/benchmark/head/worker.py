"""A child process with one contestant: ``python -m grpo_fast.benchmark.head.worker NAME CASE TRAINABLE ROUNDS THREADS``, answers in JSON.

CPU time of the thread (wall time with several), how far the resident memory rose above what the case itself takes, and the operations of
the matrix products.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from grpo_fast.benchmark.head.case import SEQUENCES, Case, errors, make_cases, passes
from grpo_fast.benchmark.head.contestants import COMPILED, make
from grpo_fast.benchmark.measure import reset_peak, resident_peak, trim


def measure(name: str, case: Case, trainable: bool, rounds: int, threads: int) -> dict[str, Any]:
    """Count the products of a small case, which is also what warms up everything but compiled code; then time, the first result held to the
    truth. What is compiled for this number of tokens is called once more beforehand."""
    multiple, step = flop_multiple(name, trainable, case), make(name, case)
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_(trainable)
    clock = time.thread_time if threads == 1 else time.perf_counter
    seconds: list[float] = []
    peaks: list[int] = []
    before: int | None = None  # above it memory counts, that too which a contestant keeps from call to call
    verdict: dict[str, float] | None = None
    for repetition in range(rounds + (name in COMPILED)):
        hidden.grad, weight.grad = None, None
        trim()
        resident = reset_peak()
        before = resident if repetition == 0 else before
        start = clock()
        loss = step(hidden, weight)
        loss.backward()
        seconds.append(clock() - start)
        if before is not None and name != "floor":
            peaks.append(resident_peak() - before)
        if repetition == 0 and name != "floor":
            verdict = errors(case.truth, loss.item(), case.hidden.grad, weight.grad)
    dtype = str(case.hidden.dtype).removeprefix("torch.")
    return {
        "seconds": seconds[-rounds:],
        "peak_bytes": max(peaks[-rounds:], default=None),
        "flop_multiple": multiple,
        "errors": verdict,
        "right": verdict is None or passes(verdict, dtype),
    }


def flop_multiple(name: str, trainable: bool, like: Case) -> float:
    """The operations of a contestant's matrix products in units of N D V, which are the same at any size: counted at a small one with the
    same share of active tokens. Compiled code runs as it is written."""
    share = float((like.mask.bool() & (like.advantages != 0)[:, None]).float().mean())
    (case,) = make_cases(SEQUENCES * 40, 16, 512, like.hidden.dtype, [share], seed=0)
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_(trainable)
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm_flops})
    with torch.compiler.set_stance("force_eager"), counter:
        make(name, case)(hidden, weight).backward()
    return counter.get_total_flops() / (case.token_ids.numel() * weight.numel())


def _addmm_flops(total: Any, a: Any, b: Any, *_: Any, **__: Any) -> int:  # shapes
    return int(2 * a[0] * a[1] * b[1])


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not get among the answers
    warnings.simplefilter("ignore")
    name, path, trainable, rounds, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    case = torch.load(path, weights_only=False)  # our own file, made a moment ago
    try:
        answer = measure(name, case, trainable == "True", int(rounds), int(threads))
    except Exception as error:  # a contestant may fail in any way; the others go on
        answer = {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"}
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
