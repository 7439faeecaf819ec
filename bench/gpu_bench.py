"""Times the loss, log-probabilities and the fused head on a GPU; what a part has measured stands in the JSON before the next case begins.

    python bench/gpu_bench.py bench|head --output gpu.json [--shape 4096x128256] [--device cpu]

Read bench/README.md. The JSON is merged: each part replaces its own entries. On the CPU it is a rehearsal, on small shapes.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import grpo_fast as gf
from grpo_fast.backends import select
from grpo_fast.benchmark.report import write_atomically

KIND = "gpu"  # of the JSON: `grpo-fast bench --plot` draws it by this
VOCABULARIES, ROWS = (128256, 152064, 32000, 262144), (4096, 16384, 1024, 32768, 256)  # what is quoted first comes first
HEADS = ((8192, 3584, 152064), (8192, 4096, 128256))  # rows, width, vocabulary
REHEARSAL = {"bench": ((20, 101),), "head": ((40, 16, 50),)}  # on the CPU
COMPILED_ROWS = 4096  # torch.compile takes seconds for each shape
TEMPERATURE, GATE_ROWS = 0.9, 16
SHARE_OF_MEMORY = 0.9  # of what is free, that a case may be expected to take
FLOAT32_TERMS = 2.0**-18
AHEAD = 4_000_000  # cycles, about 2 ms: the device sleeps while a call is enqueued, so that its time is the device's and not Python's
LENIENT = 16  # other libraries may compute in bfloat16: they are timed, and marked as less precise, up to so many times what is allowed


class Timer:
    """Median and spread of a call in milliseconds, caches flushed before each."""

    def __init__(self, device: str, repetitions: int, seconds: float = 1.5):
        self.device, self.repetitions, self.seconds = device, repetitions, seconds
        self.flush = torch.empty(256 << 20 if device == "cuda" else 1 << 20, dtype=torch.uint8, device=device)

    def once(self, call: Callable[..., Any], prepare: Callable[[], Any]) -> float:
        given = prepare()
        if self.device != "cuda":
            self.flush.zero_()
            start = time.perf_counter()
            call(given)
            return (time.perf_counter() - start) * 1e3
        torch.cuda._sleep(AHEAD)
        self.flush.zero_()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call(given)
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))

    def __call__(self, call: Callable[..., Any], prepare: Callable[[], Any] = lambda: None) -> dict[str, Any]:
        """call(prepare()), of which only the call is timed."""
        for _ in range(2):
            call(prepare())
        peak = None
        if self.device == "cuda":
            given = prepare()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call(given)
            peak = torch.cuda.max_memory_allocated() - before
            del given
        first = self.once(call, prepare)
        count = max(5, min(self.repetitions, int(self.seconds * 1e3 / max(first, 1e-3)))) if self.repetitions > 5 else self.repetitions
        times = sorted(self.once(call, prepare) for _ in range(count))
        quarter = len(times) // 4
        spread = {"quartiles": [times[quarter], times[-1 - quarter]], "least": times[0], "repetitions": count}
        return {"ms": statistics.median(times), **spread, "peak_bytes": peak}


def machine(device: str) -> dict[str, Any]:
    versions = {}
    for name in ("torch", "triton", "trl", "liger-kernel", "verl", "quack-kernels"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    found: dict[str, Any] = {"device": device, "versions": versions, "date": time.strftime("%Y-%m-%d")}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"device": properties.name, "bytes": properties.total_memory, "multiprocessors": properties.multi_processor_count}
    return found


def clocks() -> dict[str, float] | None:
    """None where the driver does not tell. By the driver's library: nvidia-smi takes longer than most cases."""
    try:
        return {"mhz": torch.cuda.clock_rate(), "celsius": torch.cuda.temperature(), "watts": torch.cuda.power_draw() / 1e3}
    except Exception:  # no such library, no such sensor: each has its own error
        return None


# ---- what is written


