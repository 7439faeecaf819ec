"""Times the loss and the fused head on a GPU; every part catches its failure and records it.

    python bench/gpu_bench.py bench|head --output gpu.json [--device cpu --shape 8x100 --repetitions 3]

Read bench/README.md. The JSON is merged: each part replaces its own entry.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import grpo_fast as gf

VOCABULARIES, ROWS = (32000, 128256, 152064, 262144), (4096, 32768, 256)
HEADS = ((8192, 3584, 152064), (8192, 4096, 128256))  # rows, width, vocabulary
TEMPERATURE, GATE_ROWS = 0.9, 16


class Timer:
    """Median and spread of a call in milliseconds, caches flushed before each."""

    def __init__(self, device: str, repetitions: int):
        self.device, self.repetitions = device, repetitions
        self.flush = torch.empty(256 << 20 if device == "cuda" else 1 << 20, dtype=torch.uint8, device=device)

    def once(self, call: Callable[[], Any]) -> float:
        self.flush.zero_()
        if self.device != "cuda":
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) * 1e3
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))

    def __call__(self, call: Callable[[], Any]) -> dict[str, Any]:
        for _ in range(3):
            call()
        peak = None
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call()
            peak = torch.cuda.max_memory_allocated() - before
        times = sorted(self.once(call) for _ in range(self.repetitions))
        quarter = len(times) // 4
        return {"ms": statistics.median(times), "quartiles": [times[quarter], times[-1 - quarter]], "least": times[0], "peak_bytes": peak}


def machine(device: str) -> dict[str, Any]:
    versions = {}
    for name in ("torch", "triton", "trl", "liger-kernel", "verl", "quack-kernels"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {"device": torch.cuda.get_device_name() if device == "cuda" else device, "versions": versions, "clocks": clocks()}


def clocks() -> str | None:
    try:
        query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,temperature.gpu,power.draw", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def eager(logits: Tensor, ids: Tensor, advantages: Tensor, old: Tensor) -> Tensor:
    """The loss as one writes it by hand: float32, ratio, clip, mean."""
    logprobs = (logits[:, :-1].float() / TEMPERATURE).log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    ratio = (logprobs - old).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()


def contestants(device: str) -> dict[str, Callable[..., Tensor]]:
    """name -> loss(logits [1, N + 1, V], ids, advantages, old); what is not installed is not there."""

    def ours(impl: str | None) -> Callable[..., Tensor]:
        config = gf.LossConfig(loss_type="bnpo")
        return lambda z, ids, a, old: gf.grpo_loss(z, ids, a, old_logprobs=old, temperature=TEMPERATURE, config=config, impl=impl).loss

    found: dict[str, Callable[..., Tensor]] = {"ours": ours(None), "eager": eager}
    if device == "cuda":
        found = {"ours": ours("triton"), "ours_cluster": ours("cluster"), "eager": eager, "compile": torch.compile(eager, dynamic=False)}
        try:
            from liger_kernel.ops.grpo_loss import GrpoLossFunction

            def liger(z: Tensor, ids: Tensor, a: Tensor, old: Tensor) -> Tensor:
                out = GrpoLossFunction.apply(z, old, None, ids, a[:, 0], None, TEMPERATURE, 0.0, 0.2, 0.2, False)
                return out[0].mean()

            found["liger"] = liger
        except ImportError:
            pass
    return found


def case(rows: int, vocabulary: int, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(1, rows + 1, vocabulary, device=device, generator=generator, dtype=torch.bfloat16)
    ids = torch.randint(vocabulary, (1, rows), device=device, generator=generator)
    advantages = torch.full((1, rows), 0.7, device=device)  # one sequence: Liger takes one advantage for each
    picked = logits[:, :-1].gather(-1, ids.unsqueeze(-1)).squeeze(-1).float() / TEMPERATURE
    chunks = [(part.float() / TEMPERATURE).logsumexp(-1) for part in logits[0, :-1].split(512)]
    return logits.requires_grad_(), ids, advantages, picked - torch.cat(chunks).unsqueeze(0) + 0.01


def gate(loss: Callable[..., Tensor], given: tuple[Tensor, ...]) -> float:
    """The gradient's error on the first rows, relative to the float64 truth's length."""
    few = tuple(x[:, : GATE_ROWS + (x is given[0])].detach() for x in given)  # logits have one position more
    z = few[0].clone().requires_grad_()
    loss(z, *few[1:]).backward()
    exact = few[0].double().requires_grad_()
    eager64(exact, *few[1:]).backward()
    assert z.grad is not None and exact.grad is not None
    return float((z.grad.double() - exact.grad).norm() / exact.grad.norm())


def eager64(logits: Tensor, ids: Tensor, advantages: Tensor, old: Tensor) -> Tensor:
    logprobs = (logits[:, :-1] / TEMPERATURE).log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    ratio = (logprobs - old.double()).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()


def recorded(entry: dict[str, Any], work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """entry with the work's results, or with what went wrong."""
    try:
        return {**entry, **work()}
    except Exception as error:  # one failure must not lose the rest
        return {**entry, "error": f"{type(error).__name__}: {str(error)[:500]}", "trace": traceback.format_exc()[-1500:]}
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def measured(loss: Callable[..., Tensor], given: tuple[Tensor, ...], timer: Timer, floor: dict[str, Any]) -> dict[str, Any]:
    """Loss and gradient: no time for a wrong result."""
    error = gate(loss, given)
    if not error < 2e-2:
        raise ValueError(f"wrong: the gradient is off by {error:.1e} of its length")
    found = timer(lambda: torch.autograd.grad(loss(*given), given[0]))
    return {**found, "gradient_error": error, "times_copy": found["ms"] / floor["ms"] if "ms" in floor else None}


