"""The surrogate and the KL penalty of a token: their value, g = d loss / d logprob and h = d loss / d entropy.

The Triton counterpart of csrc/policy_loss.h; grpo_fast/loss/reference.py has the formulas and their sources. Elementwise over tokens:
everything but the settings is one number per token.
"""

import triton
import triton.language as tl

from .rowwise import exp, expm1

# The positions in SURROGATES and KL_ESTIMATORS of grpo_fast/loss/config.py.
CLIP = tl.constexpr(0)
CISPO = tl.constexpr(1)
SAPO = tl.constexpr(2)
REINFORCE = tl.constexpr(3)
K1 = tl.constexpr(0)
K2 = tl.constexpr(1)


@triton.jit
def clamped_log(x, slope, bound):
    """x within ±bound, and its derivative: beyond the bounds a clamp is constant. NaN stays NaN."""
    value = tl.where(x > bound, bound, tl.where(x < -bound, -bound, x))
    return value, tl.where((x > bound) | (x < -bound), 0.0, slope)


@triton.jit
def clip_loss(ratio, ratio_slope, advantage, epsilon_low, epsilon_high, delta, dual_clip):
    floor, ceiling = 1.0 - epsilon_low, 1.0 + epsilon_high
    negative, positive = advantage < 0, advantage > 0
    low, high = (ratio < floor) & negative, (ratio > ceiling) & positive

    value, slope = -ratio * advantage, -ratio_slope * advantage
    bounded = (ratio > delta) & negative
    value, slope = tl.where(bounded, -delta * advantage, value), tl.where(bounded, 0.0, slope)
    most = tl.where(negative, -dual_clip * advantage, float("inf"))  # for a negative advantage the loss is positive
    value, slope = tl.where(value > most, most, value), tl.where(value > most, 0.0, slope)

    value = tl.where(low, -floor * advantage, tl.where(high, -ceiling * advantage, value))
    return value, tl.where(low | high, 0.0, slope), low, high


@triton.jit
def sapo_loss(ratio, ratio_slope, advantage, temperature_pos, temperature_neg):
    tau = tl.where(advantage > 0, temperature_pos, temperature_neg)
    gate = 1.0 / (1.0 + exp(-tau * (ratio - 1.0)))
    return -4.0 / tau * gate * advantage, -4.0 * gate * (1.0 - gate) * ratio_slope * advantage


@triton.jit
def kl_penalty(logprob, ref_logprob, estimator, clamp):
    d = ref_logprob - logprob
    clamped, slope = clamped_log(d, -1.0, clamp)
    excess = expm1(clamped)  # exp(d) - 1 - d cancels for small d
    value = tl.where(estimator == K1, -d, tl.where(estimator == K2, d * d * 0.5, excess - clamped))
    return value, tl.where(estimator == K1, 1.0, tl.where(estimator == K2, -d, excess * slope))


@triton.jit
def policy_terms(
    logprob, entropy, advantage, old_logprob, ref_logprob, rollout_weight, weight, entropy_weight,
    kl_estimator, bias_corrected_kl, epsilon_low, epsilon_high, delta, dual_clip, beta, entropy_coef, log_ratio_clamp,
    sapo_temperature_pos, sapo_temperature_neg,
    SURROGATE: tl.constexpr, HAS_OLD: tl.constexpr, HAS_REF: tl.constexpr,
):  # fmt: skip
    """(loss, g, h, ratio, kl, clip_low, clip_high). HAS_OLD false: on-policy, the log-ratio is 0 and its gradient still flows."""
    log_ratio = tl.zeros_like(logprob)
    if HAS_OLD:
        log_ratio = logprob - old_logprob
    clamped, slope = clamped_log(log_ratio, 1.0, log_ratio_clamp)
    ratio = exp(clamped)
    ratio_slope = ratio * slope

    never = advantage != advantage
    clip_low, clip_high = never, never
    if SURROGATE == CLIP:
        value, slope, clip_low, clip_high = clip_loss(ratio, ratio_slope, advantage, epsilon_low, epsilon_high, delta, dual_clip)
    elif SURROGATE == CISPO:
        clip_high = (ratio > epsilon_high) & (advantage > 0)
        factor = tl.where(ratio < epsilon_high, ratio, epsilon_high) * advantage  # a constant: no gradient through the ratio
        value, slope = -factor * logprob, -factor
    elif SURROGATE == SAPO:
        value, slope = sapo_loss(ratio, ratio_slope, advantage, sapo_temperature_pos, sapo_temperature_neg)
    else:
        value, slope = -advantage * logprob, -advantage

    loss, g = rollout_weight * value, rollout_weight * slope
    kl = tl.zeros_like(logprob)
    if HAS_REF:
        kl, kl_slope = kl_penalty(logprob, ref_logprob, kl_estimator, log_ratio_clamp)
        corrected = bias_corrected_kl != 0
        penalty = tl.where(corrected, kl * ratio, kl)
        penalty_slope = tl.where(corrected, kl_slope * ratio + kl * ratio_slope, kl_slope)
        loss += beta * penalty
        g += beta * penalty_slope

    # A selection and not a product: without an entropy bonus an infinite entropy weight is nothing.
    bonus = tl.where(entropy_coef != 0, entropy_coef * entropy_weight, 0.0)
    return weight * loss - bonus * entropy, weight * g, -bonus, ratio, kl, clip_low, clip_high
