// The loss with token-level ratios, in one pass: the statistics of a row, its loss, and its gradient while the row is in the cache.
#include <tuple>
#include <vector>

#include "../loss_settings.h"
#include "../ops.h"
#include "token_rows.h"

namespace grpo_fast {
namespace {

struct RowRecord {  // of one token; added in order at the end, so that the result does not depend on the number of threads
  double loss = 0;
  float entropy = 0, ratio = 0, kl = 0;
  bool unmasked = false, computed = false, active = false, clip_low = false, clip_high = false;
};

// The positions of METRICS in grpo_fast/ops/grpo_loss.py.
enum Metric { kKl, kEntropy, kRatioMean, kRatioMax, kClipLow, kClipHigh, kClipRegion, kActiveFraction, kMetrics };

double sum_up(const std::vector<RowRecord>& records, float* metrics) {
  double loss = 0, sum[kMetrics] = {}, counted = 0, computed = 0, ratio_max = 0;
  for (const RowRecord& r : records) {
    loss += r.loss;
    counted += r.unmasked;
    computed += r.computed;
    sum[kActiveFraction] += r.active;
    if (!r.computed) continue;
    sum[kKl] += r.kl;
    sum[kEntropy] += r.entropy;
    sum[kRatioMean] += r.ratio;
    sum[kClipLow] += r.clip_low;
    sum[kClipHigh] += r.clip_high;
    sum[kClipRegion] += r.clip_low || r.clip_high;
    if (r.ratio > ratio_max || r.ratio != r.ratio) ratio_max = r.ratio;  // a NaN, once stored, is never replaced
  }
  for (int m = 0; m < kMetrics; m++) metrics[m] = static_cast<float>(sum[m] / std::max(m == kActiveFraction ? counted : computed, 1.0));
  metrics[kRatioMax] = static_cast<float>(ratio_max);
  return loss;
}

struct PolicyInputs {
  PolicyLossConfig config;
  PerToken<float> advantages, weights, entropy_weights, old_logprobs, ref_logprobs, rollout_weights;
  double loss_scale;

  PolicyInputs(const TokenShape& shape, const std::vector<double>& settings, const Tensor& advantages, const Tensor& weights,
               const std::optional<Tensor>& entropy_weights, const std::optional<Tensor>& old_logprobs,
               const std::optional<Tensor>& ref_logprobs, const std::optional<Tensor>& rollout_weights, double loss_scale)
      : config(checked_config(settings)),
        advantages("advantages", advantages, shape),
        weights("weights", weights, shape),
        entropy_weights("entropy_weights", entropy_weights, shape),
        old_logprobs("old_logprobs", old_logprobs, shape),
        ref_logprobs("ref_logprobs", ref_logprobs, shape),
        rollout_weights("rollout_weights", rollout_weights, shape),
        loss_scale(loss_scale) {}

