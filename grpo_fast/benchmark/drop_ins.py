"""``grpo-fast bench-drop-ins``: what the guides of Liger, verl and a loop of one's own replace, against what replaces it.

Timed is loss and gradient of hidden states and weight, from hidden states that are there. Repetitions are interleaved, on the same data. No
time is reported unless loss and gradients agree. Where half of the groups are degenerate, their rewards are all equal and their advantages
0: ours leaves them out, the others do the same work as ever and are timed once.
"""

from __future__ import annotations

import gc
import importlib.util
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

import grpo_fast as gf
from grpo_fast.benchmark.contestants import UnavailableError, readable_loss
from grpo_fast.benchmark.data import CONFIG
from grpo_fast.benchmark.measure import timed
from grpo_fast.ops.backends import installed_version
from grpo_fast.ops.environment import caption, describe, load_average
from grpo_fast.utils.files import check_output, write_json

__all__ = ["PAIRS", "Settings", "app", "markdown", "run"]

TEMPERATURE = 0.9
TOLERANCE = 1e-4  # relative, of the loss and of the largest entry of a gradient
_NOISE = 0.2  # nats between the old log-probabilities and the policy's: ratios on both sides of the clip band
_ROWS = 64  # of the weight's gradient, that are compared


@dataclass(frozen=True)
class Settings:
    """What is measured: half of the sequences have an advantage of 0 where the other half is all that is active."""

    sequences: int = 8
    tokens: int = 128  # of each
    width: int = 896
    vocabulary: int = 151_936  # with this width: Qwen2.5-0.5B's head
    rounds: int = 3
    threads: int = 1
    seed: int = 0


Batch = dict[str, Tensor]
Step = Callable[[Batch, Tensor, Tensor], Tensor]  # of a batch, hidden states and weight: the loss


def make_batch(settings: Settings) -> tuple[Batch, Tensor, Tensor]:
    """The batch, hidden states [B, T, D] and weight [V, D]; logits with a standard deviation of about 1.5."""
    generator = torch.Generator().manual_seed(settings.seed)
    hidden = torch.randn(settings.sequences, settings.tokens, settings.width, generator=generator)
    weight = torch.randn(settings.vocabulary, settings.width, generator=generator) * (1.5 / settings.width**0.5)
    ids = torch.randint(settings.vocabulary, hidden.shape[:2], generator=generator)
    with torch.no_grad():
        logprobs = gf.linear_token_logprobs(hidden, weight, ids, temperature=TEMPERATURE).logprobs
    return (
        {
            "token_ids": ids,
            "mask": torch.ones_like(ids),
            "advantages": torch.randn(settings.sequences, generator=generator),
            "old_logprobs": logprobs + _NOISE * torch.randn(ids.shape, generator=generator),
        },
        hidden,
        weight,
    )


def _clipped(logprobs: Tensor, batch: Batch) -> Tensor:
    return readable_loss(logprobs, batch["old_logprobs"], batch["advantages"].unsqueeze(1), batch["mask"])


def _plain() -> tuple[Step, Step]:
    def eager(batch: Batch, hidden: Tensor, weight: Tensor) -> Tensor:
        logits = (hidden @ weight.T).float() / TEMPERATURE
        return _clipped(logits.log_softmax(-1).gather(-1, batch["token_ids"].unsqueeze(-1)).squeeze(-1), batch)

    def ours(batch: Batch, hidden: Tensor, weight: Tensor) -> Tensor:
        given: dict[str, Any] = {**batch}
        return gf.linear_grpo_loss(hidden, weight, **given, config=CONFIG, temperature=TEMPERATURE).loss

    return eager, ours


def _liger() -> tuple[Step, Step]:
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss as Theirs
    except ImportError as error:
        raise UnavailableError(f"liger-kernel cannot be imported ({error}). Cure: pip install liger-kernel") from error
    from grpo_fast.integrations.liger import LigerFusedLinearGRPOLoss as Ours

    def step_of(module: Any) -> Step:
        epsilons = {"epsilon_low": CONFIG.epsilon_low, "epsilon_high": CONFIG.epsilon_high}
        loss_of = module(beta=0.0, use_ref_model=False, temperature=TEMPERATURE, **epsilons)

        def step(batch: Batch, hidden: Tensor, weight: Tensor) -> Tensor:
            tokens, mask = batch["token_ids"], batch["mask"]
            loss: Tensor = loss_of(hidden, weight, tokens, mask, batch["advantages"], old_per_token_logps=batch["old_logprobs"])[0]
            return loss

        return step

    return step_of(Theirs), step_of(Ours)


