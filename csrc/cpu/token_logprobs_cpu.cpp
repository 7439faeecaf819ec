// Log-probability and entropy of the sampled tokens, and the gradient of the logits from their upstream gradients.
#include <algorithm>
#include <cmath>
#include <tuple>

#include "../ops.h"
#include "token_rows.h"

using namespace grpo_fast;

std::tuple<Tensor, Tensor, Tensor> token_logprobs_cpu(const Tensor& logits_in, const Tensor& token_ids, const Tensor& mask,
                                                      const std::optional<Tensor>& temperatures, double temperature, double softcap,
                                                      double logit_scale) {
  const TokenShape shape(logits_in, token_ids);
  const Tokens tokens(shape, token_ids, mask, temperatures, {temperature, logit_scale, softcap});
  const Tensor logits = unit_stride(logits_in);
  const Rows in(logits);
  const RowKernels& kernels = rows(in.type);
  Tensor logprobs = like_tokens(token_ids), entropy = like_tokens(token_ids), lse = like_tokens(token_ids);
  float *logprob_out = logprobs.mutable_data_ptr<float>(), *entropy_out = entropy.mutable_data_ptr<float>(),
        *lse_out = lse.mutable_data_ptr<float>();

  const int64_t length = token_ids.size(1);
  for_each_row(token_ids.numel(), in.vocabulary, [&](int64_t n) {
    const int64_t b = n / length, t = n % length, target = tokens.ids.at(b, t);
    RowStatistics row{};
    if (tokens.mask.at(b, t)) {
      row = tokens.in_vocabulary(b, t, in.vocabulary) ? kernels.statistics(in.at(b, t), in.vocabulary, target, tokens.transform(b, t))
                                                      : no_statistics();
    }
    logprob_out[n] = static_cast<float>(row.logprob);
    entropy_out[n] = static_cast<float>(row.entropy);
    lse_out[n] = static_cast<float>(row.lse);
  });
  return {logprobs, entropy, lse};
}

// Sets the pivot of a row from its float32 lse, which is that of the whole vocabulary if the row is a shard. A large lse in float32 has too
// few fractional digits to determine probabilities (at a low temperature none), so the row is then summed again.
static void set_pivot(RowStatistics* statistics, const RowKernels& kernels, const void* row, int64_t vocabulary, int64_t target,
                      const RowTransform& transform) {
  constexpr double kExactLse = 256;  // float32 keeps a probability to 1.5e-5 of itself there
  const double lse = statistics->lse, slope = (transform.softcap > 0 ? 1.0 : transform.logit_scale) / transform.temperature;
  if (!(std::fabs(lse) > kExactLse)) {  // NaN stays NaN
    // The pivot within half a nat of the lse, and so few digits that f - pivot is exact.
    const double steps = std::scalbn(1.0, std::max(0, std::ilogb(slope) + 1));
    statistics->pivot = std::nearbyint(lse / slope * steps) / steps;
    statistics->log_pivot = statistics->pivot * slope - lse;
    return;
  }
  const RowStatistics own = kernels.statistics(row, vocabulary, target == kNoTarget ? 0 : target, transform);
  const bool is_part = static_cast<float>(own.lse) < lse;
  statistics->pivot = own.pivot;
  statistics->log_pivot = is_part ? own.log_pivot + own.lse - lse : own.log_pivot;
}

static void token_logprobs_gradient(const Tensor& logits, const Tensor& gradient, const Tensor& grad_logprobs, const Tensor& grad_entropy,
                                    const Tensor& token_ids, const Tensor& mask, const std::optional<Tensor>& temperatures,
                                    double temperature, double softcap, double logit_scale, const Tensor& logprobs, const Tensor& entropy,
                                    const Tensor& lse, bool bfloat16 = false) {
  const TokenShape shape(logits, token_ids);
  const Tokens tokens(shape, token_ids, mask, temperatures, {temperature, logit_scale, softcap});
  const PerToken<float> g("grad_logprobs", grad_logprobs, shape), h("grad_entropy", grad_entropy, shape),
      logprob("logprobs", logprobs, shape), row_entropy("entropy", entropy, shape), row_lse("lse", lse, shape);
  const Rows in(logits), own(gradient), out = bfloat16 ? own.in_bfloat16() : own;
  const RowKernels& kernels = rows(in.type);
  const auto write_gradient = bfloat16 ? kernels.gradient_bfloat16 : kernels.gradient;

  const int64_t length = token_ids.size(1);
  for_each_row(in.sequences * in.positions, in.vocabulary, [&](int64_t n) {
    const int64_t b = n / in.positions, t = n % in.positions;
    const bool counts = t < length && tokens.mask.at(b, t) && (g.at(b, t) != 0 || h.at(b, t) != 0);
    if (!counts) return out.clear(b, t);
    const RowTransform transform = tokens.transform(b, t);
    RowStatistics row{logprob.at(b, t), row_entropy.at(b, t), row_lse.at(b, t), 0, 0};
    const int64_t target = tokens.in_vocabulary(b, t, in.vocabulary) ? tokens.ids.at(b, t) : kNoTarget;
    set_pivot(&row, kernels, in.at(b, t), in.vocabulary, target, transform);
    write_gradient(in.at(b, t), out.at(b, t), in.vocabulary, target, transform, row, g.at(b, t), h.at(b, t));
  });
}

Tensor token_logprobs_backward_cpu(const Tensor& grad_logprobs, const Tensor& grad_entropy, const Tensor& logits_in,
                                   const Tensor& token_ids, const Tensor& mask, const std::optional<Tensor>& temperatures,
                                   double temperature, double softcap, double logit_scale, const Tensor& logprobs, const Tensor& entropy,
                                   const Tensor& lse) {
  STD_TORCH_CHECK(logits_in.dim() == 3, "grpo_fast: logits have ", logits_in.dim(), " dimensions; expected three");
  const Tensor logits = unit_stride(logits_in);
  Tensor gradient = new_gradient(logits);
  token_logprobs_gradient(logits, gradient, grad_logprobs, grad_entropy, token_ids, mask, temperatures, temperature, softcap, logit_scale,
                          logprobs, entropy, lse);
  return gradient;
}

void token_logprobs_backward_inplace_cpu(const Tensor& grad_logprobs, const Tensor& grad_entropy, Tensor logits, const Tensor& token_ids,
                                         const Tensor& mask, const std::optional<Tensor>& temperatures, double temperature, double softcap,
                                         double logit_scale, const Tensor& logprobs, const Tensor& entropy, const Tensor& lse,
                                         bool bfloat16_gradient) {
  STD_TORCH_CHECK(logits.dim() == 3 && logits.stride(2) == 1, "in place: logits must be [B, T, V], contiguous over the vocabulary");
  token_logprobs_gradient(logits, logits, grad_logprobs, grad_entropy, token_ids, mask, temperatures, temperature, softcap, logit_scale,
                          logprobs, entropy, lse, bfloat16_gradient);
}
