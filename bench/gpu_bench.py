"""Times the loss, log-probabilities and the fused head on a GPU; the result file is written before the next case begins.

    python bench/gpu_bench.py smoke|smoke_cluster|bench|cluster|head --output gpu.json [--shape 4096x128256] [--device cpu]

Read bench/README.md. The JSON is merged: each part replaces its own entries, and what another machine measured is dropped. The cluster
kernel is a part, and so a process, of its own: if it hung or broke the device's context, nothing else would be lost. On the CPU it is a
rehearsal, on small shapes.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from gpu_gate import GATE_ROWS, check_gradient, check_values, gate_fields, head_truth
from gpu_kept import kept_sets
from gpu_measure import NOT_IMPORTED, Results, Timer, check_device, imported, run_case
from torch import Tensor

import grpo_fast as gf
from grpo_fast.ops.backends import select

VOCABULARIES, ROWS = (128256, 152064, 32000, 262144), (4096, 16384, 1024, 32768, 256)  # what is quoted first comes first
HEADS = ((16384, 3584, 152064), (16384, 4096, 128256))  # rows, width, vocabulary; several chunks: the sum in float32 is part of it
SMOKE = ((64, 32000), (1024, 128256), (511, 151935))  # few rows, many, and rows that begin anywhere
REHEARSAL = {**dict.fromkeys(("smoke", "smoke_cluster", "bench", "cluster"), ((20, 101),)), "head": ((40, 16, 50),)}  # on the CPU
COMPILED_ROWS = 4096  # torch.compile takes seconds for each shape
TEMPERATURE = 0.9


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
class Implementation:
    name: str
    call: Callable[..., Any]  # loss(logits, ids, advantages, old), or (logprobs, entropy or None) of (logits, ids), or gradient_alone
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


def by_kernels(device: str) -> bool:
    """Whether the Triton kernels compute on this device."""
    return select(torch.device(device)) == "triton"


def libraries() -> dict[str, Implementation]:
    """Log-probabilities by the other libraries that are installed, under the same clipped loss."""
    found = {}
    if function := imported("trl.trainer.utils", "selective_log_softmax"):
        found["trl"] = Implementation("trl", lambda z, ids, f=function: f(z, ids, temperature=TEMPERATURE), 5)
    if function := imported("verl.utils.torch_functional", "logprobs_from_logits"):
        divided = "divides the logits by T in a pass of its own, as its actor does"
        found["verl"] = Implementation("verl", lambda z, ids, f=function: f(z / TEMPERATURE, ids), 6, divided)
    if function := imported("quack.cross_entropy", "cross_entropy"):

        def quack(z: Tensor, ids: Tensor, f: Any = function) -> Tensor:
            return -f((z / TEMPERATURE).view(-1, z.shape[-1]), ids.view(-1), reduction="none").view(ids.shape)

        found["quack"] = Implementation("quack", quack, 5, "knows no temperature: a pass of its own divides the logits")
    return found


def our_loss(impl: str | None, inplace: bool = False) -> Callable[..., Tensor]:
    options: dict[str, Any] = {"temperature": TEMPERATURE, "config": gf.LossConfig(loss_type="bnpo"), "impl": impl, "inplace": inplace}
    return lambda z, ids, a, old: gf.grpo_loss(z, ids, a, old_logprobs=old, **options).loss


def loss_implementations(device: str, rows: int) -> list[Implementation]:
    """Loss and gradient. Ours computes entropy and metrics besides, always."""
    found = [Implementation("eager", eager, 10)]
    for name, other in libraries().items():
        call = other.call
        found.append(
            Implementation(name, lambda z, ids, a, old, f=call: clipped(f(z, ids).float(), old, a), other.times_logits + 1, other.work)
        )
    if function := imported("trl.trainer.utils", "selective_log_softmax_and_entropy"):

        def trl_entropy(z: Tensor, ids: Tensor, a: Tensor, old: Tensor) -> Tensor:
            return clipped(function(z, ids, entropy_requires_grad=False, temperature=TEMPERATURE)[0].float(), old, a)

        found.append(Implementation("trl_entropy", trl_entropy, 8, "the entropy too, as a metric: the work that ours does"))
    if not by_kernels(device):
        return [Implementation("ours", our_loss(None), 1), Implementation("ours_inplace", our_loss(None, True), 1, inplace=True), *found]
    found = [*(Implementation("ours" + end, our_loss("triton", bool(end)), 1, inplace=bool(end)) for end in ("", "_inplace")), *found]
    if rows == COMPILED_ROWS:
        torch.compiler.reset()
        found.append(Implementation("compile", torch.compile(eager, dynamic=False), 6))
    return [*found, *liger_implementations()]


def liger_implementations() -> list[Implementation]:
    if (liger_loss := imported("liger_kernel.ops.grpo_loss", "GrpoLossFunction")) is None:
        return []

    def liger(z: Tensor, ids: Tensor, a: Tensor, old: Tensor) -> Tensor:
        return liger_loss.apply(z, old, None, ids, a[:, 0].contiguous(), None, TEMPERATURE, 0.0, 0.2, 0.2, False)[0].mean()

    return [Implementation("liger", liger, 2, "no entropy, no metrics but KL and clipping", whole=True)]


def cluster_implementations() -> list[Implementation]:
    """Liger once more beside them: both of a comparison in one process."""
    ours = (Implementation("ours_cluster" + end, our_loss("cluster", bool(end)), 1, inplace=bool(end)) for end in ("", "_inplace"))
    return [*liger_implementations(), *ours]


OUR_FORWARD = Implementation("ours", lambda z, ids: tuple(gf.token_logprobs(z, ids, temperature=TEMPERATURE))[:2], 0.1)


def forward_implementations(device: str) -> dict[str, list[Implementation]]:
    """Log-probabilities alone, and with the entropy; without a gradient."""
    without = [Implementation("eager", eager_logprobs, 7), *libraries().values()]
    with_entropy = [
        OUR_FORWARD,
        Implementation("eager", eager_entropy, 10),
    ]
    if function := imported("trl.trainer.utils", "selective_log_softmax_and_entropy"):
        with_entropy.append(Implementation("trl", lambda z, ids: function(z, ids, temperature=TEMPERATURE), 8))
    if by_kernels(device):
        from grpo_fast.kernels.token_logprobs import LogitRows, Scoring, token_logprobs_fwd

        def without_entropy(z: Tensor, ids: Tensor) -> Tensor:
            rows = LogitRows(z, ids, torch.ones_like(ids, dtype=torch.bool))
            return token_logprobs_fwd(rows, Scoring(None, TEMPERATURE, 0.0, 1.0), want_entropy=False)[0]

        without.insert(0, Implementation("ours", without_entropy, 0.1, "the kernels themselves, without the operator's checks"))
    return {"logprobs": without, "logprobs+entropy": with_entropy}


def gradient_alone(given: Given) -> Callable[[Any], Tensor]:
    """The gradient kernel by itself, which reads the logits and writes as much: from statistics, g and h that are there."""
    from grpo_fast.kernels.token_logprobs import LogitRows, Scoring, token_gradient, token_logprobs_fwd

    rows = LogitRows(given.logits, given.ids, torch.ones_like(given.ids, dtype=torch.bool))
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


def beside_a_copy(timer: Timer, given: Given, call: Callable[..., Any], prepare: Callable[[], Any]) -> dict[str, Any]:
    """The call, and in turn with it a copy of the logits: what it is compared with ran at the same clocks."""
    found, copy = timer.in_turn((call, prepare), (lambda target: target.copy_(given.logits), lambda: torch.empty_like(given.logits)))
    return {**found, "copy_ms": copy["ms"]}


def measured_loss(implementation: Implementation, given: Given, truth: tuple[Tensor, ...], timer: Timer) -> dict[str, Any]:
    """Loss and gradient of the call that is timed; raises where they are wrong."""
    rest = (given.ids, given.advantages, given.old)
    kept: list[Tensor] = []

    def prepare() -> Tensor:
        kept.clear()  # the last gradient, before the next logits
        leaf = (given.whole if implementation.whole else given.logits).detach().requires_grad_()
        return leaf * 1 if implementation.inplace else leaf  # a leaf may not be written over

    def call(logits: Tensor) -> None:
        loss = implementation.call(logits, *rest)
        kept[:] = [loss.detach(), *torch.autograd.grad(loss, logits)]

    found = beside_a_copy(timer, given, call, prepare)
    loss, gradient = kept
    rows = given.sample()
    if not torch.isfinite(loss):
        raise ValueError(f"wrong: the loss is {loss.item()}")
    return {**found, **gate_fields(check_gradient(gradient[0, rows], truth[0], given.ids[0, rows]), implementation.name)}


def measured_forward(implementation: Implementation, given: Given, truth: tuple[Tensor, ...], timer: Timer) -> dict[str, Any]:
    kept: list[Any] = []

    def call(_: None) -> None:
        kept[:] = [implementation.call(given.logits, given.ids)]

    with torch.no_grad():
        found = beside_a_copy(timer, given, call, kept.clear)
    rows = given.sample()
    results = kept[0] if isinstance(kept[0], tuple) else (kept[0],)
    worst = max(check_values(result[0, rows], exact) for result, exact in zip(results, truth[1:], strict=False))
    return {**found, **gate_fields(worst, implementation.name)}


def measured_gradient(implementation: Implementation, given: Given, truth: tuple[Tensor, ...], timer: Timer) -> dict[str, Any]:
    alone, rows = implementation.call(given), given.sample()
    kept: list[Tensor] = []

    def call(_: None) -> None:
        kept[:] = [alone(None)]

    found = beside_a_copy(timer, given, call, kept.clear)
    return {**found, **gate_fields(check_gradient(kept[0][0, rows], truth[0], given.ids[0, rows]), implementation.name)}


def bench(shapes: list[tuple[int, int]], timer: Timer, device: str, deadline: float, results: Results) -> None:
    for rows, vocabulary in shapes:
        one_shape(rows, vocabulary, timer, device, deadline, results)


def cluster(shapes: list[tuple[int, int]], timer: Timer, device: str, deadline: float, results: Results) -> None:
    for rows, vocabulary in shapes:
        shape = make_shape(rows, vocabulary, timer, device, deadline, results)
        for implementation in cluster_implementations():
            add("loss", implementation, shape, timer, device, deadline, results)


def smoke(shapes: list[tuple[int, int]], timer: Timer, device: str, deadline: float, results: Results) -> None:
    """Whether the Triton kernels run at all and pass the gate."""
    for rows, vocabulary in shapes:
        shape = make_shape(rows, vocabulary, timer, device, deadline, results)
        add("loss", Implementation("ours", our_loss("triton" if by_kernels(device) else None), 1), shape, timer, device, deadline, results)
        add("logprobs+entropy", OUR_FORWARD, shape, timer, device, deadline, results)


def smoke_cluster(shapes: list[tuple[int, int]], timer: Timer, device: str, deadline: float, results: Results) -> None:
    for rows, vocabulary in shapes:
        shape = make_shape(rows, vocabulary, timer, device, deadline, results)
        add("loss", Implementation("ours_cluster", our_loss("cluster"), 1), shape, timer, device, deadline, results)


def with_bandwidth(found: dict[str, Any], step: str, given: Given) -> dict[str, Any]:
    """Add GB/s and multiples of a copy, of which a read is half."""
    reads, unit = (1, "times_read") if step.startswith("logprobs") else (2, "times_copy")
    size = given.logits.numel() * given.logits.element_size()
    return {**found, "gbps": reads * size / found["ms"] / 1e6, unit: found["ms"] / found["copy_ms"] * 2 / reads}


@dataclass
class Shape:
    """The data of one shape; `given` is None where it does not fit, for the reason in the entry."""

    entry: dict[str, Any]
    given: Given | None = None
    truth: tuple[Tensor, ...] = ()


def make_shape(rows: int, vocabulary: int, timer: Timer, device: str, deadline: float, results: Results) -> Shape:
    size = 2 * rows * vocabulary
    shape = Shape({"rows": rows, "vocabulary": vocabulary, "dtype": "bfloat16"})

    def make() -> dict[str, Any]:
        shape.given = case(rows, vocabulary, device)
        shape.truth = shape.given.truth()
        return {}

    done = run_case({**shape.entry, "step": "loss", "name": "data"}, make, 1.1 * size + 2**31, device, deadline)
    given = shape.given
    if given is None or "error" in done:
        results.add(done)
        shape.given = None
        return shape

    def copy() -> dict[str, Any]:
        target = torch.empty_like(given.logits)
        return timer(lambda _: target.copy_(given.logits))

    entry = {**shape.entry, "step": "loss", "name": "copy"}
    if not results.has(entry):
        results.add(run_case(entry, copy, size, device, deadline))
    return shape


def add(step: str, implementation: Implementation, shape: Shape, timer: Timer, device: str, deadline: float, results: Results) -> None:
    if (given := shape.given) is None:
        return
    measured = {"loss": measured_loss, "gradient": measured_gradient}.get(step, measured_forward)

    def work() -> dict[str, Any]:
        return with_bandwidth(measured(implementation, given, shape.truth, timer), step, given)

    if results.has({**shape.entry, "step": step, "name": implementation.name}):
        return
    entry = {**shape.entry, "step": step, "name": implementation.name, **({"work": implementation.work} if implementation.work else {})}
    needed = (implementation.times_logits + implementation.inplace + 1) * given.logits.numel() * given.logits.element_size()
    results.add(run_case(entry, work, needed, device, deadline))
    check_device(device)


def one_shape(rows: int, vocabulary: int, timer: Timer, device: str, deadline: float, results: Results) -> None:
    shape = make_shape(rows, vocabulary, timer, device, deadline, results)
    steps = {"loss": loss_implementations(device, rows), **forward_implementations(device)}
    if by_kernels(device):
        steps["gradient"] = [Implementation("ours", gradient_alone, 1)]
    for step, implementations in steps.items():
        for implementation in implementations:
            add(step, implementation, shape, timer, device, deadline, results)


# Of a copy's bandwidth, where there are a gigabyte of logits and more: below, a dozen launches may be no small part of the time.
LARGE = 10**9
TARGETS = (("logprobs", "ours", 0.93), ("logprobs+entropy", "ours", 0.90), ("gradient", "ours", 0.93), ("loss", "ours_cluster", 0.85))
OVER_LIGER = 1.34  # loss and gradient by clusters


def against_targets(whole: dict[str, Any]) -> str:
    """A line for each target: what was measured for each shape, or that nothing was."""
    entries = [
        e
        for part in ("bench", "cluster")
        for e in whole.get(part, [])
        if "ms" in e and 2 * e["rows"] * e["vocabulary"] >= LARGE and (part == "cluster" or not e["name"].startswith("ours_cluster"))
    ]
    lines = []

    def line(what: str, shares: dict[tuple[int, int], float], target: float) -> None:
        each = ", ".join(f"{share:.2f} ({rows} x {vocabulary})" for (rows, vocabulary), share in shares.items())
        lines.append(f"{what}, asked {target:.2f}: {each or 'not measured'}")

    def times(step: str, name: str, unit: str) -> dict[tuple[int, int], float]:
        return {(e["rows"], e["vocabulary"]): e[unit] for e in entries if (e["step"], e["name"]) == (step, name) and e.get(unit)}

    for step, name, target in TARGETS:
        found = times(step, name, "times_read" if step.startswith("logprobs") else "times_copy")
        line(f"{name}, {step}, of copy bandwidth", {shape: 1 / t for shape, t in found.items()}, target)
    ours, liger = times("loss", "ours_cluster", "times_copy"), times("loss", "liger", "times_copy")
    line("ours_cluster over liger, loss and gradient", {shape: liger[shape] / ours[shape] for shape in ours if shape in liger}, OVER_LIGER)
    return "\n".join(lines)


def against_predictions(entries: list[dict[str, Any]]) -> str:
    """Each measured time beside that of bench/model.py."""
    lines = [
        "{what}: measured {ms:.3f} ms, predicted {predicted_ms:.3f} ms, {times_predicted:.2f} of it".format(
            what=" ".join(str(e[key]) for key in ("step", "name", "rows", "vocabulary", "size", "trainable") if key in e), **e
        )
        for e in entries
        if "times_predicted" in e
    ]
    return "\n".join(lines) or "no measurement that bench/model.py predicts"


# ---- the fused head


def head(shapes: list[tuple[int, int, int]], timer: Timer, device: str, deadline: float, results: Results) -> None:
    """linear_grpo_loss against its three bare products; the weight's gradient comes out of its product in float32 in both. Then the kept
    sets."""
    for rows, width, vocabulary in shapes:
        entry: dict[str, Any] = {"rows": rows, "width": width, "vocabulary": vocabulary, "dtype": "bfloat16", "name": "ours_head"}
        if results.has(entry):
            continue

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

            roofline, found = timer.in_turn((products, lambda: None), (call, kept.clear))
            gate = gate_fields(head_truth(x, w, ids[0], kept[0][0], kept[1]), "ours")
            flops = 6 * rows * width * vocabulary / found["ms"] / 1e9
            return {
                **found,
                **gate,
                "tflops": flops,
                "roofline_ms": roofline["ms"],
                "share_of_roofline": roofline["ms"] / found["ms"],
            }

        needed = 2 * rows * vocabulary * 3 + 4 * 4 * vocabulary * width + 8 * 3 * vocabulary * width
        results.add(run_case(entry, work, needed, device, deadline))
        check_device(device)
    rows, width, vocabulary = shapes[-1]
    kept_sets(rows, width, vocabulary, torch.bfloat16, timer, device, deadline, results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=tuple(REHEARSAL))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shape", action="append", help="ROWSxVOCABULARY, or for head ROWSxWIDTHxVOCABULARY; may be repeated")
    parser.add_argument("--repetitions", type=int, default=30, help="at most; fewer where they would take more than 1.5 s")
    options = parser.parse_args()
    deadline = time.monotonic() + float(os.environ.get("BUDGET_S", "400"))
    timer = Timer(options.device, 5 if options.part.startswith("smoke") else options.repetitions)
    shapes: Any = [tuple(int(n) for n in text.split("x")) for text in options.shape or []]
    if not shapes:
        quoted: Any = {"head": HEADS, "smoke": SMOKE, "smoke_cluster": SMOKE}.get(
            options.part, [(n, v) for n in ROWS for v in VOCABULARIES]
        )
        shapes = list(quoted) if options.device == "cuda" else REHEARSAL[options.part]
    results = Results(options.output, options.part, options.device)
    try:
        parts: dict[str, Callable[..., None]] = {
            "bench": bench,
            "cluster": cluster,
            "head": head,
            "smoke": smoke,
            "smoke_cluster": smoke_cluster,
        }
        parts[options.part](shapes, timer, options.device, deadline, results)
    finally:
        if options.part in ("bench", "cluster"):
            print(against_targets(results.whole))
        print(against_predictions(results.whole[options.part]))
        for module, why in NOT_IMPORTED.items():
            print(f"not there to compare with: {module}: {why}")
    if options.part.startswith("smoke") and options.device == "cuda" and any("error" in e for e in results.whole[options.part]):
        raise SystemExit("the kernels fail on this machine; see the errors above")


if __name__ == "__main__":
    main()
