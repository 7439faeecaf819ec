"""A child process with one contestant: ``python -m grpo_fast.benchmark.head.worker NAME CASE TRAINABLE ROUNDS THREADS``, answers in JSON.

CPU time of the thread (wall time with several), and how far the resident memory rose above what the case itself takes.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from typing import Any

import torch

from grpo_fast.benchmark.head.case import Case, errors, passes
from grpo_fast.benchmark.head.contestants import make
from grpo_fast.benchmark.measure import reset_peak, resident_peak, trim


def measure(name: str, case: Case, trainable: bool, rounds: int, threads: int) -> dict[str, Any]:
    """Warm up once, which is also what is held to the truth; then time."""
    step = make(name)
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_(trainable)
    clock = time.thread_time if threads == 1 else time.perf_counter
    seconds: list[float] = []
    peak: int | None = None
    verdict: dict[str, float] | None = None
    for repetition in range(rounds + 1):
        hidden.grad, weight.grad = None, None
        trim()
        before, start = reset_peak(), clock()
        loss = step(case, hidden, weight)
        loss.backward()
        elapsed = clock() - start
        if repetition == 0:
            if name != "floor":
                verdict = errors(case.truth, loss.item(), case.hidden.grad, weight.grad)
            continue
        seconds.append(elapsed)
        peak = None if before is None else max(resident_peak() - before, peak or 0)
    dtype = str(case.hidden.dtype).removeprefix("torch.")
    return {"seconds": seconds, "peak_bytes": peak, "errors": verdict, "right": verdict is None or passes(verdict, dtype)}


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