class Results:
    """The entries of one part, in the file as soon as they are there: a lost machine loses one case."""

    def __init__(self, output: Path, part: str, device: str):
        self.output, self.part = output, part
        found = json.loads(output.read_text()) if output.exists() else {}
        self.whole = found | {"kind": KIND, "machine": machine(device), part: []}

    def add(self, entry: dict[str, Any]) -> dict[str, Any]:
        self.whole[self.part].append(entry)
        write_atomically(self.output, lambda partial: partial.write_text(json.dumps(self.whole, indent=1)))
        hidden = ("trace", "quartiles", "clocks", "work")
        print(*(f"{k}={v:.3f}" if isinstance(v, float) else f"{k}={v}" for k, v in entry.items() if k not in hidden))
        return entry


def recorded(entry: dict[str, Any], work: Callable[[], dict[str, Any]], needed: float, device: str, deadline: float) -> dict[str, Any]:
    """entry with the work's results, or with why there are none. needed: bytes that it takes beside what is allocated."""
    if time.monotonic() > deadline:
        return {**entry, "skipped": "the time budget is spent"}
    if device == "cuda":
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0] * SHARE_OF_MEMORY
        if needed > free:
            return {**entry, "skipped": f"takes about {needed / 2**30:.0f} GiB of the {free / 2**30:.0f} GiB that are free"}
    before = clocks() if device == "cuda" else None
    try:
        found = work()
    except Exception as error:  # one failure must not lose the rest
        found = {"error": f"{type(error).__name__}: {str(error)[:500]}", "trace": traceback.format_exc()[-1500:]}
    return {**entry, **found, "clocks": [before, clocks() if device == "cuda" else None]}


# ---- the gate


def ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between neighbours of the type at |x|."""
    return torch.finfo(dtype).eps * 2.0 ** x.abs().clamp_min(torch.finfo(dtype).tiny).log2().floor()


def check_gradient(found: Tensor, truth: Tensor, ids: Tensor) -> float:
    """The largest error in units of what is allowed.

    The target's column and the others are held each to their own size, which differ by orders of magnitude: a gradient without the
    others' part would pass otherwise. Allowed: an ulp of the gradient's type, at the largest of the row, and float32's terms.

    Args:
        found: [n, V], of the gradient's type. truth: [n, V], float64. ids: [n].
    """
    columns = ids.unsqueeze(-1)
    error = (found.double() - truth).abs()
    worst = 0.0
    for part, size in (
        (error.gather(-1, columns), truth.gather(-1, columns)),
        (error.scatter(-1, columns, 0.0), truth.scatter(-1, columns, 0.0)),
    ):
        largest = size.abs().amax(-1, keepdim=True)
        ratio = (part / (ulp(largest, found.dtype) + FLOAT32_TERMS * largest)).amax().item()
        worst = max(worst, ratio if ratio == ratio else math.inf)
    return worst


def check_values(found: Tensor, truth: Tensor) -> float:
    """The same for log-probabilities or entropies, by their own type."""
    allowed = (torch.finfo(found.dtype).eps + FLOAT32_TERMS) * truth.abs().clamp_min(1.0)
    worst = ((found.double() - truth).abs() / allowed).amax().item()
    return worst if worst == worst else math.inf


def judged(worst: float, name: str) -> dict[str, Any]:
    """For the entry; raises where no time may be told."""
    if not worst <= (1 if name.startswith("ours") else LENIENT):
        raise ValueError(f"wrong: off by {worst:.1f} times what is allowed")
    return {"error_of_allowed": worst, **({"less_precise": True} if worst > 1 else {})}


# ---- loss and log-probabilities


@dataclass(frozen=True)
class Given:
    """One case. Logits are [1, N, V], the first rows of [1, N + 1, V], which Liger needs: nothing is copied."""

    whole: Tensor
    ids: Tensor  # [1, N]
    advantages: Tensor
    old: Tensor

    @property
    def logits(self) -> Tensor:
        return self.whole[:, :-1]

    def sample(self) -> Tensor:
        """Rows that the gate looks at, the first and the last among them."""
        rows = self.ids.shape[1]
        return torch.linspace(0, rows - 1, min(GATE_ROWS, rows), device=self.ids.device).round().long()

    def truth(self) -> tuple[Tensor, Tensor, Tensor]:
        """(gradient [n, V], logprobs [n], entropy [n]) of the sampled rows in float64."""
        rows = self.sample()
        z = (self.logits[0, rows].double()).requires_grad_()
        logprobs = (z / TEMPERATURE).log_softmax(-1)
        picked = logprobs.gather(-1, self.ids[0, rows].unsqueeze(-1)).squeeze(-1)
        share = len(rows) / self.ids.shape[1]
        loss = clipped(picked, self.old[0, rows].double(), self.advantages[0, rows].double()) * share
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        return torch.autograd.grad(loss, z)[0], picked.detach(), entropy.detach()


@dataclass(frozen=True)
class Contestant:
    name: str
    call: Callable[..., Any]  # loss(logits, ids, advantages, old), or (logprobs, entropy or None) of (logits, ids)
    times_logits: float  # what it takes beside the logits, in multiples of them, in the worst case
    work: str = ""  # where it is not the others'
    whole: bool = False  # takes [1, N + 1, V]
    inplace: bool = False  # may write over its logits


def clipped(logprobs: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    ratio = (logprobs - old).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()


def eager_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    return (logits.float() / TEMPERATURE).log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def eager(logits: Tensor, ids: Tensor, advantages: Tensor, old: Tensor) -> Tensor:
    """The loss as one writes it by hand: float32, ratio, clip, mean."""
    return clipped(eager_logprobs(logits, ids), old, advantages)


def eager_entropy(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    logprobs = (logits.float() / TEMPERATURE).log_softmax(-1)
    return logprobs.gather(-1, ids.unsqueeze(-1)).squeeze(-1), -(logprobs.exp() * logprobs).sum(-1)


def imported(module: str, name: str) -> Any:
    """The function, or None where it cannot be had, for whatever reason."""
    try:
        return getattr(__import__(module, fromlist=[name]), name, None)
    except Exception:
        return None


def by_kernels(device: str) -> bool:
    """Whether the Triton kernels compute on this device."""
    return select(torch.device(device)) == "triton"


def libraries() -> dict[str, Contestant]:
    """Log-probabilities by other libraries, under the same clipped loss; what is not installed is not there."""
    found = {}
    if function := imported("trl.trainer.utils", "selective_log_softmax"):
        found["trl"] = Contestant("trl", lambda z, ids, f=function: f(z, ids, temperature=TEMPERATURE), 5)
    if function := imported("verl.utils.torch_functional", "logprobs_from_logits"):
        divided = "divides the logits by T in a pass of its own, as its actor does"
        found["verl"] = Contestant("verl", lambda z, ids, f=function: f(z / TEMPERATURE, ids), 6, divided)
    if function := imported("quack.cross_entropy", "cross_entropy"):

        def quack(z: Tensor, ids: Tensor, f: Any = function) -> Tensor:
            return -f((z / TEMPERATURE).view(-1, z.shape[-1]), ids.view(-1), reduction="none").view(ids.shape)

        found["quack"] = Contestant("quack", quack, 5, "knows no temperature: a pass of its own divides the logits")
    return found


def our_loss(impl: str | None, inplace: bool = False) -> Callable[..., Tensor]:
    options: dict[str, Any] = {"temperature": TEMPERATURE, "config": gf.LossConfig(loss_type="bnpo"), "impl": impl, "inplace": inplace}
    return lambda z, ids, a, old: gf.grpo_loss(z, ids, a, old_logprobs=old, **options).loss


def loss_contestants(device: str, rows: int) -> list[Contestant]:
    """Loss and gradient. Ours computes entropy and metrics besides, always."""
    found = [Contestant("eager", eager, 10)]
    for name, other in libraries().items():
        call = other.call
        found.append(
            Contestant(name, lambda z, ids, a, old, f=call: clipped(f(z, ids).float(), old, a), other.times_logits + 1, other.work)
        )
    if function := imported("trl.trainer.utils", "selective_log_softmax_and_entropy"):

        def trl_entropy(z: Tensor, ids: Tensor, a: Tensor, old: Tensor) -> Tensor:
            return clipped(function(z, ids, entropy_requires_grad=False, temperature=TEMPERATURE)[0].float(), old, a)

        found.append(Contestant("trl_entropy", trl_entropy, 8, "the entropy too, as a metric: the work that ours does"))
    if not by_kernels(device):
        return [Contestant("ours", our_loss(None), 1), Contestant("ours_inplace", our_loss(None, True), 1, inplace=True), *found]
    found = [
        *(Contestant("ours" + end, our_loss("triton", bool(end)), 1, inplace=bool(end)) for end in ("", "_inplace")),
        *(Contestant("ours_cluster" + end, our_loss("cluster", bool(end)), 1, inplace=bool(end)) for end in ("", "_inplace")),
        *found,
    ]
    if rows == COMPILED_ROWS:
        torch.compiler.reset()
        found.append(Contestant("compile", torch.compile(eager, dynamic=False), 6))
    if liger_loss := imported("liger_kernel.ops.grpo_loss", "GrpoLossFunction"):

        def liger(z: Tensor, ids: Tensor, a: Tensor, old: Tensor) -> Tensor:
            return liger_loss.apply(z, old, None, ids, a[:, 0].contiguous(), None, TEMPERATURE, 0.0, 0.2, 0.2, False)[0].mean()

        found.append(Contestant("liger", liger, 2, "no entropy, no metrics but KL and clipping", whole=True))
    return found


def forward_contestants(device: str) -> dict[str, list[Contestant]]:
    """Log-probabilities alone, and with the entropy; without a gradient."""
    without = [Contestant("eager", eager_logprobs, 7), *libraries().values()]
    with_entropy = [
        Contestant("ours", lambda z, ids: tuple(gf.token_logprobs(z, ids, temperature=TEMPERATURE))[:2], 0.1),
        Contestant("eager", eager_entropy, 10),
    ]
    if function := imported("trl.trainer.utils", "selective_log_softmax_and_entropy"):
        with_entropy.append(Contestant("trl", lambda z, ids: function(z, ids, temperature=TEMPERATURE), 8))
    if by_kernels(device):
        from grpo_fast.kernels.token_logprobs import Rows, Scoring, token_logprobs_fwd

        def without_entropy(z: Tensor, ids: Tensor) -> Tensor:
            rows = Rows(z, ids, torch.ones_like(ids, dtype=torch.bool))
            return token_logprobs_fwd(rows, Scoring(None, TEMPERATURE, 0.0, 1.0), want_entropy=False)[0]

        without.insert(0, Contestant("ours", without_entropy, 0.1, "the kernels themselves, without the operator's checks"))
    return {"logprobs": without, "logprobs+entropy": with_entropy}


def gradient_alone(given: Given) -> Callable[[Any], Tensor]:
    """The gradient kernel by itself, which reads the logits and writes as much: from statistics, g and h that are there."""
    from grpo_fast.kernels.token_logprobs import Rows, Scoring, token_gradient, token_logprobs_fwd

    rows = Rows(given.logits, given.ids, torch.ones_like(given.ids, dtype=torch.bool))
    scoring, h = Scoring(None, TEMPERATURE, 0.0, 1.0), torch.zeros(1, 1, device=given.ids.device)
    logprobs, entropy, lse = token_logprobs_fwd(rows, scoring)
    (g,) = torch.autograd.grad(clipped(logprobs.requires_grad_(), given.old, given.advantages), logprobs)

    def call(_: None) -> Tensor:
        gradient = torch.empty(given.logits.shape, dtype=given.logits.dtype, device=given.logits.device)
        token_gradient(rows, scoring, g, h, logprobs, entropy, lse, gradient, want_entropy=False)
        return gradient

    return call


def case(rows: int, vocabulary: int, device: str) -> Given:
    generator = torch.Generator(device).manual_seed(0)
    whole = torch.empty(1, rows + 1, vocabulary, device=device, dtype=torch.bfloat16)
    whole.normal_(generator=generator)
    ids = torch.randint(vocabulary, (1, rows), device=device, generator=generator)
    advantages = torch.full((1, rows), 0.7, device=device)  # one sequence: Liger takes one advantage for each
    old = [eager_logprobs(z, i) for z, i in zip(whole[0, :-1].split(256), ids[0].split(256), strict=True)]
    return Given(whole, ids, advantages, torch.cat(old).unsqueeze(0) + 0.01)


def measured_loss(contestant: Contestant, given: Given, truth: tuple[Tensor, ...], timer: Timer) -> dict[str, Any]:
    """Loss and gradient of the call that is timed; raises where they are wrong."""
    rest, kept = (given.ids, given.advantages, given.old), []

    def prepare() -> Tensor:
        kept.clear()  # the last gradient, before the next logits
        leaf = (given.whole if contestant.whole else given.logits).detach().requires_grad_()
        return leaf * 1 if contestant.inplace else leaf  # a leaf may not be written over

    def call(logits: Tensor) -> None:
        loss = contestant.call(logits, *rest)
        kept[:] = [loss.detach(), *torch.autograd.grad(loss, logits)]

    found = timer(call, prepare)
    loss, gradient = kept
    rows = given.sample()
    if not torch.isfinite(loss):
        raise ValueError(f"wrong: the loss is {loss.item()}")
    return {**found, **judged(check_gradient(gradient[0, rows], truth[0], given.ids[0, rows]), contestant.name)}


def measured_forward(contestant: Contestant, given: Given, truth: tuple[Tensor, ...], timer: Timer) -> dict[str, Any]:
    kept: list[Any] = []

    def call(_: None) -> None:
        kept[:] = [contestant.call(given.logits, given.ids)]

    with torch.no_grad():
        found = timer(call, kept.clear)
    rows = given.sample()
    results = kept[0] if isinstance(kept[0], tuple) else (kept[0],)
    worst = max(check_values(result[0, rows], exact) for result, exact in zip(results, truth[1:], strict=False))
    return {**found, **judged(worst, contestant.name)}


def measured_gradient(given: Given, truth: tuple[Tensor, ...], timer: Timer) -> dict[str, Any]:
    alone, rows, kept = gradient_alone(given), given.sample(), []

    def call(_: None) -> None:
        kept[:] = [alone(None)]

    found = timer(call, kept.clear)
    return {**found, **judged(check_gradient(kept[0][0, rows], truth[0], given.ids[0, rows]), "ours")}


def bench(shapes: list[tuple[int, int]], timer: Timer, device: str, deadline: float, results: Results) -> None:
    for rows, vocabulary in shapes:
        one_shape(rows, vocabulary, timer, device, deadline, results)
    print(against_targets(results.whole["bench"]))


def with_bandwidth(found: dict[str, Any], step: str, given: Given, floor: float | None) -> dict[str, Any]:
    """And what it is in GB/s and in copies, of which a read is half. floor: milliseconds of a copy, if it could be timed."""
    reads, unit = (1, "times_read") if step.startswith("logprobs") else (2, "times_copy")
    size = given.logits.numel() * given.logits.element_size()
    return {**found, "gbps": reads * size / found["ms"] / 1e6, unit: found["ms"] / floor * 2 / reads if floor else None}


@dataclass
class Shape:
    """The data of one shape and the time of a copy of its logits; `given` is None where it does not fit: the entry says why."""

    entry: dict[str, Any]
    given: Given | None = None
    truth: tuple[Tensor, ...] = ()
    copy_ms: float | None = None


def made(rows: int, vocabulary: int, timer: Timer, device: str, deadline: float, results: Results) -> Shape:
    size = 2 * rows * vocabulary
    shape = Shape({"rows": rows, "vocabulary": vocabulary, "dtype": "bfloat16"})

    def make() -> dict[str, Any]:
        shape.given = case(rows, vocabulary, device)
        shape.truth = shape.given.truth()
        return {}

    done = recorded({**shape.entry, "step": "loss", "name": "data"}, make, 1.1 * size + 2**31, device, deadline)
    given = shape.given
    if given is None or "error" in done:
        results.add(done)
        shape.given = None
        return shape

    def copy() -> dict[str, Any]:
        target = torch.empty_like(given.logits)
        return timer(lambda _: target.copy_(given.logits))

    done = recorded({**shape.entry, "step": "loss", "name": "copy"}, copy, size, device, deadline)
    shape.copy_ms = results.add(done).get("ms")
    return shape


def one_shape(rows: int, vocabulary: int, timer: Timer, device: str, deadline: float, results: Results) -> None:
    shape = made(rows, vocabulary, timer, device, deadline, results)
    given, truth, size = shape.given, shape.truth, 2 * rows * vocabulary
    if given is None:
        return

    def add(step: str, contestant: Contestant) -> None:
        measured = measured_loss if step == "loss" else measured_forward

        def work() -> dict[str, Any]:
            return with_bandwidth(measured(contestant, given, truth, timer), step, given, shape.copy_ms)

        entry = {**shape.entry, "step": step, "name": contestant.name, **({"work": contestant.work} if contestant.work else {})}
        results.add(recorded(entry, work, (contestant.times_logits + contestant.inplace) * size, device, deadline))

    for contestant in loss_contestants(device, rows):
        add("loss", contestant)
    for step, contestants in forward_contestants(device).items():
        for contestant in contestants:
            add(step, contestant)
    if by_kernels(device):
        entry = {**shape.entry, "step": "gradient", "name": "ours"}

        def gradient() -> dict[str, Any]:
            return with_bandwidth(measured_gradient(given, truth, timer), "gradient", given, shape.copy_ms)

        results.add(recorded(entry, gradient, size, device, deadline))


# Of a copy's bandwidth, at 4096 rows and more of 32000 logits and more.
TARGETS = (("logprobs", "ours", 0.93), ("logprobs+entropy", "ours", 0.90), ("gradient", "ours", 0.93), ("loss", "ours_cluster", 0.85))
OVER_LIGER = 1.34  # loss and gradient by clusters


def against_targets(entries: list[dict[str, Any]]) -> str:
    """What was measured beside what is asked: the least and the largest over the shapes, or that there is nothing."""
    large = [e for e in entries if "ms" in e and e["rows"] >= 4096 and e["vocabulary"] >= 32000]
    lines = []

    def line(what: str, shares: list[float], target: float) -> None:
        found = f"{min(shares):.2f} to {max(shares):.2f} over {len(shares)} shapes" if shares else "not measured"
        lines.append(f"{what}: {found}, asked {target:.2f}")

    for step, name, target in TARGETS:
        times = [e.get("times_read", e.get("times_copy")) for e in large if (e["step"], e["name"]) == (step, name)]
        line(f"{name}, {step}, of copy bandwidth", [1 / t for t in times if t], target)
    both = [
        {(e["rows"], e["vocabulary"]): e["ms"] for e in large if (e["step"], e["name"]) == ("loss", n)} for n in ("ours_cluster", "liger")
    ]
    line("ours_cluster over liger, loss and gradient", [both[1][s] / both[0][s] for s in both[0].keys() & both[1].keys()], OVER_LIGER)
    return "\n".join(lines)


# ---- the fused head


def head_truth(x: Tensor, w: Tensor, ids: Tensor, dx: Tensor, dw: Tensor) -> float:
    """The gradients' largest error in units of what is allowed, for sampled rows of each.

    Logits and their gradients pass through the head in the inputs' type, so p is known to an eps of the largest logit besides its own:
    each product's allowance is that share of the same product with absolute values.

    Args:
        x: [N, D], w: [V, D], ids: [N], of a loss that is the mean of -log p. dx, dw: its gradients.
    """
    rows = torch.linspace(0, len(x) - 1, min(GATE_ROWS, len(x)), device=x.device).round().long()
    wanted = ids[rows]
    lse, largest, some = [], 0.0, []
    for part in x.split(512):
        logits = part.double() @ w.double().t()
        lse.append(logits.logsumexp(-1))
        largest = max(largest, logits.abs().amax().item())
        some.append(logits[:, wanted])
    all_lse, n = torch.cat(lse), len(x)
    eps = torch.finfo(x.dtype).eps

    g_rows = (x[rows].double() @ w.double().t() - all_lse[rows, None]).exp() / n
    g_rows[torch.arange(len(rows)), ids[rows]] -= 1 / n
    g_columns = (torch.cat(some) - all_lse[:, None]).exp() / n  # [N, n]
    g_columns -= (ids[:, None] == wanted) / n
    worst = 0.0
    for found, g, other in ((dx[rows], g_rows, w.double()), (dw[wanted], g_columns.t(), x.double())):
        truth, whole = g @ other, g.abs() @ other.abs()
        ratio = ((found.double() - truth).abs() / (eps * (1 + largest) * whole + eps * truth.abs())).amax().item()
        worst = max(worst, ratio if ratio == ratio else math.inf)
    return worst


def head(shapes: list[tuple[int, int, int]], timer: Timer, device: str, deadline: float, results: Results) -> None:
    """linear_grpo_loss against its three bare products; the weight's gradient comes out of its product in float32 in both."""
    for rows, width, vocabulary in shapes:
        entry: dict[str, Any] = {"rows": rows, "width": width, "vocabulary": vocabulary, "dtype": "bfloat16", "name": "ours_head"}

        def work(rows: int = rows, width: int = width, vocabulary: int = vocabulary) -> dict[str, Any]:
            generator = torch.Generator(device).manual_seed(0)
            options: Any = {"device": device, "dtype": torch.bfloat16, "generator": generator}
            hidden = torch.randn(1, rows, width, **options).requires_grad_()
            weight = (torch.randn(vocabulary, width, **options) / width**0.5).requires_grad_()
            ids = torch.randint(vocabulary, (1, rows), device=device, generator=generator)
            advantages, config = torch.ones(1, device=device), gf.LossConfig(loss_type="bnpo")
            x, w = hidden.detach()[0], weight.detach()

            def products(_: None) -> None:
                logits = x @ w.t()
                logits @ w
                if device == "cuda":
                    torch.mm(logits.t(), x, out_dtype=torch.float32)
                else:
                    logits.t() @ x

            kept: list[Tensor] = []

            def call(_: None) -> None:
                kept[:] = torch.autograd.grad(gf.linear_grpo_loss(hidden, weight, ids, advantages, config=config).loss, (hidden, weight))

            floor = timer(products)
            found = timer(call, kept.clear)
            gate = judged(head_truth(x, w, ids[0], kept[0][0], kept[1]), "ours")
            flops = 6 * rows * width * vocabulary / found["ms"] / 1e9
            return {
                **found,
                **gate,
                "tflops": flops,
                "floor_ms": floor["ms"],
                "share_of_floor": floor["ms"] / found["ms"],
            }

        needed = 2 * rows * vocabulary * 3 + 4 * 4 * vocabulary * width + 8 * 3 * vocabulary * width
        results.add(recorded(entry, work, needed, device, deadline))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("bench", "head"))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shape", action="append", help="ROWSxVOCABULARY, or for head ROWSxWIDTHxVOCABULARY; may be repeated")
    parser.add_argument("--repetitions", type=int, default=30, help="at most; fewer where they would take more than 1.5 s")
    options = parser.parse_args()
    deadline = time.monotonic() + float(os.environ.get("BUDGET_S", "400"))
    timer = Timer(options.device, options.repetitions)
    shapes: Any = [tuple(int(n) for n in text.split("x")) for text in options.shape or []]
    if not shapes:
        quoted = {"bench": [(n, v) for n in ROWS for v in VOCABULARIES], "head": list(HEADS)}
        shapes = (quoted if options.device == "cuda" else REHEARSAL)[options.part]
    results = Results(options.output, options.part, options.device)
    (bench if options.part == "bench" else head)(shapes, timer, options.device, deadline, results)


if __name__ == "__main__":
    main()
