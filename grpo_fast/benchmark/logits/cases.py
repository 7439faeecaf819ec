"""What the suite measures: settings, cases, and the batch of a case with its truth in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_fast.benchmark.eager import eager_logprobs, eager_loss
from grpo_fast.benchmark.harness.suite import DTYPES, BenchmarkSettings, require, setting
from grpo_fast.benchmark.harness.worker import ALIGNMENT, SharedMemory

__all__ = ["GATE_ROWS", "IMPLEMENTATIONS", "MALLOC_MODES", "PASSES", "Batch", "LogitsCase", "LogitsSettings", "parse_shape"]
__all__ += ["batch_bytes", "expected_loss", "fill", "shared_batch", "write_truth"]

PASSES = ("forward", "forward_backward")
IMPLEMENTATIONS = ("roofline", "ours", "ours_inplace", "eager", "compile", "trl")

# glibc gives every large tensor fresh pages, and takes them back when it is freed: the faults cost eager code more than its arithmetic. In
# the second mode freed memory stays in the process, as with a caching allocator, and was touched before anything is timed.
MALLOC_MODES = ("default", "touched")

GATE_ROWS = 16  # rows whose gradient is compared: a float64 gradient of all of them would take gigabytes
_STD = 2.5  # of the logits: an entropy of a few nats under the log of the vocabulary, as a language model's
_CHUNK = 1 << 22  # elements made at once


def parse_shape(text: str) -> tuple[int, int]:
    """``"2048x32000"`` as (rows, vocabulary).

    Raises:
        ValueError: not of that form.
    """
    rows, _, vocabulary = text.strip().partition("x")
    require(rows.isdecimal() and vocabulary.isdecimal(), "shape", text, "ROWSxVOCABULARY, as 2048x32000")
    return int(rows), int(vocabulary)


@dataclass(frozen=True, kw_only=True)
class LogitsSettings(BenchmarkSettings):
    """Settings of ``grpo-fast bench``."""

    shapes: tuple[tuple[int, int], ...] = setting(
        ((2048, 32000), (512, 152064)),
        "ROWSxVOCABULARY; may be repeated. Default: 2048x32000 and 512x152064.",
        option="shape",
        parse=parse_shape,
    )
    dtypes: tuple[str, ...] = setting(
        ("float32", "bfloat16"), f"{', '.join(DTYPES)}; may be repeated.", option="dtype", choices=tuple(DTYPES)
    )
    implementations: tuple[str, ...] = setting(
        IMPLEMENTATIONS, f"{', '.join(IMPLEMENTATIONS)}; may be repeated.", option="implementation", choices=IMPLEMENTATIONS
    )
    malloc: tuple[str, ...] = setting(MALLOC_MODES, f"{', '.join(MALLOC_MODES)}; may be repeated.", choices=MALLOC_MODES)
    temperature: float = setting(0.9, "Above 0.")
    rounds: int = setting(5, "Repetitions of everything, interleaved.", least=1)
    active_fraction: float = setting(1.0, "Share of unmasked rows; below 1 grpo_fast skips work that the others do.")
    entropy: bool = setting(False, "The others compute the entropy too, as grpo_fast always does.")
    device: str = setting("cpu", "Only cpu so far.")
    seed: int = setting(0, "Of the data.")
    isolated: bool = setting(True)  # a process for each implementation
    cold: bool = setting(True)  # caches are flushed before each repetition

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.device == "cpu", "device", self.device, "'cpu', the only one measured so far")
        for rows, vocabulary in self.shapes:
            require(rows >= 1 and vocabulary >= 2, "shape", f"{rows}x{vocabulary}", "at least one row and a vocabulary of 2")
        has_unit = "roofline" in self.implementations
        require(has_unit, "implementation", ", ".join(self.implementations), "'roofline' among them, the unit of the others")
        require(0 < self.temperature < math.inf, "temperature", self.temperature, "a finite number > 0")
        require(0 < self.active_fraction <= 1, "active_fraction", self.active_fraction, "a share > 0 and <= 1; 1 = no row is masked")

    @property
    def cases(self) -> list[LogitsCase]:
        return [LogitsCase(rows, vocabulary, dtype) for rows, vocabulary in self.shapes for dtype in self.dtypes]

    @property
    def processes(self) -> list[tuple[str, ...]]:
        """Which implementations share a process: none, unless isolation was given up for a quick start."""
        return [(name,) for name in self.implementations] if self.isolated else [self.implementations]


@dataclass(frozen=True)
class LogitsCase:
    """Logits of one size and type."""

    rows: int
    vocabulary: int
    dtype: str  # a name of DTYPES

    @property
    def name(self) -> str:
        return f"{self.rows}x{self.vocabulary} {self.dtype}"

    @property
    def batch(self) -> tuple[int, int]:
        """[B, T] of the rows: eight sequences where that divides."""
        return (8, self.rows // 8) if self.rows % 8 == 0 else (1, self.rows)

    @property
    def logits_bytes(self) -> int:
        return self.rows * self.vocabulary * DTYPES[self.dtype].itemsize

    def useful_bytes(self, step: str) -> int:
        """What has to be moved: forward reads the logits, forward + backward reads them and writes a gradient. The numbers per row (ids,
        advantages, log-probabilities: about 30 bytes) are not counted."""
        return self.logits_bytes * {"forward": 1, "forward_backward": 2}[step]


@dataclass(frozen=True)
class Batch:
    """What an implementation is given, and the float64 truth that it is held to."""

    logits: Tensor  # [B, T, V]
    token_ids: Tensor  # int64 [B, T]
    mask: Tensor  # bool [B, T]
    advantages: Tensor  # float32 [B, T]
    old_logprobs: Tensor  # float32 [B, T]
    true_logprobs: Tensor  # float64 [B, T]; of the first data of a case
    true_entropy: Tensor  # float64 [GATE_ROWS]
    true_gradient: Tensor  # float64 [GATE_ROWS, V]
    gate_rows: Tensor  # int64 [GATE_ROWS], positions in the flattened batch


def shared_batch(memory: SharedMemory, case: LogitsCase) -> Batch:
    """The batch of a case at the start of the shared memory: the same in every process."""
    memory.rewind()
    tokens, rows = case.batch, min(GATE_ROWS, case.rows)
    return Batch(
        logits=memory.allocate((*tokens, case.vocabulary), DTYPES[case.dtype]),
        token_ids=memory.allocate(tokens, torch.int64),
        mask=memory.allocate(tokens, torch.bool),
        advantages=memory.allocate(tokens, torch.float32),
        old_logprobs=memory.allocate(tokens, torch.float32),
        true_logprobs=memory.allocate(tokens, torch.float64),
        true_entropy=memory.allocate([rows], torch.float64),
        true_gradient=memory.allocate([rows, case.vocabulary], torch.float64),
        gate_rows=memory.allocate([rows], torch.int64),
    )


def batch_bytes(case: LogitsCase) -> int:
    """What shared_batch allocates at most: 25 bytes per row beside the logits, the truth, and less than a page of padding per tensor."""
    return case.logits_bytes + 25 * case.rows + GATE_ROWS * 8 * (case.vocabulary + 2) + 9 * ALIGNMENT


def fill(batch: Batch, *, temperature: float, active_fraction: float, seed: int) -> None:
    """Draw the batch anew.

    A third of the tokens is likely under the policy. Half of the importance ratios lie inside the clip band, half well outside it on either
    side: rounding a log-probability to bfloat16 (up to 0.1 here) changes a ratio, but not on which side of the band it is.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, vocabulary = batch.token_ids.numel(), batch.logits.shape[-1]

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(rows, generator=generator) * (high - low) + low

    def sign() -> Tensor:
        return torch.where(uniform(0, 1) < 0.5, 1.0, -1.0)

    token_ids = torch.randint(vocabulary, (rows,), generator=generator)
    typical_lse = math.log(vocabulary) + (_STD / temperature) ** 2 / 2
    likely = torch.where(torch.arange(rows) % 3 == 0, temperature * (typical_lse + uniform(-1, 4)), torch.nan)
    logits, logprobs = batch.logits.view(rows, vocabulary), torch.empty(rows)
    for part in torch.arange(rows).split(max(1, _CHUNK // vocabulary)):
        chunk = torch.randn(len(part), vocabulary, generator=generator).mul_(_STD)
        ids = token_ids[part].unsqueeze(-1)
        at_target = torch.where(likely[part].isnan(), chunk.gather(-1, ids).squeeze(-1), likely[part])
        logits[part] = chunk.scatter_(-1, ids, at_target.unsqueeze(-1)).to(logits.dtype)
        logprobs[part] = eager_logprobs(logits[part].float(), token_ids[part], temperature)[0]

    inside, outside = uniform(-0.08, 0.08), uniform(0.35, 0.6) * sign()
    log_ratio = torch.where(uniform(0, 1) < 0.5, inside, outside)
    mask = torch.zeros(rows, dtype=torch.bool)
    mask[torch.randperm(rows, generator=generator)[: max(1, round(rows * active_fraction))]] = True
    batch.token_ids.copy_(token_ids.view_as(batch.token_ids))
    batch.mask.copy_(mask.view_as(batch.mask))
    batch.advantages.copy_((uniform(0.5, 1.5) * sign()).view_as(batch.advantages))
    batch.old_logprobs.copy_((logprobs - log_ratio).view_as(batch.old_logprobs))
    # The true logprobs until write_truth replaces them by exact ones: good to 1e-5, enough for the loss of a repetition.
    batch.true_logprobs.copy_(logprobs.view_as(batch.true_logprobs))


def write_truth(batch: Batch, temperature: float) -> None:
    """Log-probabilities of every row; entropy and gradient of the gate's rows, in float64."""
    rows, vocabulary = batch.token_ids.numel(), batch.logits.shape[-1]
    logits, token_ids = batch.logits.view(rows, vocabulary), batch.token_ids.view(rows)
    for part in torch.arange(rows).split(max(1, _CHUNK // 4 // vocabulary)):
        batch.true_logprobs.view(rows)[part] = eager_logprobs(logits[part].double(), token_ids[part], temperature)[0]

    batch.gate_rows.copy_(torch.linspace(0, rows - 1, batch.gate_rows.numel()).round().long())
    old_logprobs, advantages, mask = batch.old_logprobs.view(rows), batch.advantages.view(rows), batch.mask.view(rows)
    for i, row in enumerate(batch.gate_rows.split(1)):
        leaf = logits[row].double().requires_grad_()
        logprob, entropy = eager_logprobs(leaf, token_ids[row], temperature, entropy=True)
        assert entropy is not None
        loss = eager_loss(logprob, old_logprobs[row].double(), advantages[row].double(), mask[row], tokens=mask.sum())
        batch.true_gradient[i] = torch.autograd.grad(loss, leaf)[0].squeeze(0)
        batch.true_entropy[i] = entropy.item()


def expected_loss(batch: Batch) -> float:
    """The loss of the whole batch in float64, from the batch's true log-probabilities."""
    return float(eager_loss(batch.true_logprobs, batch.old_logprobs.double(), batch.advantages.double(), batch.mask))
