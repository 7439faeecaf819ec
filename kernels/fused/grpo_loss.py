"""The loss with token-level ratios, its metrics, and its gradient.

The kernels of token_logprobs.py read the rows: once for the sums, and a second time if a gradient is wanted. Between them a kernel over
tokens completes the statistics and computes the loss terms, g and h. A last kernel adds the totals of its programs in a fixed order, so
that the result is the same bits from run to run.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import check_per_token, check_rows
from .loss_settings import LossSettings, as_float32
from .policy_loss import policy_terms
from .rowwise import kernel, per_token
from .token_logprobs import TOKENS_BLOCK, LogitRows, Scoring, strides, token_gradient, token_statistics, token_sums

__all__ = ["PolicyTensors", "grpo_loss_fwd"]

# The totals of each program over its tokens.
KL = tl.constexpr(0)
ENTROPY = tl.constexpr(1)
RATIO = tl.constexpr(2)
CLIP_LOW = tl.constexpr(3)
CLIP_HIGH = tl.constexpr(4)
RATIO_MAX = tl.constexpr(5)
ACTIVE = tl.constexpr(6)
UNMASKED = tl.constexpr(7)
COMPUTED = tl.constexpr(8)
LOSS = tl.constexpr(9)
TOTALS = 10

METRICS = 8  # kl, entropy, ratio_mean, ratio_max, clip_low, clip_high, clip_region, active_fraction
TOTAL_BLOCK = 256


@kernel
def _grpo_loss_terms_kernel(
    logits_ptr, token_ids_ptr, mask_ptr, temperatures_ptr, sums_ptr,
    advantages_ptr, weights_ptr, entropy_weights_ptr, old_logprobs_ptr, ref_logprobs_ptr, rollout_weights_ptr,
    logprobs_ptr, entropy_ptr, lse_ptr, g_ptr, h_ptr,
    totals_ptr,  # [TOTALS, programs]
    rows: tl.int64, length: tl.int32, vocabulary: tl.int32, parts: tl.int32,
    logits_sequence_stride: tl.int64, logits_token_stride: tl.int64,
    ids_sequence_stride: tl.int64, ids_token_stride: tl.int64,
    mask_sequence_stride: tl.int64, mask_token_stride: tl.int64,
    temperatures_sequence_stride: tl.int64, temperatures_token_stride: tl.int64,
    advantages_sequence_stride: tl.int64, advantages_token_stride: tl.int64,
    weights_sequence_stride: tl.int64, weights_token_stride: tl.int64,
    entropy_weights_sequence_stride: tl.int64, entropy_weights_token_stride: tl.int64,
    old_sequence_stride: tl.int64, old_token_stride: tl.int64,
    ref_sequence_stride: tl.int64, ref_token_stride: tl.int64,
    rollout_sequence_stride: tl.int64, rollout_token_stride: tl.int64,
    k: tl.float32, cap_scale: tl.float32, loss_scale: tl.float32,
    settings,  # LossSettings
    all_active: tl.int32, only_active: tl.int32,
    BLOCK_N: tl.constexpr, SURROGATE: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = row < rows
    b, t = row // length, row % length
    k, cap_scale = tl.cast(k, tl.float32), tl.cast(cap_scale, tl.float32)
    loss_scale = tl.cast(loss_scale, tl.float32)

    unmasked = per_token(mask_ptr, b, t, mask_sequence_stride, mask_token_stride, inside, 0) != 0
    advantage = per_token(advantages_ptr, b, t, advantages_sequence_stride, advantages_token_stride, unmasked, 0.0)
    active = tl.where(all_active != 0, unmasked, unmasked & (advantage != 0))
    computed = tl.where(only_active != 0, active, unmasked)
    logprob, entropy, lse = token_statistics(
        logits_ptr, token_ids_ptr, temperatures_ptr, sums_ptr,
        row, b, t, computed, rows, vocabulary, parts,
        logits_sequence_stride, logits_token_stride, ids_sequence_stride, ids_token_stride,
    temperatures_sequence_stride, temperatures_token_stride,
        k, cap_scale,
        HAS_SOFTCAP,
    )  # fmt: skip

    # Loaded only where computed: masked values may be NaN.
    weight = per_token(weights_ptr, b, t, weights_sequence_stride, weights_token_stride, computed, 0.0) * loss_scale
    entropy_weight, old_logprob, ref_logprob = tl.zeros_like(weight), tl.zeros_like(weight), tl.zeros_like(weight)
    rollout_weight = tl.zeros_like(weight) + 1.0
    if entropy_weights_ptr is not None:
        entropy_weight = per_token(entropy_weights_ptr, b, t, entropy_weights_sequence_stride, entropy_weights_token_stride, computed, 0.0)
        entropy_weight *= loss_scale
    if old_logprobs_ptr is not None:
        old_logprob = per_token(old_logprobs_ptr, b, t, old_sequence_stride, old_token_stride, computed, 0.0)
    if ref_logprobs_ptr is not None:
        ref_logprob = per_token(ref_logprobs_ptr, b, t, ref_sequence_stride, ref_token_stride, computed, 0.0)
    if rollout_weights_ptr is not None:
        rollout_weight = per_token(rollout_weights_ptr, b, t, rollout_sequence_stride, rollout_token_stride, computed, 1.0)
    loss, g, h, ratio, kl, clip_low, clip_high = policy_terms(
        logprob, entropy, advantage, old_logprob, ref_logprob, rollout_weight, weight, entropy_weight,
        as_float32(settings),
        SURROGATE, old_logprobs_ptr is not None, ref_logprobs_ptr is not None,
    )  # fmt: skip

    tl.store(logprobs_ptr + row, logprob, mask=inside)
    tl.store(entropy_ptr + row, entropy, mask=inside)
    tl.store(lse_ptr + row, lse, mask=inside)
    tl.store(g_ptr + row, tl.where(computed, g, 0.0), mask=inside)
    tl.store(h_ptr + row, tl.where(computed, h, 0.0), mask=inside)

    total_ptr, step = totals_ptr + tl.program_id(0), tl.num_programs(0)
    tl.store(total_ptr + KL * step, tl.sum(tl.where(computed, kl, 0.0), 0))
    tl.store(total_ptr + ENTROPY * step, tl.sum(entropy, 0))
    tl.store(total_ptr + RATIO * step, tl.sum(tl.where(computed, ratio, 0.0), 0))
    tl.store(total_ptr + CLIP_LOW * step, tl.sum((computed & clip_low).to(tl.float32), 0))
    tl.store(total_ptr + CLIP_HIGH * step, tl.sum((computed & clip_high).to(tl.float32), 0))
    tl.store(total_ptr + RATIO_MAX * step, tl.max(tl.where(computed, ratio, 0.0), 0))
    tl.store(total_ptr + ACTIVE * step, tl.sum(active.to(tl.float32), 0))
    tl.store(total_ptr + UNMASKED * step, tl.sum(unmasked.to(tl.float32), 0))
    tl.store(total_ptr + COMPUTED * step, tl.sum(computed.to(tl.float32), 0))
    tl.store(total_ptr + LOSS * step, tl.sum(tl.where(computed, loss, 0.0), 0))


@triton.jit
def _total(totals_ptr, which: tl.constexpr, programs, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, programs, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(totals_ptr + which * programs + i, mask=i < programs, other=0.0)
    return tl.sum(total, 0)


@kernel
def _grpo_loss_total_kernel(totals_ptr, loss_ptr, metrics_ptr, programs: tl.int64, BLOCK: tl.constexpr):
    tl.store(loss_ptr, _total(totals_ptr, LOSS, programs, BLOCK))
    computed = tl.maximum(_total(totals_ptr, COMPUTED, programs, BLOCK), 1.0)
    unmasked = tl.maximum(_total(totals_ptr, UNMASKED, programs, BLOCK), 1.0)
    clip_low, clip_high = _total(totals_ptr, CLIP_LOW, programs, BLOCK), _total(totals_ptr, CLIP_HIGH, programs, BLOCK)
    ratio = _total(totals_ptr, RATIO, programs, BLOCK)

    largest = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, programs, BLOCK):
        i = start + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, tl.load(totals_ptr + RATIO_MAX * programs + i, mask=i < programs, other=0.0))
    ratio_max = tl.where(ratio == ratio, tl.max(largest, 0), ratio)  # tl.maximum ignores NaN, which the metric must show

    tl.store(metrics_ptr, _total(totals_ptr, KL, programs, BLOCK) / computed)
    tl.store(metrics_ptr + 1, _total(totals_ptr, ENTROPY, programs, BLOCK) / computed)
    tl.store(metrics_ptr + 2, ratio / computed)
    tl.store(metrics_ptr + 3, ratio_max)
    tl.store(metrics_ptr + 4, clip_low / computed)
    tl.store(metrics_ptr + 5, clip_high / computed)
    tl.store(metrics_ptr + 6, (clip_low + clip_high) / computed)  # a token is in at most one of them
    tl.store(metrics_ptr + 7, _total(totals_ptr, ACTIVE, programs, BLOCK) / unmasked)


# Launcher ------------------------------------------------------------------------------------------------------------------------


class PolicyTensors(NamedTuple):
    """The inputs of the loss other than the logits, float32 [B, T] each, strided or broadcast."""

    advantages: Tensor
    weights: Tensor
    entropy_weights: Tensor | None
    old_logprobs: Tensor | None  # None: on-policy
    ref_logprobs: Tensor | None
    rollout_weights: Tensor | None


def grpo_loss_fwd(
    rows: LogitRows, scoring: Scoring, policy: PolicyTensors, loss_scale: float, settings: list[float], only_active: bool,
    gradient: Tensor | None, *, parts: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute (loss, logprobs, entropy, metrics), all float32: 0-d, [B, T], [B, T] and [METRICS].

    Args:
        settings: from loss_settings() in grpo_fast/loss/kernel_settings.py: the surrogate's number, then the fields of LossSettings.
        only_active: skip tokens that cannot change the gradient.
        gradient: the output for an upstream gradient of 1, like the logits; may be the logits themselves. None: no gradient.
        parts: programs per row; by default chosen from the number of rows.
    """
    logits, token_ids, mask = rows
    check_rows(logits, token_ids, mask)
    for name, x in policy._asdict().items():
        check_per_token(name, x, logits, token_ids)
    if len(settings) != 1 + len(LossSettings._fields):
        raise RuntimeError(f"grpo_loss: {len(settings)} settings given, expected {1 + len(LossSettings._fields)}")
    surrogate, loss_settings = int(settings[0]), LossSettings(*map(float, settings[1:]))
    all_active = loss_settings.beta != 0 or loss_settings.entropy_coef != 0 or loss_settings.squared_log_ratio_coef != 0
    computed = mask & (policy.advantages != 0) if only_active and not all_active else mask
    sums = token_sums(LogitRows(logits, token_ids, computed), scoring, parts=parts)

    logprobs, entropy, lse, g, h = (torch.empty(token_ids.shape, dtype=torch.float32, device=logits.device) for _ in range(5))
    programs = triton.cdiv(rows.num_rows, TOKENS_BLOCK)
    totals = torch.empty((TOTALS, programs), dtype=torch.float32, device=logits.device)
    if programs > 0:
        _grpo_loss_terms_kernel[(programs,)](
            logits, token_ids, mask, scoring.temperatures, sums, *policy,
            logprobs, entropy, lse, g, h, totals,
            rows.num_rows, token_ids.shape[1], logits.shape[2], sums.shape[2],
            *strides(logits), *strides(token_ids), *strides(mask), *strides(scoring.temperatures),
            *(stride for x in policy for stride in strides(x)),
            *scoring.numbers, loss_scale, loss_settings, int(all_active), int(only_active),
            BLOCK_N=TOKENS_BLOCK, SURROGATE=surrogate, HAS_SOFTCAP=scoring.softcap > 0,
        )  # fmt: skip
    loss = torch.empty((), dtype=torch.float32, device=logits.device)
    metrics = torch.empty(METRICS, dtype=torch.float32, device=logits.device)
    _grpo_loss_total_kernel[(1,)](totals, loss, metrics, programs, BLOCK=TOTAL_BLOCK)
    if gradient is not None:
        token_gradient(rows, scoring, g, h, logprobs, entropy, lse, gradient, want_entropy=loss_settings.entropy_coef != 0, parts=parts)
    return loss, logprobs, entropy, metrics