def bench(shapes: list[tuple[int, int]], timer: Timer, device: str, deadline: float) -> list[dict[str, Any]]:
    results = []
    for rows, vocabulary in shapes:
        entry: dict[str, Any] = {"rows": rows, "vocabulary": vocabulary, "dtype": "bfloat16"}
        if time.monotonic() > deadline:
            results.append({**entry, "error": "not started: the time budget is spent"})
            continue
        given = case(rows, vocabulary, device)
        target = torch.empty_like(given[0])
        floor = recorded({**entry, "name": "copy"}, lambda given=given, target=target: timer(lambda: target.copy_(given[0].detach())))
        del target
        results.append(floor)
        for name, loss in contestants(device).items():
            results.append(
                recorded({**entry, "name": name}, lambda loss=loss, given=given, floor=floor: measured(loss, given, timer, floor))
            )
        del given
    return results


def head(shapes: list[tuple[int, int, int]], timer: Timer, device: str, deadline: float) -> list[dict[str, Any]]:
    """linear_grpo_loss against its three bare products."""
    results = []
    for rows, width, vocabulary in shapes:
        entry: dict[str, Any] = {"rows": rows, "width": width, "vocabulary": vocabulary, "dtype": "bfloat16"}
        if time.monotonic() > deadline:
            results.append({**entry, "error": "not started: the time budget is spent"})
            continue

        def work(rows: int = rows, width: int = width, vocabulary: int = vocabulary) -> dict[str, Any]:
            hidden = torch.randn(1, rows, width, device=device, dtype=torch.bfloat16, requires_grad=True)
            weight = (torch.randn(vocabulary, width, device=device, dtype=torch.bfloat16) / width**0.5).requires_grad_()
            ids, advantages = torch.randint(vocabulary, (1, rows), device=device), torch.ones(1, device=device)
            x, w = hidden.detach()[0], weight.detach()

            def products() -> None:
                logits = x @ w.T
                logits @ w
                logits.T @ x

            floor = timer(products)
            found = timer(lambda: torch.autograd.grad(gf.linear_grpo_loss(hidden, weight, ids, advantages).loss, (hidden, weight)))
            return {**found, "floor_ms": floor["ms"], "share_of_floor": floor["ms"] / found["ms"]}

        results.append(recorded({**entry, "name": "ours_head"}, work))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("bench", "head"))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shape", action="append", help="ROWSxVOCABULARY, or for head ROWSxWIDTHxVOCABULARY; may be repeated")
    parser.add_argument("--repetitions", type=int, default=30)
    options = parser.parse_args()
    deadline = time.monotonic() + float(os.environ.get("BUDGET_S", "420"))
    timer = Timer(options.device, options.repetitions)
    shapes: Any = [tuple(int(n) for n in text.split("x")) for text in options.shape or []]
    if options.part == "bench":
        results = bench(shapes or [(n, v) for n in ROWS for v in VOCABULARIES], timer, options.device, deadline)
    else:
        results = head(shapes or list(HEADS), timer, options.device, deadline)
    whole = json.loads(options.output.read_text()) if options.output.exists() else {}
    whole |= {"machine": machine(options.device), options.part: results}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(whole, indent=1))
    for r in results:
        print(*(f"{k}={v:.3f}" if isinstance(v, float) else f"{k}={v}" for k, v in r.items() if k not in ("trace", "quartiles")))


if __name__ == "__main__":
    main()
