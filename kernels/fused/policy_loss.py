"""The surrogate and the KL penalty of a token: their value, g = d loss / d logprob and h = d loss / d entropy.

The Triton counterpart of csrc/policy_loss.h. grpo_fast/loss/reference.py has the formulas and their sources. All functions are elementwise
over tokens; ``settings`` is LossSettings of float32 scalars.
"""

import triton
import triton.language as tl

from .loss_settings import CISPO, CLIP, DPPO_KL, DPPO_TV, K1, K2, SAPO
from .rowwise import LN_2, exp, expm1


@triton.jit
def product(c, x):
    """Return c * x, and 0 for c = 0 also where x is infinite (a log-probability of -inf). NaN stays NaN."""
    return tl.where(c == 0, tl.where(x == x, 0.0, x), c * x)


@triton.jit
def clamped_log(x, slope, bound):
    """Return x clamped to ±bound, and its derivative, which is 0 where x is clamped. NaN stays NaN."""
    value = tl.where(x > bound, bound, tl.where(x < -bound, -bound, x))
    return value, tl.where((x > bound) | (x < -bound), 0.0, slope)


@triton.jit
def clip_loss(ratio, ratio_slope, advantage, settings):
    floor, ceiling = 1.0 - settings.epsilon_low, 1.0 + settings.epsilon_high
    negative, positive = advantage < 0, advantage > 0
    low, high = (ratio < floor) & negative, (ratio > ceiling) & positive

    value, slope = -ratio * advantage, -ratio_slope * advantage
    bounded = (ratio > settings.delta) & negative
    value, slope = tl.where(bounded, -settings.delta * advantage, value), tl.where(bounded, 0.0, slope)
    most = tl.where(negative, -settings.dual_clip * advantage, float("inf"))  # for a negative advantage the loss is positive
    value, slope = tl.where(value > most, most, value), tl.where(value > most, 0.0, slope)

    value = tl.where(low, -floor * advantage, tl.where(high, -ceiling * advantage, value))
    return value, tl.where(low | high, 0.0, slope), low, high


@triton.jit
def sapo_loss(ratio, ratio_slope, advantage, settings):
    tau = tl.where(advantage > 0, settings.sapo_temperature_pos, settings.sapo_temperature_neg)
    gate = 1.0 / (1.0 + exp(-tau * (ratio - 1.0)))
    return -4.0 / tau * gate * advantage, -4.0 * gate * (1.0 - gate) * ratio_slope * advantage


@triton.jit
def binary_tv(logprob, old_logprob):
    """Total variation between Bernoulli(q) and Bernoulli(p), the probabilities of the token under the old policy and under this one."""
    return tl.abs(exp(logprob) - exp(old_logprob))


@triton.jit
def binary_kl(logprob, old_logprob):
    """KL(Bernoulli(q) || Bernoulli(p)), in nats."""
    q, others, old_others = exp(old_logprob), -expm1(logprob), -expm1(old_logprob)
    of_token = tl.where(q > 0, q * (old_logprob - logprob), 0.0)
    return of_token + tl.where(old_others > 0, old_others * (tl.log2(old_others) - tl.log2(others)) * LN_2, 0.0)


@triton.jit
def dppo_loss(ratio, ratio_slope, logprob, old_logprob, advantage, settings, SURROGATE: tl.constexpr):
    old_logprob = tl.where(old_logprob > 0, 0.0, old_logprob)
    if SURROGATE == DPPO_TV:
        divergence = binary_tv(logprob, old_logprob)
    else:
        divergence = binary_kl(logprob, old_logprob)
    low = (divergence > settings.dppo_mask_low) & (logprob < old_logprob) & (advantage < 0)
    high = (divergence > settings.dppo_mask_high) & (logprob > old_logprob) & (advantage > 0)
    dropped = low | high
    bounded = settings.dppo_ratio_max < float("inf")  # then the ratio is a constant, as in verl
    weight = tl.where(ratio < settings.dppo_ratio_max, ratio, settings.dppo_ratio_max) * advantage
    value = tl.where(bounded, -product(weight, logprob), -ratio * advantage)
    slope = tl.where(bounded, -weight, -ratio_slope * advantage)
    return tl.where(dropped, 0.0, value), tl.where(dropped, 0.0, slope), low, high


