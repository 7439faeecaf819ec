r"""Mathematical equality of the stated and the true answer, by math-verify: ``\frac{2}{4}``, ``0.5`` and ``\frac12`` are equal."""

from __future__ import annotations

import importlib.util
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from grpo_fast.rewards.accuracy import extract_answer
from grpo_fast.rewards.common import Completion, check_range, check_same_length, text_of
from grpo_fast.rewards.pool import CallResult, WorkerPool
from grpo_fast.utils.install_hints import install

__all__ = ["MathReward", "math_reward"]

_CHECK = (str(Path(__file__).with_name("math_check.py")), "check")
_pools: dict[tuple[int, int | None], WorkerPool] = {}  # shared by rewards of equal settings; not in the reward, which must be picklable
_pools_lock = threading.Lock()


@dataclass(frozen=True)
class MathReward:
    r"""1 if the stated answer equals the true one as mathematics, else 0: DeepSeek-R1's accuracy reward (arXiv:2501.12948), for LaTeX.

    The stated answer is what `extract_answer` finds; without one the reward is 0. None where the true answer is None or cannot be parsed
    by math-verify (other packages give 1 there), because such a question gives no signal. A true answer in words is compared as a text.

    Needs the math-verify package: ``pip install '.[math]'`` in the checkout. It compares with sympy, which does not finish for an answer
    like ``9^{9^{9^{9}}}``, and its time limit uses SIGALRM, which does not work in threads. Therefore it runs in worker processes. If an
    item takes longer than ``timeout``, its worker is killed and replaced, ``counters["timeouts"]`` counts it, and its reward is
    ``undecided``; the same holds for an item that crashes its worker, with ``counters["errors"]``.

    Args:
        timeout: seconds for one item, above 0.
        workers: processes; each imports sympy once, at the first call.
        undecided: the reward of an item that could not be compared: a number, or None = does not apply.
        whole_text: search the whole completion for an answer if it has neither ``<answer>`` nor ``\boxed``. A model can exploit this by
            listing many numbers.
        memory_limit: bytes per worker, None = no limit. An answer that needs more memory to compare counts as wrong.

    Example:
        >>> math_reward(["1/3 + 1/6?"] * 3, [r"\boxed{\frac{2}{4}}", "<answer>0.5</answer>", "0.5"], answer=[r"$\frac12$"] * 3)
        [1.0, 1.0, 0.0]
    """

    timeout: float = 5.0
    workers: int = 2
    undecided: float | None = None
    whole_text: bool = False
    memory_limit: int | None = 2 << 30
    counters: Counter[str] = field(default_factory=Counter, init=False, repr=False, compare=False)  # over the life of this object
    __name__ = "math_reward"

    def __post_init__(self) -> None:
        check_range("MathReward", "timeout", self.timeout, 0, above=True, what="the seconds an item may take")
        check_range("MathReward", "workers", self.workers, 1)
        if self.undecided is not None:
            check_range("MathReward", "undecided", self.undecided, float("-inf"))

    def __call__(
        self,
        prompts: Sequence[Completion],
        completions: Sequence[Completion],
        completion_ids: Sequence[Sequence[int]] | None = None,
        *,
        answer: Sequence[object],
        **columns: object,
    ) -> list[float | None]:
        check_same_length(self.__name__, prompts=prompts, completions=completions, answer=answer)
        if importlib.util.find_spec("math_verify") is None:
            raise ImportError(f"math_reward needs the math-verify package, which is not installed. Fix: {install('math')}")
        items = [self._item(text_of(c), str(truth)) for c, truth in zip(completions, answer, strict=True) if truth is not None]
        different = list(dict.fromkeys(items))  # a group often states the same answer many times
        known = dict(zip(different, self._pool().map(different, timeout=self.timeout), strict=True))
        remaining = iter(items)
        return [None if truth is None else self._value(known[next(remaining)]) for truth in answer]

    def _item(self, text: str, truth: str) -> tuple[str, str | None, bool]:
        stated = extract_answer(text)
        if stated is None and self.whole_text:
            return truth, text, True
        return truth, stated, False

    def _value(self, result: CallResult) -> float | None:
        if not result.ok:
            self.counters["timeouts" if result.timed_out else "errors"] += 1
            return self.undecided
        return None if result.value is None else float(result.value)

    def _pool(self) -> WorkerPool:
        with _pools_lock:
            key = self.workers, self.memory_limit
            if key not in _pools:
                _pools[key] = WorkerPool(_CHECK, workers=self.workers, memory_limit=self.memory_limit)
            return _pools[key]


math_reward = MathReward()
