"""A comparison with a baseline: repetitions in turn, each held to the baseline's results, and a summary of their times."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from grpo_fast.benchmark.harness.gate import relative_difference
from grpo_fast.benchmark.harness.suite import Result, summary

__all__ = ["Answer", "compare"]

# Of one repetition: "seconds", "peak_bytes", "outputs" (tensors or lists of numbers by name, compared with the baseline's; "loss" is one).
# What else it has goes into the entry of the results, as it was in the first repetition.
Answer = dict[str, Any]


def compare(
    labels: Mapping[str, str],
    shares: Iterable[float],
    rounds: int,
    ask: Callable[[str, float], Answer],
    *,
    tolerance: float,
    smallest: float = 1e-12,
    skip: Callable[[str, float], bool] = lambda name, active: False,
) -> Result:
    """Measure implementations in turn (A B C A B C), so that what slows the machine slows all alike; the first round is the warm-up.

    Args:
        labels: the implementations by name, with what messages call them; the first is the baseline.
        shares: of the sequences or groups that are active; every implementation is measured at each.
        ask: runs an implementation at a share once.
        tolerance: the largest relative difference from the baseline's first results at that share.
        smallest: see relative_difference.
        skip: whether an implementation is only compared, not timed, at a share.

    Raises:
        RuntimeError: results differ by more than the tolerance.
    """
    baseline = next(iter(labels))
    gate = dict.fromkeys(labels, 0.0)
    expected: dict[float, dict[str, torch.Tensor]] = {}
    found: dict[tuple[str, float], list[Answer]] = {}
    for number in range(rounds + 1):
        for active, name in ((active, name) for active in shares for name in labels):
            if number and skip(name, active):
                continue
            answer = ask(name, active)
            outputs = {key: torch.as_tensor(value) for key, value in answer.pop("outputs").items()}
            difference = relative_difference(outputs, expected.setdefault(active, outputs), smallest=smallest)
            gate[name] = max(gate[name], difference)
            if not difference <= tolerance:
                raise RuntimeError(
                    f"{labels[name]} at {active:.0%} active: loss, gradients or metrics differ from those of {labels[baseline]} by "
                    f"{difference:.2g} relative; expected {tolerance:g} at most. No times are reported."
                )
            if number:
                found.setdefault((name, active), []).append({**answer, "loss": float(outputs["loss"])})
    results = []
    for (name, active), answers in found.items():
        times = summary((answer["seconds"] for answer in answers), (answer["peak_bytes"] for answer in answers))
        entry = {"implementation": name, "active": active, **answers[0], **times}
        of_baseline = found.get((baseline, active)) or found[baseline, max(shares)]
        faster = statistics.median(answer["seconds"] for answer in of_baseline) / times["median"]
        results.append({**entry, f"faster_than_{baseline}": faster})
    return {"gate": {"tolerance": tolerance, "largest_relative_difference": gate}, "results": results}
