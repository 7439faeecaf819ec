// Log-probability and entropy of the sampled tokens, and the gradient of the logits from their upstream gradients.
#include <cmath>
#include <tuple>

#include "../ops.h"
#include "token_rows.h"

using namespace grpo_fast;

std::tuple<Tensor, Tensor, Tensor> token_logprobs_cpu(const Tensor& logits_in, const Tensor& token_ids, const Tensor& mask,
                                                      const std::optional<Tensor>& temperatures, double temperature, double softcap,
                                                      double logit_scale) {
  const Tensor logits = unit_stride(logits_in);
  const Rows in(logits);
  const RowKernels& kernels = rows(in.type);
  const Tokens tokens{
      PerToken<int64_t>(token_ids), PerToken<bool>(mask), PerToken<float>(temperatures), {temperature, logit_scale, softcap}};
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

static void token_logprobs_gradient(const Tensor& logits, const Tensor& gradient, const Tensor& grad_logprobs, const Tensor& grad_entropy,
                                    const Tensor& token_ids, const Tensor& mask, const std::optional<Tensor>& temperatures,
                                    double temperature, double softcap, double logit_scale, const Tensor& logprobs, const Tensor& entropy,
                                    const Tensor& lse) {
  const Rows in(logits), out(gradient);
  const RowKernels& kernels = rows(in.type);
  const Tokens tokens{
      PerToken<int64_t>(token_ids), PerToken<bool>(mask), PerToken<float>(temperatures), {temperature, logit_scale, softcap}};
  const PerToken<float> g(grad_logprobs), h(grad_entropy), logprob(logprobs), row_entropy(entropy), row_lse(lse);

  const int64_t length = token_ids.size(1);
  for_each_row(in.sequences * in.positions, in.vocabulary, [&](int64_t n) {
    const int64_t b = n / in.positions, t = n % in.positions;
    const bool counts = t < length && tokens.mask.at(b, t) && (g.at(b, t) != 0 || h.at(b, t) != 0);
    if (!counts) return out.clear(b, t);
    const RowTransform transform = tokens.transform(b, t);
    RowStatistics row{logprob.at(b, t), row_entropy.at(b, t), row_lse.at(b, t), 0};
    row.pivot = std::nearbyint(row.lse * transform.temperature / (softcap > 0 ? 1.0 : logit_scale));  // a whole number: f - pivot is exact
    const int64_t target = tokens.in_vocabulary(b, t, in.vocabulary) ? tokens.ids.at(b, t) : kNoTarget;
    kernels.gradient(in.at(b, t), out.at(b, t), in.vocabulary, target, transform, row, g.at(b, t), h.at(b, t));
  });
}

Tensor token_logprobs_backward_cpu(const Tensor& grad_logprobs, const Tensor& grad_entropy, const Tensor& logits_in,
                                   const Tensor& token_ids, const Tensor& mask, const std::optional<Tensor>& temperatures,
                                   double temperature, double softcap, double logit_scale, const Tensor& logprobs, const Tensor& entropy,
                                   const Tensor& lse) {
  const Tensor logits = unit_stride(logits_in);
  Tensor gradient = new_gradient(logits);
  token_logprobs_gradient(logits, gradient, grad_logprobs, grad_entropy, token_ids, mask, temperatures, temperature, softcap, logit_scale,
                          logprobs, entropy, lse);
  return gradient;
}

void token_logprobs_backward_inplace_cpu(const Tensor& grad_logprobs, const Tensor& grad_entropy, Tensor logits, const Tensor& token_ids,
                                         const Tensor& mask, const std::optional<Tensor>& temperatures, double temperature, double softcap,
                                         double logit_scale, const Tensor& logprobs, const Tensor& entropy, const Tensor& lse) {
  STD_TORCH_CHECK(logits.stride(2) == 1, "in place: logits must be contiguous over the vocabulary");
  token_logprobs_gradient(logits, logits, grad_logprobs, grad_entropy, token_ids, mask, temperatures, temperature, softcap, logit_scale,
                          logprobs, entropy, lse);
}
