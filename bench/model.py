"""Predicted times of the kernels on H100 and H200, from bytes, instructions, special functions, registers and waves. No measurement.

    python bench/model.py            # the table in bench/README.md

Each number is a prediction, written before any of the kernels ran on a GPU, so that a measurement has something to be compared with.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

THREADS = 128  # of a Triton program: 4 warps
BLOCK_BYTES = 8192  # that a program has in flight: 4096 bfloat16 or 2048 float32 logits


@dataclass(frozen=True)
class Gpu:
    """What the model knows of a GPU.

    bandwidth: bytes per second of a copy: 0.9 of the datasheet's (4.8 TB/s for H200, 3.35 for H100 SXM); an assumption that cancels in
    shares of a copy. products: FLOP per second of large bfloat16 products; for H200 684e12, which Liger-Kernel's pull request 1356 states
    for cuBLAS at the three products of a head; H100 the same. clock: hertz under load, an assumption below the 1.98e9 of the datasheet.
    """

    name: str
    bandwidth: float
    products: float = 684e12
    clock: float = 1.755e9
    multiprocessors: int = 132
    # CUDA C++ Programming Guide, compute capability 9.0: lanes that issue, special functions per clock, 32-bit registers, threads.
    lanes: int = 128
    special: int = 16
    registers: int = 65536
    threads: int = 2048


GPUS = {"H200": Gpu("H200", 0.9 * 4.8e12), "H100": Gpu("H100", 0.9 * 3.35e12)}
LATENCY = 0.8e-6  # seconds of one iteration of a program that runs alone: a load from memory and its arithmetic; an assumption
LAUNCH = 3e-6  # seconds that one more kernel in a stream takes; an assumption
PROGRAMS_PER_MULTIPROCESSOR = 4  # as in token_logprobs.py: with fewer rows, rows are split


@dataclass(frozen=True)
class Kernel:
    """One kernel over whole rows. instructions and special: per logit; registers: per thread. For sm_90, by tools/compile_triton.py."""

    passes: int  # over the logits: 1 reads, 2 reads and writes
    instructions: float
    special: float
    registers: int


# (kernel, type of the logits) -> its compiled form, as in the table of kernels/README.md.
KERNELS = {
    ("sums", "bf16"): Kernel(1, 5.44, 1, 40),
    ("sums+entropy", "bf16"): Kernel(1, 7.47, 1, 56),
    ("gradient", "bf16"): Kernel(2, 6.03, 1, 48),
    ("sums+entropy", "fp32"): Kernel(1, 6.59, 1, 64),
    ("gradient+entropy", "fp32"): Kernel(2, 6.38, 1, 72),
    ("sums+entropy+softcap", "bf16"): Kernel(1, 23.19, 3, 55),
    ("gradient+entropy+softcap", "bf16"): Kernel(2, 27.94, 3, 48),
}
CLUSTER_INSTRUCTIONS = 12.2  # per logit, without an entropy gradient, by tools/sass.py
ITEM = {"bf16": 2, "fp32": 4}


@dataclass(frozen=True)
class Prediction:
    seconds: float
    floor: float  # the bytes that the work must move, or its products, at the GPU's rate

    @property
    def share(self) -> float:
        return self.floor / self.seconds


def parts_of(rows: int, vocabulary: int, block: int, gpu: Gpu) -> int:
    """Programs per row, as token_logprobs.parts_of chooses them."""
    wanted = math.ceil(PROGRAMS_PER_MULTIPROCESSOR * gpu.multiprocessors / max(rows, 1))
    blocks = math.ceil(vocabulary / block)
    return math.ceil(blocks / max(1, blocks // wanted))


def resident(kernel: Kernel, gpu: Gpu) -> int:
    """Programs that run at once: registers are given to warps in units of 8 per thread."""
    per_program = math.ceil(kernel.registers / 8) * 8 * THREADS
    return gpu.multiprocessors * min(gpu.registers // per_program, gpu.threads // THREADS, 32)


def over_rows(kernel: Kernel, dtype: str, rows: int, vocabulary: int, gpu: Gpu) -> float:
    """Seconds of a kernel over whole rows.

    A wave of n programs takes the longest of its bytes at the copy's bandwidth, its instructions, its special functions, and the time of
    one program that waits for every block of its own.
    """
    block = BLOCK_BYTES // ITEM[dtype] // (2 if kernel.special > 1 else 1)  # a soft cap has blocks of half the size
    if dtype == "fp32":
        block = 4096
    parts = parts_of(rows, vocabulary, block, gpu)
    programs, at_once = rows * parts, resident(kernel, gpu)
    logits = vocabulary / parts
    alone = math.ceil(logits / block) * LATENCY

    def wave(count: int) -> float:
        spread = min(1.0, count / gpu.multiprocessors)  # fewer programs than multiprocessors leave some idle
        issued = count * logits / (gpu.multiprocessors * gpu.clock * spread) if count else 0.0
        return max(
            count * logits * ITEM[dtype] * kernel.passes / gpu.bandwidth,
            issued * kernel.instructions / gpu.lanes,
            issued * kernel.special / gpu.special,
            alone if count else 0.0,
        )

    whole, rest = divmod(programs, at_once)
    return whole * wave(at_once) + wave(rest)


def log_probabilities(entropy: bool, dtype: str = "bf16", softcap: bool = False) -> Callable[[int, int, Gpu], Prediction]:
    kernel = KERNELS["sums" + "+entropy" * entropy + "+softcap" * softcap, dtype]

    def predict(rows: int, vocabulary: int, gpu: Gpu) -> Prediction:
        seconds = over_rows(kernel, dtype, rows, vocabulary, gpu) + 2 * LAUNCH
        return Prediction(seconds, rows * vocabulary * ITEM[dtype] / gpu.bandwidth)

    return predict


def gradient(rows: int, vocabulary: int, gpu: Gpu) -> Prediction:
    seconds = over_rows(KERNELS["gradient", "bf16"], "bf16", rows, vocabulary, gpu) + LAUNCH
    return Prediction(seconds, 2 * rows * vocabulary * 2 / gpu.bandwidth)


def loss(dtype: str = "bf16", softcap: bool = False) -> Callable[[int, int, Gpu], Prediction]:
    """Sums with the entropy, terms, total, gradient, and the scaling, which returns at once: five launches and three passes.

    The floor has two passes. Where no plain gradient is in the table, that with the entropy stands for it.
    """
    sums = KERNELS["sums+entropy" + "+softcap" * softcap, dtype]
    back = KERNELS[("gradient" if dtype == "bf16" and not softcap else "gradient+entropy") + "+softcap" * softcap, dtype]

    def predict(rows: int, vocabulary: int, gpu: Gpu) -> Prediction:
        seconds = sum(over_rows(kernel, dtype, rows, vocabulary, gpu) for kernel in (sums, back)) + 5 * LAUNCH
        return Prediction(seconds, 2 * rows * vocabulary * ITEM[dtype] / gpu.bandwidth)

    return predict


def cluster(rows: int, vocabulary: int, gpu: Gpu) -> Prediction:
    """A read and a write, rows round-robin over the clusters that are resident: the longest has one row more than the mean."""
    blocks = next((size for size in (1, 2, 4, 8) if 3 * math.ceil(vocabulary * 2 / size) <= 227 * 1024), 8)
    clusters = gpu.multiprocessors // blocks
    rounds = math.ceil(rows / clusters) * clusters / rows
    bytes_moved, logits = 4 * rows * vocabulary, rows * vocabulary
    issue = logits * CLUSTER_INSTRUCTIONS / (gpu.multiprocessors * gpu.lanes * gpu.clock)
    special = logits * 2 / (gpu.multiprocessors * gpu.special * gpu.clock)  # an exponential in each of two passes
    fill = LATENCY * 4  # the first row is loaded and the last one stored with nothing beside
    return Prediction(max(bytes_moved / gpu.bandwidth, issue, special) * rounds + fill + 3 * LAUNCH, bytes_moved / gpu.bandwidth)


CHUNK = 8192  # rows of a head's chunk where memory allows


def head(rows: int, width: int, vocabulary: int, gpu: Gpu) -> Prediction:
    """Three products, the loss of every chunk, and the float32 gradient of the weight, read and written for each chunk, then cast."""
    products = 6 * rows * width * vocabulary / gpu.products
    chunks = math.ceil(rows / CHUNK)
    of_loss = chunks * loss()(math.ceil(rows / chunks), vocabulary, gpu).seconds
    weight = width * vocabulary
    added = (8 * (chunks - 1) * weight + 6 * weight) / gpu.bandwidth
    return Prediction(products + of_loss + added, products)


def kept_head(tokens: int, ids: int, width: int, trainable: bool, gpu: Gpu) -> Prediction:
    """The head over kept sets: every id's row of the weight is read for the logits and again for the gradient of the hidden state; if the
    weight is trainable, every place adds to a float32 row. Nothing is taken to come from L2."""
    places = tokens * (ids + 1)
    forward = places * width * 2
    back = places * width * 2 + tokens * width * 4
    of_weight = places * width * 2 + places * width * 8 if trainable else 0
    seconds = (forward + back + of_weight) / gpu.bandwidth + (8 + 4 * trainable) * LAUNCH
    return Prediction(seconds, (forward + back + of_weight) / gpu.bandwidth)


ROWS = (256, 1024, 4096, 16384, 32768)
BY_STEP: dict[tuple[str, str], Callable[[int, int, Gpu], Prediction]] = {
    ("logprobs", "ours"): log_probabilities(False),
    ("logprobs+entropy", "ours"): log_probabilities(True),
    ("gradient", "ours"): gradient,
    ("loss", "ours"): loss(),
    ("loss", "ours_inplace"): loss(),
    ("loss", "ours_cluster"): cluster,
    ("loss", "ours_cluster_inplace"): cluster,
}


def gpu_named(device: str) -> Gpu | None:
    """The GPU of torch's device name, or None where the model does not know it."""
    return next((gpu for name, gpu in GPUS.items() if name in device), None)