def _verl() -> tuple[Step, Step]:
    """Its fused head in PyTorch, which is what its configuration takes unless told otherwise; the entropy is computed and not used."""
    path = Path(sys.prefix, "peers", "verl", "utils", "experimental", "torch_functional.py")  # the package needs Ray, this file does not
    spec = importlib.util.spec_from_file_location("verl_torch_functional", path)
    if spec is None or spec.loader is None or not path.exists():
        raise UnavailableError(f"there is no {path}. Cure: pip install --no-deps --target {sys.prefix}/peers verl==0.9.1")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    from grpo_fast.integrations.verl import linear_cross_entropy

    def step_of(function: Callable[..., tuple[Tensor, Tensor]]) -> Step:
        def step(batch: Batch, hidden: Tensor, weight: Tensor) -> Tensor:
            logprobs, _ = function(hidden, weight, batch["token_ids"], TEMPERATURE)
            return _clipped(logprobs.view_as(batch["token_ids"]), batch)

        return step

    return step_of(module.FusedLinearForPPO()), step_of(linear_cross_entropy)


PAIRS: dict[str, tuple[str, Callable[[], tuple[Step, Step]], tuple[float, ...]]] = {  # label, steps, shares of ours that are active
    "plain": ("PyTorch, logits in float32", _plain, (1.0, 0.5)),
    "liger": ("Liger's `LigerFusedLinearGRPOLoss`", _liger, (1.0, 0.5)),
    "verl": ("verl's fused head in PyTorch", _verl, (1.0,)),
}