  bool active(int64_t b, int64_t t) const { return needs_all_tokens(config) || advantages.at(b, t) != 0; }
  PolicyTerms<double> terms(double logprob, double entropy, int64_t b, int64_t t) const {
    PolicyToken<double> token;
    token.advantage = advantages.at(b, t);
    token.has_old = old_logprobs.given();
    token.has_ref = ref_logprobs.given();
    token.old_logprob = old_logprobs.at(b, t);
    token.ref_logprob = ref_logprobs.at(b, t);
    token.rollout_weight = rollout_weights.at(b, t, 1.0f);
    token.weight = weights.at(b, t) * loss_scale;
    token.entropy_weight = entropy_weights.at(b, t) * loss_scale;
    return policy_terms(logprob, entropy, token, config);
  }
};

struct LossOutput {
  Tensor loss, logprobs, entropy, metrics;
};

// gradient: where to write it (the logits themselves if in place), or null if no gradient is wanted; bfloat16: see RowKernels
LossOutput grpo_loss_rows(const Tensor& logits, const Tensor* gradient, const Tokens& tokens, const Tensor& token_ids,
                          const PolicyInputs& policy, bool only_active, bool bfloat16 = false) {
  const Rows in(logits), own(gradient ? *gradient : logits), out = bfloat16 ? own.in_bfloat16() : own;
  const RowKernels& kernels = rows(in.type);
  const auto write_gradient = bfloat16 ? kernels.gradient_bfloat16 : kernels.gradient;
  const int64_t length = token_ids.size(1);

  LossOutput output{torch::stable::new_empty(token_ids, {}, ScalarType::Float), like_tokens(token_ids), like_tokens(token_ids),
                    torch::stable::new_empty(token_ids, {kMetrics}, ScalarType::Float)};
  float *logprobs = output.logprobs.mutable_data_ptr<float>(), *entropy = output.entropy.mutable_data_ptr<float>();
  std::vector<RowRecord> records(static_cast<size_t>(token_ids.numel()));

  for_each_row(in.sequences * in.positions, in.vocabulary, [&](int64_t position) {
    const int64_t b = position / in.positions, t = position % in.positions, n = b * length + t;
    if (t >= length) {  // the last position of [B, T + 1, V] predicts no token
      if (gradient) out.clear(b, t);
      return;
    }
    RowRecord record;
    RowStatistics row{};
    PolicyTerms<double> terms{};
    record.unmasked = tokens.mask.at(b, t);
    record.active = record.unmasked && policy.active(b, t);
    record.computed = only_active ? record.active : record.unmasked;
    const bool in_vocabulary = record.computed && tokens.in_vocabulary(b, t, in.vocabulary);
    const int64_t target = in_vocabulary ? tokens.ids.at(b, t) : 0;
    const RowTransform transform = tokens.transform(b, t);
    if (record.computed) {
      row = in_vocabulary ? kernels.statistics(in.at(b, t), in.vocabulary, target, transform) : no_statistics();
      terms = policy.terms(row.logprob, row.entropy, b, t);
      record.loss = terms.loss;
      record.entropy = static_cast<float>(row.entropy);
      record.ratio = static_cast<float>(terms.ratio);
      record.kl = static_cast<float>(terms.kl);
      record.clip_low = terms.clip_low;
      record.clip_high = terms.clip_high;
    }
    logprobs[n] = static_cast<float>(row.logprob);
    entropy[n] = static_cast<float>(row.entropy);
    records[static_cast<size_t>(n)] = record;
    if (!gradient) return;
    if (terms.g == 0 && terms.h == 0) return out.clear(b, t);
    write_gradient(in.at(b, t), out.at(b, t), in.vocabulary, target, transform, row, terms.g, terms.h);
  });
  *output.loss.mutable_data_ptr<float>() = static_cast<float>(sum_up(records, output.metrics.mutable_data_ptr<float>()));
  return output;
}

}  // namespace
}  // namespace grpo_fast

using namespace grpo_fast;

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> grpo_loss_cpu(
    const Tensor& logits_in, const Tensor& token_ids, const Tensor& mask, const Tensor& advantages, const Tensor& weights,
    const std::optional<Tensor>& entropy_weights, const std::optional<Tensor>& old_logprobs, const std::optional<Tensor>& ref_logprobs,
    const std::optional<Tensor>& rollout_weights, const std::optional<Tensor>& temperatures, double temperature, double softcap,
    double logit_scale, double loss_scale, std::vector<double> settings, bool only_active, bool want_gradient) {
  const TokenShape shape(logits_in, token_ids);
  const Tensor logits = unit_stride(logits_in);
  const Tokens tokens(shape, token_ids, mask, temperatures, {temperature, logit_scale, softcap});
  const PolicyInputs policy(shape, settings, advantages, weights, entropy_weights, old_logprobs, ref_logprobs, rollout_weights, loss_scale);
  Tensor gradient = want_gradient ? new_gradient(logits) : torch::stable::new_empty(logits, {0});
  LossOutput output = grpo_loss_rows(logits, want_gradient ? &gradient : nullptr, tokens, token_ids, policy, only_active);
  return {output.loss, output.logprobs, output.entropy, output.metrics, gradient};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> grpo_loss_inplace_cpu(
    Tensor logits, const Tensor& token_ids, const Tensor& mask, const Tensor& advantages, const Tensor& weights,
    const std::optional<Tensor>& entropy_weights, const std::optional<Tensor>& old_logprobs, const std::optional<Tensor>& ref_logprobs,
    const std::optional<Tensor>& rollout_weights, const std::optional<Tensor>& temperatures, double temperature, double softcap,
    double logit_scale, double loss_scale, std::vector<double> settings, bool only_active, bool bfloat16_gradient) {
  const TokenShape shape(logits, token_ids);
  STD_TORCH_CHECK(logits.stride(2) == 1, "in place: logits must be contiguous over the vocabulary");
  const Tokens tokens(shape, token_ids, mask, temperatures, {temperature, logit_scale, softcap});
  const PolicyInputs policy(shape, settings, advantages, weights, entropy_weights, old_logprobs, ref_logprobs, rollout_weights, loss_scale);
  LossOutput output = grpo_loss_rows(logits, &logits, tokens, token_ids, policy, only_active, bfloat16_gradient);
  return {output.loss, output.logprobs, output.entropy, output.metrics};
}
