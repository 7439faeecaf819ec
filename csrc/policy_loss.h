// The surrogate and the KL penalty of one token: their value, g = d loss / d logprob and h = d loss / d entropy, by hand. The formulas and
// their sources stand in grpo_fast/loss/reference.py; this is their twin for host and device. Knows nothing of vocabularies.
#pragma once
#include <cmath>
#include <cstdint>

#if defined(__CUDACC__) || defined(__HIPCC__)
#define GF_HOST_DEVICE __host__ __device__
#else
#define GF_HOST_DEVICE
#endif

namespace grpo_fast {

// The numbers are the positions in SURROGATES and KL_ESTIMATORS of grpo_fast/loss/config.py. VESPO has no entry: its weight needs a whole
// sequence, so it reaches a kernel as REINFORCE with that weight.
enum class Surrogate : int64_t { kClip = 0, kCispo = 1, kSapo = 2, kReinforce = 3 };
enum class KlEstimator : int64_t { kK1 = 0, kK2 = 1, kK3 = 2 };

struct PolicyLossConfig {
  Surrogate surrogate;
  KlEstimator kl_estimator;
  bool bias_corrected_kl;
  double epsilon_low, epsilon_high;
  double delta;      // infinity: no bound
  double dual_clip;  // infinity: no bound
  double beta, entropy_coef, log_ratio_clamp;
  double sapo_temperature_pos, sapo_temperature_neg;
};

template <typename Real>
struct PolicyToken {  // what is known of a token beside its logits
  Real advantage;
  bool has_old, has_ref;  // without the old log-probability the token is on-policy: its log-ratio is 0, the gradient still flows
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

// A value and its derivative with respect to the token's log-probability.
template <typename Real>
struct Dual {
  Real value, slope;
};

template <typename Real>
GF_HOST_DEVICE inline Dual<Real> clamped_log(Real x, Real slope, Real bound) {  // beyond the bounds a clamp is constant
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

template <typename Real>
GF_HOST_DEVICE inline Dual<Real> surrogate_loss(Dual<Real> ratio, Real logprob, Real advantage, const PolicyLossConfig& config, bool* low,
                                                bool* high) {
  *low = *high = false;
  switch (config.surrogate) {
    case Surrogate::kClip:
      return clip_loss(ratio, advantage, config, low, high);
    case Surrogate::kCispo: {
      const Real bound = Real(config.epsilon_high);
      *high = ratio.value > bound && advantage > 0;
      const Real weight = (ratio.value < bound ? ratio.value : bound) * advantage;  // a constant: no gradient through the ratio
      return {-weight * logprob, -weight};
    }
    case Surrogate::kSapo:
      return sapo_loss(ratio, advantage, config);
    case Surrogate::kReinforce:
      break;
  }
  return {-advantage * logprob, -advantage};
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
  const Real log_ratio = token.has_old ? logprob - token.old_logprob : Real(0);
  const Dual<Real> clamped = clamped_log(log_ratio, Real(1), Real(config.log_ratio_clamp));
  Dual<Real> ratio;
  ratio.value = std::exp(clamped.value);
  ratio.slope = ratio.value * clamped.slope;

  PolicyTerms<Real> out;
  const Dual<Real> policy = surrogate_loss(ratio, logprob, token.advantage, config, &out.clip_low, &out.clip_high);
  Dual<Real> kl{Real(0), Real(0)};
  if (token.has_ref) kl = kl_penalty(logprob, token.ref_logprob, config);
  Dual<Real> penalty = kl;
  if (config.bias_corrected_kl) penalty = {kl.value * ratio.value, kl.slope * ratio.value + kl.value * ratio.slope};

  const Real beta = Real(config.beta), coef = Real(config.entropy_coef);
  out.loss = token.weight * (token.rollout_weight * policy.value + beta * penalty.value) - coef * token.entropy_weight * entropy;
  out.g = token.weight * (token.rollout_weight * policy.slope + beta * penalty.slope);
  out.h = -coef * token.entropy_weight;
  out.ratio = ratio.value;
  out.kl = kl.value;
  return out;
}

}  // namespace grpo_fast
