// The surrogate and the KL penalty of one token, for host and device: their value, g = d loss / d logprob and h = d loss / d entropy.
// grpo_fast/loss/reference.py has the formulas and their sources; kernels/fused/policy_loss.py is the Triton counterpart.
#pragma once
#include <cmath>
#include <cstdint>

#include "policy_loss_config.h"

#if defined(__CUDACC__) || defined(__HIPCC__)
#define GF_HOST_DEVICE __host__ __device__
#else
#define GF_HOST_DEVICE
#endif

namespace grpo_fast {

template <typename Real>
struct PolicyToken {  // the inputs of a token besides its logits
  Real advantage;
  bool has_old, has_ref;  // without has_old the token is on-policy: the log-ratio is 0 and has a gradient
  Real old_logprob, ref_logprob;
  Real rollout_weight;  // multiplies the surrogate, not the KL
  Real weight;          // of the token in the loss
  Real entropy_weight;  // of the token in the entropy bonus
};

template <typename Real>
struct PolicyTerms {
  Real loss, g, h;
  Real ratio, kl;
  bool clip_low, clip_high;
};

// Whether a token with an advantage of 0 can change the gradient.
GF_HOST_DEVICE inline bool needs_all_tokens(const PolicyLossConfig& config) {
  return config.beta != 0 || config.entropy_coef != 0 || config.squared_log_ratio_coef != 0;
}

// c * x, and 0 for c = 0 also where x is infinite: a log-probability of -inf times an advantage or weight of 0 is no loss. NaN stays NaN.
template <typename Real>
GF_HOST_DEVICE inline Real product(Real c, Real x) {
  return c == 0 && x == x ? Real(0) : c * x;
}

// A value and its derivative with respect to the token's log-probability.
template <typename Real>
struct Dual {
  Real value, slope;
};

template <typename Real>
GF_HOST_DEVICE inline Dual<Real> clamped_log(Real x, Real slope, Real bound) {  // the derivative is 0 where x is clamped
  if (x > bound) return {bound, Real(0)};
  if (x < -bound) return {-bound, Real(0)};
  return {x, slope};
}

template <typename Real>
GF_HOST_DEVICE inline Dual<Real> clip_loss(Dual<Real> ratio, Real advantage, const PolicyLossConfig& config, bool* low, bool* high) {
  const Real floor = Real(1 - config.epsilon_low), ceiling = Real(1 + config.epsilon_high);
  *low = ratio.value < floor && advantage < 0;
  *high = ratio.value > ceiling && advantage > 0;
  if (*low) return {-floor * advantage, Real(0)};
  if (*high) return {-ceiling * advantage, Real(0)};
  Dual<Real> loss{-ratio.value * advantage, -ratio.slope * advantage};
  if (ratio.value > Real(config.delta) && advantage < 0) loss = {-Real(config.delta) * advantage, Real(0)};
  const Real most = -Real(config.dual_clip) * advantage;  // for a negative advantage the loss is positive
  if (advantage < 0 && loss.value > most) loss = {most, Real(0)};
  return loss;
}

template <typename Real>
GF_HOST_DEVICE inline Dual<Real> sapo_loss(Dual<Real> ratio, Real advantage, const PolicyLossConfig& config) {
  const Real tau = Real(advantage > 0 ? config.sapo_temperature_pos : config.sapo_temperature_neg);
  const Real gate = Real(1) / (Real(1) + std::exp(-tau * (ratio.value - 1)));
  return {-4 / tau * gate * advantage, -4 * gate * (1 - gate) * ratio.slope * advantage};
}

// Between Bernoulli(q) and Bernoulli(p), the probabilities of the token under the old policy and under this one.
template <typename Real>
GF_HOST_DEVICE inline Real binary_tv(Real logprob, Real old_logprob) {
  return std::fabs(std::exp(logprob) - std::exp(old_logprob));
}

template <typename Real>
GF_HOST_DEVICE inline Real binary_kl(Real logprob, Real old_logprob) {
  const Real q = std::exp(old_logprob), others = -std::expm1(logprob), old_others = -std::expm1(old_logprob);
  const Real of_token = q > 0 ? q * (old_logprob - logprob) : Real(0);
  return of_token + (old_others > 0 ? old_others * (std::log(old_others) - std::log(others)) : Real(0));
}

template <typename Real>
GF_HOST_DEVICE inline Dual<Real> dppo_loss(Dual<Real> ratio, Real logprob, const PolicyToken<Real>& token, const PolicyLossConfig& config,
                                           bool* low, bool* high) {
  if (token.has_old) {
    const Real old_logprob = token.old_logprob > 0 ? Real(0) : token.old_logprob;
    const Real divergence = config.surrogate == Surrogate::kDppoTv ? binary_tv(logprob, old_logprob) : binary_kl(logprob, old_logprob);
    *low = divergence > Real(config.dppo_mask_low) && logprob < old_logprob && token.advantage < 0;
    *high = divergence > Real(config.dppo_mask_high) && logprob > old_logprob && token.advantage > 0;
  }
  if (*low || *high) return {Real(0), Real(0)};
  const Real bound = Real(config.dppo_ratio_max);
  if (std::isinf(bound)) return {-ratio.value * token.advantage, -ratio.slope * token.advantage};
  const Real weight = (ratio.value < bound ? ratio.value : bound) * token.advantage;  // a constant, as in verl
  return {-product(weight, logprob), -weight};
}

template <typename Real>
GF_HOST_DEVICE inline Dual<Real> surrogate_loss(Dual<Real> ratio, Real logprob, const PolicyToken<Real>& token,
                                                const PolicyLossConfig& config, bool* low, bool* high) {
  const Real advantage = token.advantage;
  *low = *high = false;
  switch (config.surrogate) {
    case Surrogate::kClip:
      return clip_loss(ratio, advantage, config, low, high);
    case Surrogate::kCispo: {
      const Real floor = Real(config.cispo_ratio_low), bound = Real(config.epsilon_high);
      *low = ratio.value < floor && advantage < 0;
      *high = ratio.value > bound && advantage > 0;
      const Real clipped = ratio.value < floor ? floor : ratio.value < bound ? ratio.value : bound;
      const Real weight = clipped * advantage;  // a constant: no gradient through the ratio
      return {-product(weight, logprob), -weight};
    }
    case Surrogate::kSapo:
      return sapo_loss(ratio, advantage, config);
    case Surrogate::kDppoTv:
    case Surrogate::kDppoKl:
      return dppo_loss(ratio, logprob, token, config, low, high);
    case Surrogate::kReinforce:
    case Surrogate::kVespo:  // its weight needs a whole sequence: it reaches a kernel as kReinforce, the weight in the advantage
    case Surrogate::kGmpo:   // its ratio needs a whole sequence: it reaches a kernel on-policy only, as kClip
      break;
  }
  return {-product(advantage, logprob), -advantage};
}

template <typename Real>
GF_HOST_DEVICE inline Dual<Real> kl_penalty(Real logprob, Real ref_logprob, const PolicyLossConfig& config) {
  const Real d = ref_logprob - logprob;
  if (config.kl_estimator == KlEstimator::kK1) return {-d, Real(1)};
  if (config.kl_estimator == KlEstimator::kK2) return {d * d / 2, -d};
  const Dual<Real> x = clamped_log(d, Real(-1), Real(config.log_ratio_clamp));
  const Real excess = std::expm1(x.value);  // exp(d) - 1 - d cancels for small d
  return {excess - x.value, excess * x.slope};
}

template <typename Real>
GF_HOST_DEVICE inline PolicyTerms<Real> policy_terms(Real logprob, Real entropy, const PolicyToken<Real>& token,
                                                     const PolicyLossConfig& config) {
  Real log_ratio = logprob - (token.has_old ? token.old_logprob : logprob), log_ratio_slope = 1;  // on-policy: 0, or NaN for a NaN
  const Real impossible = -Real(INFINITY);
  if (logprob == impossible && (!token.has_old || token.old_logprob == impossible)) log_ratio = log_ratio_slope = 0;  // not inf - inf
  const Dual<Real> clamped = clamped_log(log_ratio, log_ratio_slope, Real(config.log_ratio_clamp));
  Dual<Real> ratio;
  ratio.value = std::exp(clamped.value);
  ratio.slope = ratio.value * clamped.slope;

  PolicyTerms<Real> out;
  const Dual<Real> policy = surrogate_loss(ratio, logprob, token, config, &out.clip_low, &out.clip_high);
  Dual<Real> kl{Real(0), Real(0)};
  if (token.has_ref) kl = kl_penalty(logprob, token.ref_logprob, config);
  Dual<Real> penalty = kl;
  if (config.bias_corrected_kl) penalty = {kl.value * ratio.value, kl.slope * ratio.value + product(ratio.slope, kl.value)};

  const Real squared = Real(config.squared_log_ratio_coef);
  const Dual<Real> moved{squared * clamped.value * clamped.value, 2 * squared * clamped.value * clamped.slope};

  const Real beta = Real(config.beta), coef = Real(config.entropy_coef);
  out.loss = product(token.weight, product(token.rollout_weight, policy.value) + product(beta, penalty.value) + moved.value) -
             product(coef * token.entropy_weight, entropy);
  out.g = product(token.weight, product(token.rollout_weight, policy.slope) + product(beta, penalty.slope) + moved.slope);
  out.h = -coef * token.entropy_weight;
  out.ratio = ratio.value;
  out.kl = kl.value;
  return out;
}

}  // namespace grpo_fast
