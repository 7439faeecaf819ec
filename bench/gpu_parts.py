"""The parts of a visit to a GPU machine, in order: their limits, what they leave behind, and which of them are done. bench/gpu.sh asks.

    python bench/gpu_parts.py plan
    python bench/gpu_parts.py is-done test --output gpu.json --device cuda --sources HASH

A part is done if it ended without a failure, on the same machine with the same libraries and built from the same sources.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CALL_SECONDS, VISIT_SECONDS, MOST_FILES = 540, 1800, 6  # of a call of bench/gpu.sh, of a visit, and files that a call leaves
PREFLIGHT_SECONDS = 70


@dataclass(frozen=True)
class Step:
    """One command of a part."""

    name: str
    seconds: int


@dataclass(frozen=True)
class Part:
    name: str  # the argument of bench/gpu.sh
    steps: tuple[Step, ...]
    what: str
    leaves: str
    on_request: bool = False

    @property
    def seconds(self) -> int:
        return sum(step.seconds for step in self.steps)


LOGS = "logs.tar.gz, parts.log"
PARTS = (
    Part("build", (Step("build", 150),), "installs the package into build/gpu", LOGS),
    Part("smoke", (Step("smoke", 35), Step("smoke_cluster", 25)), "Triton and cluster kernels at three shapes", f"gpu.json, {LOGS}"),
    Part("test", (Step("preflight", PREFLIGHT_SECONDS), Step("test", 330)), "every test marked gpu", f"gpu.json, test.xml, {LOGS}"),
    Part("bench", (Step("bench", 280), Step("cluster", 130)), "loss, log-probabilities, gradient; the cluster kernel", f"gpu.json, {LOGS}"),
    Part("head", (Step("head", 170),), "the head against its bare products; kept sets", f"gpu.json, {LOGS}"),
    Part("profile", (Step("profile", 120),), "one call of ncu for each kernel", f"gpu.json, {LOGS}"),
    Part("tune", (Step("tune", 170),), "other launch shapes", f"gpu.json, {LOGS}", on_request=True),
)


def budget(step: str) -> int:
    """Seconds of a step; BUDGET_S sets each."""
    seconds = {each.name: each.seconds for part in PARTS for each in part.steps}[step]
    return int(os.environ.get("BUDGET_S", seconds))


def calls() -> list[list[Part]]:
    """The parts, one after the other in as few calls of bench/gpu.sh as keep each call within its limit."""
    found: list[list[Part]] = []
    for part in PARTS:
        if found and sum(each.seconds for each in (*found[-1], part)) <= CALL_SECONDS:
            found[-1].append(part)
        else:
            found.append([part])
    return found


def plan() -> str:
    lines = [
        "Run these in order. A part that is done is skipped; AGAIN=1 runs it again. A part that ran out of time goes on where it ended."
    ]
    total = 0
    for number, parts in enumerate(calls(), 1):
        seconds = sum(part.seconds for part in parts)
        total += seconds
        lines.append(f"\n{number}. bench/gpu.sh {' '.join(part.name for part in parts)}   (at most {seconds} s, {total} s since the start)")
        for part in parts:
            when = " (only on request)" if part.on_request else ""
            lines.append(f"   {part.name}: {part.what}; at most {part.seconds} s{when}; leaves {part.leaves}")
    lines.append(
        f"\nTogether at most {total} s of {VISIT_SECONDS} s. The rest is for starting the machine and for parts that are run again."
    )
    return "\n".join(lines)


def is_done(step: str, whole: dict[str, Any], machine: dict[str, Any], sources: str) -> bool:
    """Whether a step is done on this machine from these sources, nothing of it left out for lack of time."""
    there = whole.get("machine", {})
    if any(there.get(name) != machine[name] for name in ("device", "versions")):
        return False
    skipped = any("time budget" in entry.get("skipped", "") for entry in whole.get(step, []))
    return not skipped and bool(whole.get("done", {}).get(step) == sources)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("plan", "budget", "is-done", "record"))
    parser.add_argument("step", nargs="?", default="")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sources", default="")
    options = parser.parse_args()
    if options.action == "plan":
        print(plan())
        return 0
    if options.action == "budget":
        print(budget(options.step))
        return 0
    sys.path.insert(0, str(Path(__file__).parent))
    from gpu_measure import machine, record_done

    if options.action == "record":
        record_done(options.output, options.step, options.device, options.sources)
        return 0
    whole = json.loads(options.output.read_text()) if options.output.exists() else {}
    return int(not is_done(options.step, whole, machine(options.device), options.sources))


if __name__ == "__main__":
    sys.exit(main())
