"""Log-probability of each sampled token and entropy of its policy, and the gradient of the logits from two numbers per token.

Two kernels read whole rows, and every loss is built from them. One computes the sums of a row, or of a part of a row if there are few
rows. The other turns g = d loss / d logprob and h = d loss / d entropy into d loss / d logits.
"""

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import check_gradient, check_per_token, check_rows, check_statistics
from .rowwise import clear_row, kernel, merge_sums, per_token, row_gradient, row_sums, scored, statistics_of

__all__ = ["LogitRows", "Scoring", "token_gradient", "token_logprobs_bwd", "token_logprobs_fwd", "token_sums"]

# Columns per step and warps per program, chosen from the compiled code (kernels/README.md).
BLOCK, SOFTCAP_BLOCK, WARPS = 4096, 2048, 4
TOKENS_BLOCK = 128  # tokens per program of the kernels that read no rows
HOPPER_REGISTERS = 56  # for each thread of the sums with the entropy, of 72: nine programs per multiprocessor instead of seven, no spills
PROGRAMS_PER_MULTIPROCESSOR = 4  # with fewer rows than this many per multiprocessor, rows are split


@kernel
def _token_sums_kernel(
    logits_ptr, token_ids_ptr, computed_ptr, temperatures_ptr,
    sums_ptr,  # [3, rows, parts]: reference, sum e, sum e * t
    rows: tl.int64, length: tl.int32, vocabulary: tl.int32, parts: tl.int32, phase: tl.int32,
    logits_sequence_stride: tl.int64, logits_token_stride: tl.int64,
    ids_sequence_stride: tl.int64, ids_token_stride: tl.int64,
    computed_sequence_stride: tl.int64, computed_token_stride: tl.int64,
    temperatures_sequence_stride: tl.int64, temperatures_token_stride: tl.int64,
    k: tl.float32, cap_scale: tl.float32,
    BLOCK_V: tl.constexpr, WANT_ENTROPY: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row, part = program // parts, (program % parts).to(tl.int32)
    b, t = row // length, row % length
    if tl.load(computed_ptr + b * computed_sequence_stride + t * computed_token_stride) == 0:
        return
    target = tl.load(token_ids_ptr + b * ids_sequence_stride + t * ids_token_stride)
    if (target < 0) | (target >= vocabulary):  # read nothing; _token_logprobs_kernel or _grpo_loss_terms_kernel returns NaN
        return
    k, cap_scale = tl.cast(k, tl.float32), tl.cast(cap_scale, tl.float32)
    if temperatures_ptr is not None:
        k = tl.div_rn(k, tl.load(temperatures_ptr + b * temperatures_sequence_stride + t * temperatures_token_stride))

    offset = b * logits_sequence_stride + t * logits_token_stride
    reference, e_sum, et_sum = row_sums(
        logits_ptr + offset, phase + offset, vocabulary, target.to(tl.int32), part, parts, k, cap_scale,
        BLOCK_V, WANT_ENTROPY, HAS_SOFTCAP,
    )  # fmt: skip
    tl.store(sums_ptr + program, reference)
    tl.store(sums_ptr + rows * parts + program, e_sum)
    tl.store(sums_ptr + 2 * rows * parts + program, et_sum)


@triton.jit
def token_statistics(
    logits_ptr, token_ids_ptr, temperatures_ptr, sums_ptr,
    row, b, t, computed, rows, vocabulary, parts,
    logits_sequence_stride, logits_token_stride, ids_sequence_stride, ids_token_stride,
    temperatures_sequence_stride, temperatures_token_stride,
    k, cap_scale,
    HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """(logprob, entropy, lse) of a block of tokens from the sums over their rows; 0 where not computed, NaN for an id out of range."""
    target = per_token(token_ids_ptr, b, t, ids_sequence_stride, ids_token_stride, computed, 0)
    known = computed & (target >= 0) & (target < vocabulary)
    if temperatures_ptr is not None:
        k = tl.div_rn(k, per_token(temperatures_ptr, b, t, temperatures_sequence_stride, temperatures_token_stride, known, 1.0))
    z_target = tl.load(logits_ptr + b * logits_sequence_stride + t * logits_token_stride + target, mask=known, other=0.0)

    first = sums_ptr + row * parts
    reference = tl.load(first, mask=known, other=0.0)
    e_sum = tl.load(first + rows * parts, mask=known, other=1.0)
    et_sum = tl.load(first + 2 * rows * parts, mask=known, other=0.0)
    for part in tl.range(1, parts):
        reference, e_sum, et_sum = merge_sums(
            reference, e_sum, et_sum,
            tl.load(first + part, mask=known, other=0.0),
            tl.load(first + rows * parts + part, mask=known, other=1.0),
            tl.load(first + 2 * rows * parts + part, mask=known, other=0.0),
        )  # fmt: skip

    logprob, entropy, lse = statistics_of(reference, e_sum, et_sum, scored(z_target, cap_scale, HAS_SOFTCAP), k)
    otherwise = tl.where(computed, float("nan"), 0.0)
    return tl.where(known, logprob, otherwise), tl.where(known, entropy, otherwise), tl.where(known, lse, otherwise)


@kernel
def _token_logprobs_kernel(
    logits_ptr, token_ids_ptr, computed_ptr, temperatures_ptr, sums_ptr,
    logprobs_ptr, entropy_ptr, lse_ptr,
    rows: tl.int64, length: tl.int32, vocabulary: tl.int32, parts: tl.int32,
    logits_sequence_stride: tl.int64, logits_token_stride: tl.int64,
    ids_sequence_stride: tl.int64, ids_token_stride: tl.int64,
    computed_sequence_stride: tl.int64, computed_token_stride: tl.int64,
    temperatures_sequence_stride: tl.int64, temperatures_token_stride: tl.int64,
    k: tl.float32, cap_scale: tl.float32,
    BLOCK_N: tl.constexpr, WANT_ENTROPY: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = row < rows
    b, t = row // length, row % length
    computed = per_token(computed_ptr, b, t, computed_sequence_stride, computed_token_stride, inside, 0) != 0
    k, cap_scale = tl.cast(k, tl.float32), tl.cast(cap_scale, tl.float32)
    logprob, entropy, lse = token_statistics(
        logits_ptr, token_ids_ptr, temperatures_ptr, sums_ptr,
        row, b, t, computed, rows, vocabulary, parts,
        logits_sequence_stride, logits_token_stride, ids_sequence_stride, ids_token_stride,
    temperatures_sequence_stride, temperatures_token_stride,
        k, cap_scale,
        HAS_SOFTCAP,
    )  # fmt: skip
    tl.store(logprobs_ptr + row, logprob, mask=inside)
    tl.store(lse_ptr + row, lse, mask=inside)
    if WANT_ENTROPY:
        tl.store(entropy_ptr + row, entropy, mask=inside)


@kernel
def _token_gradient_kernel(
    logits_ptr, gradient_ptr, token_ids_ptr, mask_ptr, temperatures_ptr,
    g_ptr, h_ptr, logprobs_ptr, entropy_ptr, lse_ptr,
    positions: tl.int32, length: tl.int32, vocabulary: tl.int32, parts: tl.int32, phase: tl.int32,
    logits_sequence_stride: tl.int64, logits_token_stride: tl.int64,
    gradient_sequence_stride: tl.int64, gradient_token_stride: tl.int64,
    ids_sequence_stride: tl.int64, ids_token_stride: tl.int64,
    mask_sequence_stride: tl.int64, mask_token_stride: tl.int64,
    temperatures_sequence_stride: tl.int64, temperatures_token_stride: tl.int64,
    g_sequence_stride: tl.int64, g_token_stride: tl.int64,
    h_sequence_stride: tl.int64, h_token_stride: tl.int64,
    k: tl.float32, cap_scale: tl.float32, slope: tl.float32,
    BLOCK_V: tl.constexpr, HAS_ENTROPY: tl.constexpr, HAS_SOFTCAP: tl.constexpr, SAME_PHASE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    position, part = program // parts, (program % parts).to(tl.int32)
    b, t = position // positions, position % positions
    gradient_offset = b * gradient_sequence_stride + t * gradient_token_stride
    out_ptr, out_phase = gradient_ptr + gradient_offset, phase + gradient_offset

    predicts = t < length  # the last position of [B, T + 1, V] predicts no token
    unmasked = predicts & (tl.load(mask_ptr + b * mask_sequence_stride + t * mask_token_stride, mask=predicts, other=0) != 0)
    g = tl.load(g_ptr + b * g_sequence_stride + t * g_token_stride, mask=unmasked, other=0.0)
    h = tl.load(h_ptr + b * h_sequence_stride + t * h_token_stride, mask=unmasked, other=0.0)
    if (g == 0) & (h == 0):  # the logits are not read
        clear_row(out_ptr, out_phase, vocabulary, part, parts, BLOCK_V)
        return
    k, cap_scale, slope = tl.cast(k, tl.float32), tl.cast(cap_scale, tl.float32), tl.cast(slope, tl.float32)
    if temperatures_ptr is not None:
        temperature = tl.load(temperatures_ptr + b * temperatures_sequence_stride + t * temperatures_token_stride)
        k, slope = tl.div_rn(k, temperature), tl.div_rn(slope, temperature)
    target = tl.load(token_ids_ptr + b * ids_sequence_stride + t * ids_token_stride)
    target = tl.where((target >= 0) & (target < vocabulary), target, -1).to(tl.int32)  # out of range: lse is NaN
    row = b * length + t
    row_gradient(
        logits_ptr + b * logits_sequence_stride + t * logits_token_stride, out_ptr, out_phase, vocabulary, target, part, parts,
        tl.load(logprobs_ptr + row), tl.load(entropy_ptr + row), tl.load(lse_ptr + row), g, h, k, slope, cap_scale,
        BLOCK_V, HAS_ENTROPY, HAS_SOFTCAP, SAME_PHASE,
    )  # fmt: skip


# Launchers -----------------------------------------------------------------------------------------------------------------------


class Scoring(NamedTuple):
    """The settings that turn logits into a policy. softcap 0: no soft cap."""

    temperatures: Tensor | None  # [B, T]; None: `temperature` for all
    temperature: float
    softcap: float
    logit_scale: float

    @property
    def block(self) -> int:
        return SOFTCAP_BLOCK if self.softcap > 0 else BLOCK

    @property
    def slope(self) -> float:
        """ds/dz without the derivative of the soft cap. Per-token temperatures divide it in the kernel."""
        return self.logit_scale if self.temperatures is not None else self.logit_scale / self.temperature

    @property
    def numbers(self) -> tuple[float, float]:
        """k and cap_scale of rowwise.py. k is rounded once, here: its error is an error of the temperature."""
        if self.softcap == 0:
            return math.log2(math.e) * self.slope, 0.0
        cap_scale = self.logit_scale / self.softcap
        return math.log2(math.e) * self.slope / cap_scale, cap_scale


class LogitRows(NamedTuple):
    """Logits and the tokens that they predict."""

    logits: Tensor  # [B, T or T + 1, V], contiguous over V
    token_ids: Tensor  # int64 [B, T]
    mask: Tensor  # bool [B, T]: the tokens to compute

    @property
    def num_rows(self) -> int:
        return self.token_ids.numel()


def strides(x: Tensor | None) -> tuple[int, int]:
    """The first two strides of a [B, T, ...] tensor; 0 in a dimension that is broadcast ([B, 1], [1, 1] or 0-d)."""
    if x is None or x.dim() == 0:
        return 0, 0
    return 0 if x.shape[0] == 1 else x.stride(0), 0 if x.shape[1] == 1 else x.stride(1)


def phase_of(x: Tensor) -> int:
    """Number of elements between the last 16-byte boundary and the first element."""
    return x.data_ptr() % 16 // x.element_size()


@functools.cache
def multiprocessors(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    if device.type == "xpu":
        return torch.xpu.get_device_properties(device).gpu_subslice_count
    return 1


def register_limit(element_size: int, want_entropy: bool, softcap: bool, capability: tuple[int, int] | None) -> dict[str, int]:
    """Launch options of the sums. Only where the compiled code does not spill: 16-bit logits on compute capability 9."""
    limited = want_entropy and not softcap and element_size == 2 and capability is not None and capability[0] == 9
    return {"maxnreg": HOPPER_REGISTERS} if limited else {}


@functools.cache
def compute_capability(device: torch.device) -> tuple[int, int] | None:
    """Of an NVIDIA GPU; None for other devices."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" and torch.version.hip is None else None


def parts_of(rows: int, vocabulary: int, block: int, device: torch.device, parts: int | None) -> int:
    """Programs per row: more than one if there are too few rows to occupy the device."""
    if parts is not None:
        return parts
    wanted = triton.cdiv(PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(device), max(rows, 1))
    blocks = triton.cdiv(vocabulary, block)
    return triton.cdiv(blocks, max(1, blocks // wanted))  # equally many blocks in each but the last, which has at least one


def token_sums(
    rows: LogitRows, scoring: Scoring, *, want_entropy: bool = True, parts: int | None = None
) -> Tensor:  # float32 [3, B * T, parts]
    """Compute the sums over each unmasked row without its target; undefined for masked rows."""
    logits, token_ids, mask = rows
    check_rows(logits, token_ids, mask)
    check_per_token("temperatures", scoring.temperatures, logits, token_ids)
    vocabulary = logits.shape[2]
    parts = parts_of(rows.num_rows, vocabulary, scoring.block, logits.device, parts)
    sums = torch.empty((3, rows.num_rows, parts), dtype=torch.float32, device=logits.device)
    if rows.num_rows > 0:
        _token_sums_kernel[(rows.num_rows * parts,)](
            logits, token_ids, mask, scoring.temperatures, sums,
            rows.num_rows, token_ids.shape[1], vocabulary, parts, phase_of(logits),
            *strides(logits), *strides(token_ids), *strides(mask), *strides(scoring.temperatures), *scoring.numbers,
            BLOCK_V=scoring.block, WANT_ENTROPY=want_entropy, HAS_SOFTCAP=scoring.softcap > 0, num_warps=WARPS,
            **register_limit(logits.element_size(), want_entropy, scoring.softcap > 0, compute_capability(logits.device)),
        )  # fmt: skip
    return sums


def token_logprobs_fwd(
    rows: LogitRows, scoring: Scoring, *, want_entropy: bool = True, parts: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:  # float32 [B, T] each
    """Compute (logprobs, entropy, lse), 0 where masked. Without want_entropy the entropy is undefined."""
    logits, token_ids, mask = rows
    sums = token_sums(rows, scoring, want_entropy=want_entropy, parts=parts)
    logprobs, entropy, lse = (torch.empty(token_ids.shape, dtype=torch.float32, device=logits.device) for _ in range(3))
    if rows.num_rows > 0:
        _token_logprobs_kernel[(triton.cdiv(rows.num_rows, TOKENS_BLOCK),)](
            logits, token_ids, mask, scoring.temperatures, sums, logprobs, entropy, lse,
            rows.num_rows, token_ids.shape[1], logits.shape[2], sums.shape[2],
            *strides(logits), *strides(token_ids), *strides(mask), *strides(scoring.temperatures), *scoring.numbers,
            BLOCK_N=TOKENS_BLOCK, WANT_ENTROPY=want_entropy, HAS_SOFTCAP=scoring.softcap > 0,
        )  # fmt: skip
    return logprobs, entropy, lse


def token_gradient(
    rows: LogitRows, scoring: Scoring, g: Tensor, h: Tensor, logprobs: Tensor, entropy: Tensor, lse: Tensor, gradient: Tensor,
    *, want_entropy: bool = True, parts: int | None = None,
) -> None:  # fmt: skip
    """Write d loss / d logits. Rows that are masked or have g = h = 0 are set to zero without being read.

    Raises RuntimeError for tensors of other shapes, types, strides or devices, as all launchers here do.

    Args:
        g, h: d loss / d logprob and d loss / d entropy, float32 ``[B, T]``, strided or broadcast.
        logprobs, entropy, lse: float32 ``[B, T]`` from token_logprobs_fwd, contiguous.
        gradient: the output, like the logits; may be the logits themselves.
        want_entropy: False if h is 0 everywhere.
    """
    logits, token_ids, mask = rows
    check_rows(logits, token_ids, mask)
    for name, x in (("temperatures", scoring.temperatures), ("grad_logprobs", g), ("grad_entropy", h)):
        check_per_token(name, x, logits, token_ids)
    check_statistics(logits, token_ids, logprobs=logprobs, entropy=entropy, lse=lse)
    check_gradient(gradient, logits)
    if logits.numel() == 0:
        return
    positions, vocabulary = logits.shape[1:]
    count = logits.shape[0] * positions
    parts = parts_of(count, vocabulary, scoring.block, logits.device, parts)
    _token_gradient_kernel[(count * parts,)](
        logits, gradient, token_ids, mask, scoring.temperatures, g, h, logprobs, entropy, lse,
        positions, token_ids.shape[1], vocabulary, parts, phase_of(gradient),
        *strides(logits), *strides(gradient), *strides(token_ids), *strides(mask), *strides(scoring.temperatures), *strides(g), *strides(h),
        *scoring.numbers, scoring.slope,
        BLOCK_V=scoring.block, HAS_ENTROPY=want_entropy, HAS_SOFTCAP=scoring.softcap > 0, SAME_PHASE=same_phase(logits, gradient),
        num_warps=WARPS,
    )  # fmt: skip


def same_phase(logits: Tensor, gradient: Tensor) -> bool:
    """Whether each row of the logits has the same offset from a 16-byte boundary as that of the gradient."""
    vector = 16 // logits.element_size()
    pairs = zip(logits.shape[:2], logits.stride(), gradient.stride(), strict=False)
    return phase_of(logits) == phase_of(gradient) and all((a - b) % vector == 0 for size, a, b in pairs if size > 1)


def token_logprobs_bwd(
    grad_logprobs: Tensor, grad_entropy: Tensor, rows: LogitRows, scoring: Scoring, logprobs: Tensor, entropy: Tensor, lse: Tensor,
    *, inplace: bool = False, parts: int | None = None,
) -> Tensor:  # fmt: skip
    """Compute the gradient of the logits, like the logits: in new contiguous memory, or over the logits with ``inplace``."""
    gradient = rows.logits if inplace else torch.empty(rows.logits.shape, dtype=rows.logits.dtype, device=rows.logits.device)
    token_gradient(rows, scoring, grad_logprobs, grad_entropy, logprobs, entropy, lse, gradient, parts=parts)
    return gradient