def predicted(entry: dict[str, object], device: str) -> dict[str, float]:
    """``predicted_ms`` of an entry of bench/gpu_bench.py, and the measured time as a multiple of it; nothing where there is no model."""
    gpu = gpu_named(device)
    rows, vocabulary, width, ms = (entry.get(name) for name in ("rows", "vocabulary", "width", "ms"))
    if gpu is None or not isinstance(rows, int) or not isinstance(vocabulary, int):
        return {}
    size = entry.get("size")
    if entry.get("name") == "ours_head" and isinstance(width, int):
        found = head(rows, width, vocabulary, gpu)
    elif entry.get("name") == "kept" and isinstance(width, int) and str(size).isdigit():
        found = kept_head(rows, int(str(size)), width, bool(entry.get("trainable")), gpu)
    elif predict := BY_STEP.get((str(entry.get("step")), str(entry.get("name")))):
        found = predict(rows, vocabulary, gpu)
    else:
        return {}
    ms_predicted = found.seconds * 1e3
    return {"predicted_ms": ms_predicted} | ({"times_predicted": ms / ms_predicted} if isinstance(ms, float) else {})


def table() -> str:
    """The predictions as a Markdown table: milliseconds, and the share of the roofline."""
    vocabulary = 128256
    lines = ["| predicted, not measured | rows | H200 | H100 |", "|---|---|---|---|"]

    def line(what: str, rows: int, predict: Callable[[Gpu], Prediction]) -> None:
        each = (predict(gpu) for gpu in GPUS.values())
        lines.append(f"| {what} | {rows} | " + " | ".join(f"{p.seconds * 1e3:.3f} ms, {p.share:.2f}" for p in each) + " |")

    over_logits = {
        "log-probabilities": log_probabilities(False),
        "log-probabilities, entropy": log_probabilities(True),
        "gradient alone": gradient,
        "loss and gradient, Triton": loss(),
        "loss and gradient, cluster": cluster,
    }
    for what, predict in over_logits.items():
        for rows in ROWS:
            line(what, rows, lambda gpu, p=predict, n=rows: p(n, vocabulary, gpu))  # type: ignore[misc]
    others = {
        "log-probabilities, entropy, float32 logits": log_probabilities(True, "fp32"),
        "loss and gradient, Triton, float32 logits": loss("fp32"),
        "log-probabilities, entropy, soft cap": log_probabilities(True, softcap=True),
        "loss and gradient, Triton, soft cap": loss(softcap=True),
    }
    for what, predict in others.items():
        line(what, 4096, lambda gpu, p=predict: p(4096, vocabulary, gpu))  # type: ignore[misc]
    for width, columns in ((3584, 152064), (4096, 128256)):
        line(f"head, width {width}, vocabulary {columns}", 16384, lambda gpu, d=width, v=columns: head(16384, d, v, gpu))  # type: ignore[misc]
    for trainable in (False, True):
        for ids in (32, 512):
            what = f"head over kept sets of {ids}, width 4096, {'trainable' if trainable else 'frozen'}"
            line(what, 2048, lambda gpu, k=ids, t=trainable: kept_head(2048, k, 4096, t, gpu))  # type: ignore[misc]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