@triton.jit
def kl_penalty(logprob, ref_logprob, settings):
    d = ref_logprob - logprob
    estimator = settings.kl_estimator
    clamped, slope = clamped_log(d, -1.0, settings.log_ratio_clamp)
    excess = expm1(clamped)  # exp(d) - 1 - d cancels for small d
    value = tl.where(estimator == K1, -d, tl.where(estimator == K2, d * d * 0.5, excess - clamped))
    return value, tl.where(estimator == K1, 1.0, tl.where(estimator == K2, -d, excess * slope))


@triton.jit
def policy_terms(
    logprob, entropy, advantage, old_logprob, ref_logprob, rollout_weight, weight, entropy_weight,
    settings,
    SURROGATE: tl.constexpr, HAS_OLD: tl.constexpr, HAS_REF: tl.constexpr,
):  # fmt: skip
    """Return (loss, g, h, ratio, kl, clip_low, clip_high). Without HAS_OLD a token is on-policy: the log-ratio is 0 and has a gradient."""
    log_ratio = tl.where(logprob == logprob, 0.0, logprob)  # on-policy: 0, or NaN for an id out of range, which the loss must show
    impossible = logprob == float("-inf")
    if HAS_OLD:
        impossible &= old_logprob == float("-inf")
        log_ratio = tl.where(impossible, 0.0, logprob - old_logprob)  # not inf - inf
    clamped, clamped_slope = clamped_log(log_ratio, tl.where(impossible, 0.0, 1.0), settings.log_ratio_clamp)
    ratio = exp(clamped)
    ratio_slope = ratio * clamped_slope

    never = advantage != advantage
    clip_low, clip_high = never, never
    if SURROGATE == CLIP:
        value, slope, clip_low, clip_high = clip_loss(ratio, ratio_slope, advantage, settings)
    elif SURROGATE == CISPO:
        clip_low = (ratio < settings.cispo_ratio_low) & (advantage < 0)
        clip_high = (ratio > settings.epsilon_high) & (advantage > 0)
        bounded = tl.where(ratio < settings.epsilon_high, ratio, settings.epsilon_high)
        bounded = tl.where(ratio < settings.cispo_ratio_low, settings.cispo_ratio_low, bounded)
        factor = bounded * advantage  # a constant: no gradient through the ratio
        value, slope = -product(factor, logprob), -factor
    elif SURROGATE == SAPO:
        value, slope = sapo_loss(ratio, ratio_slope, advantage, settings)
    elif SURROGATE == DPPO_TV or SURROGATE == DPPO_KL:
        before = logprob  # on-policy: no divergence, so no token is dropped
        if HAS_OLD:
            before = old_logprob
        value, slope, clip_low, clip_high = dppo_loss(ratio, ratio_slope, logprob, before, advantage, settings, SURROGATE)
    else:
        value, slope = -product(advantage, logprob), -advantage

    loss, g = product(rollout_weight, value), product(rollout_weight, slope)
    kl = tl.zeros_like(logprob)
    if HAS_REF:
        kl, kl_slope = kl_penalty(logprob, ref_logprob, settings)
        corrected = settings.bias_corrected_kl != 0
        penalty = tl.where(corrected, kl * ratio, kl)
        penalty_slope = tl.where(corrected, kl_slope * ratio + product(ratio_slope, kl), kl_slope)
        loss += product(settings.beta, penalty)
        g += product(settings.beta, penalty_slope)

    if HAS_OLD:
        loss += settings.squared_log_ratio_coef * clamped * clamped
        g += 2.0 * settings.squared_log_ratio_coef * clamped * clamped_slope

    # Select instead of multiplying by entropy_coef = 0: the entropy weight may be infinite.
    bonus = tl.where(settings.entropy_coef != 0, settings.entropy_coef * entropy_weight, 0.0)
    return product(weight, loss) - product(bonus, entropy), product(weight, g), -bonus, ratio, kl, clip_low, clip_high