def measured(step: Step, batch: Batch, hidden: Tensor, weight: Tensor, active: float, threads: int) -> dict[str, Any]:
    """One loss and its gradients: seconds (CPU time of the thread; wall time with several), peak_bytes above what was resident before."""
    alive = torch.arange(len(hidden)) < round(active * len(hidden))
    batch = {**batch, "advantages": batch["advantages"] * alive}
    leaves = [hidden.detach().requires_grad_(), weight.detach().requires_grad_()]

    def stage() -> Tensor:
        loss = step(batch, *leaves)
        loss.backward()
        return loss

    gc.collect()
    loss, seconds, peak = timed(stage, threads)
    d_hidden, d_weight = (leaf.grad for leaf in leaves)
    assert d_hidden is not None and d_weight is not None
    rows = torch.cat([batch["token_ids"].flatten()[: _ROWS // 2], torch.arange(_ROWS // 2)])
    return {"seconds": seconds, "peak_bytes": peak, "found": (loss.detach().view(1), d_hidden, d_weight[rows])}


def disagreement(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """The largest difference, relative to the largest entry of each; infinite where it is no number."""
    differences = [((x - y).abs().max() / y.abs().max().clamp(min=1e-12)).item() for x, y in zip(found, expected, strict=True)]
    return max(difference if difference < float("inf") else float("inf") for difference in differences)


def run(settings: Settings, report: Callable[[str], None]) -> dict[str, Any]:
    """Measure everything; the answer is what is written to the JSON file.

    Raises:
        RuntimeError: losses or gradients of a pair differ.
    """
    load = load_average()
    batch, hidden, weight = make_batch(settings)
    left_out, results, gate = {}, [], {}

    def measure(step: Step, active: float) -> dict[str, Any]:
        return measured(step, batch, hidden, weight, active, settings.threads)

    for pair, (label, make, shares) in PAIRS.items():
        try:
            steps = make()
        except UnavailableError as error:
            left_out[pair] = str(error)
            continue
        report(f"{label}: warm-up")
        gate[pair] = _gate(pair, steps, shares, measure)
        sides = [("theirs", steps[0], 1.0), *(("ours", steps[1], share) for share in shares)]
        rounds = []
        for number in range(settings.rounds):
            report(f"{label}: round {number + 1} of {settings.rounds}")
            rounds.append([measure(step, active) for _, step, active in sides])
        for (side, _, active), answers in zip(sides, zip(*rounds, strict=True), strict=True):
            seconds, peaks = [answer["seconds"] for answer in answers], [answer["peak_bytes"] for answer in answers]
            middle, peak = statistics.median(seconds), None if None in peaks else max(peaks)
            entry = {"pair": pair, "side": side, "active": active, "seconds": seconds, "median": middle, "peak_bytes": peak}
            results.append(entry)
    return {
        "kind": "drop_ins",
        "machine": {**describe(), "liger_kernel": installed_version("liger_kernel"), "load_average": [load, load_average()]},
        "settings": {**asdict(settings), "dtype": "float32", "clock": "thread CPU time" if settings.threads == 1 else "wall time"},
        "gate": {"tolerance": TOLERANCE, "largest_relative_difference": gate},
        "left_out": left_out,
        "results": results,
    }


def _gate(pair: str, steps: tuple[Step, Step], shares: tuple[float, ...], measure: Callable[[Step, float], dict[str, Any]]) -> float:
    """The largest disagreement of a pair, each side of which runs once on the same work."""
    worst = 0.0
    for active in shares:
        expected, found = (measure(step, active)["found"] for step in steps)
        worst = max(worst, disagreement(found, expected))
    if not worst <= TOLERANCE:
        raise RuntimeError(f"{pair}: loss or gradients differ by {worst:.2g} relative; expected {TOLERANCE:g} at most. No times are given.")
    return worst


def markdown(result: dict[str, Any], pair: str, ours: str) -> list[str]:
    """The rows of a guide's table: theirs, then ours under the name it has there."""
    rows, entries = [], [entry for entry in result["results"] if entry["pair"] == pair]
    base = next(entry["median"] for entry in entries if entry["side"] == "theirs")
    for entry in entries:
        name = PAIRS[pair][0] if entry["side"] == "theirs" else ours if entry["active"] == 1 else f"{ours}, half of the groups degenerate"
        faster = "" if entry["side"] == "theirs" else f" ({base / entry['median']:.2f}x)"
        memory = "" if entry["peak_bytes"] is None else f"{entry['peak_bytes'] / 2**20:,.0f} MiB"
        rows.append(f"| {name} | {entry['median']:.1f} s{faster} | {memory} |")
    return rows


app = typer.Typer(add_completion=False)
_DEFAULTS = Settings()


@app.command()
def bench_drop_ins(
    sequences: Annotated[int, typer.Option(help="Of the batch.", min=2)] = _DEFAULTS.sequences,
    tokens: Annotated[int, typer.Option(help="Of each completion.", min=1)] = _DEFAULTS.tokens,
    width: Annotated[int, typer.Option(help="Of the hidden states.", min=1)] = _DEFAULTS.width,
    vocabulary: Annotated[int, typer.Option(help="Rows of the head's weight.", min=_ROWS)] = _DEFAULTS.vocabulary,
    rounds: Annotated[int, typer.Option(help="Repetitions after a warm-up.", min=1)] = _DEFAULTS.rounds,
    threads: Annotated[int, typer.Option(help="One thread is timed by its CPU time, several by the clock.", min=1)] = _DEFAULTS.threads,
    output: Annotated[Path, typer.Option(help="The result as JSON.")] = Path("runs/bench/drop_ins_cpu.json"),
) -> None:
    """Time what the guides replace against what replaces it. Ten minutes, 8 GiB."""
    try:
        check_output(output)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    torch.set_num_threads(threads)
    result = run(Settings(sequences, tokens, width, vocabulary, rounds, threads), lambda line: typer.echo(line, err=True))
    write_json(output, result)
    for pair in PAIRS:
        typer.echo(result["left_out"][pair] if pair in result["left_out"] else "\n".join(markdown(result, pair, "grpo_fast")))
    typer.echo(f"{caption(result['machine'], threads)}\nEvery number: {output}")


if __name__ == "__main__":
    app()
