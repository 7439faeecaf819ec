"""A child process that holds contestants: ``python -m grpo_fast.benchmark.worker SETTINGS``, commands and answers as lines of JSON."""

from __future__ import annotations

import gc
import json
import os
import sys
import warnings
from typing import Any, TextIO

import torch
from torch import Tensor

from grpo_fast.benchmark import gate, overhead
from grpo_fast.benchmark.arena import Arena
from grpo_fast.benchmark.contestants import Contestant, UnavailableError, make
from grpo_fast.benchmark.data import Batch, expected_loss, shared_batch
from grpo_fast.benchmark.measure import keep_freed_memory, repetition, trim
from grpo_fast.benchmark.settings import FOOTPRINT, PASSES, Case


class Worker:
    """The contestants of this process, and the case they are at."""

    def __init__(self, given: dict[str, Any]):
        self.given = given
        self.arena = Arena(given["descriptor"], given["size"])
        self.flush = self.arena.take([given["flush_bytes"] // 8], torch.int64)
        self.flush.zero_()
        self.keeps_memory = False
        self.contestants: dict[str, Contestant] = {}
        self.case: Case | None = None
        self.shared: Batch | None = None
        self.storage: Tensor | None = None

    def start(self) -> dict[str, Any]:
        """Make the contestants; the answer names those that cannot take part, and why."""
        unavailable = {}
        for name in self.given["contestants"]:
            try:
                self.contestants[name] = make(
                    name, temperature=self.given["temperature"], entropy=self.given["entropy"], threads=self.given["threads"]
                )
            except UnavailableError as error:
                unavailable[name] = str(error)
        gc.collect()
        gc.freeze()  # what was imported stays: the collection before each repetition need not look at it
        return {"unavailable": unavailable}

    def keep_memory(self) -> dict[str, Any]:
        """Switch to the malloc mode "touched"; there is no way back."""
        keep_freed_memory()
        self.keeps_memory = True
        return {}

    def begin(self, case: dict[str, Any]) -> dict[str, Any]:
        """Take up a case, whose data lie in the arena behind the flush buffer; give the memory of the last one back."""
        self.shared = self.storage = None
        gc.collect()
        trim()
        self.case = Case(**case)
        self.arena.rewind()
        self.arena.take(self.flush.shape, torch.int64)
        self.shared = shared_batch(self.arena, self.case)
        self.storage = torch.zeros_like(self.shared.logits)
        if self.keeps_memory:  # one free block larger than all that will be asked for: what a warm-up leaves behind is in pieces
            words = self.case.rows * self.case.vocabulary * max(FOOTPRINT[name] for name in self.contestants)
            torch.zeros(int(words), dtype=torch.float32)
        return {}

    def gate(self, contestant: str) -> dict[str, Any]:
        """Judge every pass of a contestant."""
        assert self.case is not None and self.shared is not None
        who = self.contestants[contestant]
        allowed, verdicts = gate.tolerance(self.case.torch_dtype, who.arithmetic), {}
        for step in PASSES:
            if who.step(step) is not None:
                _, result = self._once(who, step)
                verdicts[step] = gate.judge(result, self.shared, expected_loss(self.shared), allowed).as_dict()
        return {"verdicts": verdicts}

    def warm_up(self, contestant: str, step: str) -> dict[str, Any]:
        """One repetition without a time. Its peak of memory is that of a process which holds nothing back from earlier calls."""
        if not self.keeps_memory:
            trim()
        times, _ = self._once(self.contestants[contestant], step)
        return {"peak_bytes": None if self.keeps_memory else times["peak_bytes"]}

    def run(self, contestant: str, step: str) -> dict[str, Any]:
        """One timed repetition."""
        assert self.case is not None and self.shared is not None
        who = self.contestants[contestant]
        times, result = self._once(who, step)
        allowed = gate.tolerance(self.case.torch_dtype, who.arithmetic)
        right = result.loss is None or gate.loss_is_right(float(result.loss), expected_loss(self.shared), allowed)
        return {"wall_ms": times["wall_ms"], "cpu_ms": times["cpu_ms"], "right": right}

    def overhead(self, shape: list[int]) -> dict[str, Any]:
        return overhead.measure(*shape)

    def _once(self, who: Contestant, step: str) -> tuple[dict[str, Any], Any]:
        assert self.shared is not None and self.storage is not None
        function = who.step(step)
        assert function is not None
        return repetition(function, self.shared, self.storage, self.flush, self.given["threads"])


def serve(worker: Worker, commands: TextIO, answers: TextIO) -> None:
    """Answer each command until there are no more. An exception is an answer too: {"error": ...}."""
    for line in commands:
        command = json.loads(line)
        name = command.pop("do")
        try:
            answer = getattr(worker, name)(**command)
        except Exception as error:  # a contestant may fail in any way; the others go on
            answer = {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def main() -> None:
    given = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not get among the answers
    torch.set_num_threads(given["threads"])
    warnings.simplefilter("ignore")
    serve(Worker(given), sys.stdin, answers)


if __name__ == "__main__":
    main()
