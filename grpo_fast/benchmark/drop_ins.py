"""Suite ``drop-ins`` (``grpo-fast bench-drop-ins``): what the guides for Liger, verl and plain PyTorch replace, against what replaces it.

Timed is loss and gradient of hidden states and weight. Repetitions are interleaved, on the same data. Where half of the groups are
degenerate, their rewards are all equal and their advantages 0: grpo_fast leaves them out, the others do the same work as ever and are timed
once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console

from grpo_fast.benchmark.harness.gate import UnavailableError, compare
from grpo_fast.benchmark.harness.measure import Record
from grpo_fast.benchmark.harness.suite import BenchmarkSettings, Progress, Result, Suite, mebibytes, setting
from grpo_fast.benchmark.head.implementations import HeadCase, Step, make, make_cases, measure_gradients

__all__ = ["PAIRS", "SUITE", "TOLERANCE", "DropInSettings", "markdown", "measured", "run"]

HELP = "Time what the guides replace against what replaces it. Ten minutes, 8 GiB."
TOLERANCE = 1e-4  # relative, of the loss and of a gradient
PAIRS: dict[str, tuple[str, tuple[str, str], tuple[float, ...]]] = {  # label, implementations, shares that are active
    "plain": ("PyTorch, logits in float32", ("eager", "ours"), (1.0, 0.5)),
    "liger": ("Liger's `LigerFusedLinearGRPOLoss`", ("liger", "liger_drop_in"), (1.0, 0.5)),
    "verl": ("verl's fused head in PyTorch", ("verl", "verl_drop_in"), (1.0,)),
}


@dataclass(frozen=True, kw_only=True)
class DropInSettings(BenchmarkSettings):
    """What is measured. With this width, the vocabulary is that of Qwen2.5-0.5B's head."""

    sequences: int = setting(8, "Of the batch.", least=2)
    tokens: int = setting(128, "Of each completion.", least=1)
    width: int = setting(896, "Of the hidden states.", least=1)
    vocabulary: int = setting(151_936, "Rows of the head's weight.", least=64)

    def cases(self) -> dict[float, HeadCase]:
        """All sequences active, and half of them."""
        sizes = (self.sequences * self.tokens, self.width, self.vocabulary)
        cases = make_cases(*sizes, torch.float32, (1.0, 0.5), self.seed, self.sequences)
        return dict(zip((1.0, 0.5), cases, strict=True))


def measured(step: Step, case: HeadCase, threads: int) -> Record:
    """One loss and its gradients; compared are the loss, the gradient of the hidden states, and sampled rows of the weight's."""
    found = measure_gradients(step, case, True, threads)
    loss, d_hidden, d_weight = found.result
    assert d_weight is not None
    outputs = {"loss": torch.tensor(loss), "d_hidden": d_hidden, "d_weight": d_weight[case.truth.entries]}
    return {"seconds": found.seconds, "peak_bytes": found.peak_bytes, "outputs": outputs}


def _only_compared(side: str, active: float) -> bool:
    """The work of the others is the same at every share of active sequences."""
    return side == "theirs" and active != 1


def run(settings: DropInSettings, progress: Progress) -> Result:
    """Measure everything.

    Raises:
        RuntimeError: losses or gradients of a pair differ.
    """
    torch.set_num_threads(settings.threads)
    progress("the batch")
    cases = settings.cases()
    left_out, results, gate = {}, [], {}
    for pair, (label, names, shares) in PAIRS.items():
        try:
            steps = {
                (side, share): make(name, cases[share]) for side, name in zip(("theirs", "ours"), names, strict=True) for share in shares
            }
        except UnavailableError as error:
            left_out[pair] = str(error)
            continue

        def ask(side: str, active: float, steps: dict[Any, Step] = steps) -> Record:
            return measured(steps[side, active], cases[active], settings.threads)

        labels = {"theirs": label, "ours": f"{pair}: grpo_fast"}
        found = compare(labels, shares, settings.rounds, ask, tolerance=TOLERANCE, progress=progress, skip=_only_compared)
        gate[pair] = max(found["gate"]["largest_relative_difference"].values())
        results += [{"pair": pair, **entry} for entry in found["results"]]
    return {
        "settings": {"dtype": "float32"},
        "gate": {"tolerance": TOLERANCE, "largest_relative_difference": gate},
        "left_out": left_out,
        "results": results,
    }


def markdown(result: Result, pair: str, ours: str) -> list[str]:
    """The rows of a guide's table: theirs, then ours under the name it has there."""
    rows, entries = [], [entry for entry in result["results"] if entry["pair"] == pair]
    base = next(entry["median"] for entry in entries if entry["implementation"] == "theirs")
    for entry in entries:
        theirs = entry["implementation"] == "theirs"
        name = PAIRS[pair][0] if theirs else ours if entry["active"] == 1 else f"{ours}, half of the groups degenerate"
        faster = "" if theirs else f" ({base / entry['median']:.2f}x)"
        rows.append(f"| {name} | {entry['median']:.1f} s{faster} | {mebibytes(entry['peak_bytes'])} MiB |")
    return rows


def print_report(result: Result, console: Console) -> None:
    for pair in PAIRS:
        lines = [result["left_out"][pair]] if pair in result["left_out"] else markdown(result, pair, "grpo_fast")
        console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


SUITE = Suite("bench-drop-ins", HELP, DropInSettings, run, print_report, packages=("liger_kernel",))
