// Converts tensors to the plain arguments of the cluster kernel, for the CUDA binding and for the tests on a CPU.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <tuple>
#include <vector>

#include "../cpu/token_rows.h"
#include "../loss_settings.h"
#include "grpo_loss_cluster.h"

namespace grpo_fast {

struct ClusterLossTensors {  // the operator's arguments after the logits; grpo_fast/ops/grpo_loss.py describes them
  const Tensor &token_ids, &mask, &advantages, &weights;
  const std::optional<Tensor>&entropy_weights, &old_logprobs, &ref_logprobs, &rollout_weights, &temperatures;
  double temperature, softcap, logit_scale, loss_scale;
  const std::vector<double>& settings;
  bool only_active;
};

using ClusterLossOutput = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // loss, logprobs, entropy, metrics

// GRPO_FAST_CLUSTER="4x3", blocks by stages, forces a shape, to measure which is fastest. 0: chosen by the row's length.
inline void take_forced_shape(ClusterLossArgs& args) {
  const char* text = std::getenv("GRPO_FAST_CLUSTER");
  if (!text || !*text) return;
  int end = 0;
  const int read = std::sscanf(text, "%dx%d%n", &args.force_cluster, &args.force_stages, &end);
  const int32_t blocks = args.force_cluster;
  STD_TORCH_CHECK(read == 2 && text[end] == 0 && blocks >= 0 && (blocks & (blocks - 1)) == 0 && args.force_stages >= 0,
                  "GRPO_FAST_CLUSTER is '", text, "'; expected blocks by stages, such as 4x3, and 1, 2, 4 or 8 blocks. Unset it.");
}

// launch(args) returns null, or an error message. gradient: null if none is wanted.
template <typename Launch>
ClusterLossOutput cluster_loss(const Tensor& logits, const Tensor* gradient, const ClusterLossTensors& given, const Launch& launch) {
  const ScalarType type = logits.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
                  "logits: float32, bfloat16 or float16 expected by the cluster kernel");
  STD_TORCH_CHECK(logits.stride(2) == 1 || logits.size(2) == 1, "the cluster kernel needs logits that are contiguous over the vocabulary");
  STD_TORCH_CHECK(logits.size(2) < (int64_t(1) << 31), "the cluster kernel needs a vocabulary below 2^31");
  const TokenShape shape(logits, given.token_ids);
  ClusterLossArgs args{};
  take_forced_shape(args);
  args.logits = static_cast<const char*>(logits.const_data_ptr());
  args.gradient = gradient ? static_cast<char*>(const_cast<void*>(gradient->const_data_ptr())) : nullptr;
  for (int i = 0; i < 2; ++i) {
    args.logits_strides[i] = logits.stride(i);
    args.gradient_strides[i] = gradient ? gradient->stride(i) : 0;
  }
  args.sequences = logits.size(0), args.positions = logits.size(1), args.vocabulary = logits.size(2);
  args.length = given.token_ids.size(1);
  args.type = type == ScalarType::Float ? LogitType::kFloat32 : type == ScalarType::BFloat16 ? LogitType::kBFloat16 : LogitType::kFloat16;

  const auto view = [](const auto& x) { return TokenView<std::decay_t<decltype(*x.data)>>{x.data, x.sequence_stride, x.token_stride}; };
  args.token_ids = view(PerToken<int64_t>("token_ids", given.token_ids, shape));
  args.mask = view(PerToken<bool>("mask", given.mask, shape));
  args.temperatures = view(PerToken<float>("temperatures", given.temperatures, shape));
  args.advantages = view(PerToken<float>("advantages", given.advantages, shape));
  args.weights = view(PerToken<float>("weights", given.weights, shape));
  args.entropy_weights = view(PerToken<float>("entropy_weights", given.entropy_weights, shape));
  args.old_logprobs = view(PerToken<float>("old_logprobs", given.old_logprobs, shape));
  args.ref_logprobs = view(PerToken<float>("ref_logprobs", given.ref_logprobs, shape));
  args.rollout_weights = view(PerToken<float>("rollout_weights", given.rollout_weights, shape));

  const double log2_e = 1.4426950408889634074,
               slope = given.temperatures.has_value() ? given.logit_scale : given.logit_scale / given.temperature;
  args.softcap = given.softcap > 0;
  const double cap_scale = args.softcap ? given.logit_scale / given.softcap : 1;
  args.k = static_cast<float>(log2_e * slope / cap_scale), args.slope = static_cast<float>(slope);
  args.cap_scale = static_cast<float>(cap_scale);
  args.config = checked_config(given.settings);
  args.loss_scale = given.loss_scale;
  args.only_active = given.only_active;
  args.all_active = needs_all_tokens(args.config);

  const Tensor& like = given.token_ids;
  Tensor loss = torch::stable::new_empty(like, {}, ScalarType::Float),
         metrics = torch::stable::new_empty(like, {kTokenMetrics}, ScalarType::Float);
  Tensor logprobs = like_tokens(like), entropy = like_tokens(like);
  Tensor records = torch::stable::new_empty(like, {like.numel(), static_cast<int64_t>(sizeof(TokenRecord) / 4)}, ScalarType::Float);
  args.loss = loss.mutable_data_ptr<float>(), args.metrics = metrics.mutable_data_ptr<float>();
  args.logprobs = logprobs.mutable_data_ptr<float>(), args.entropy = entropy.mutable_data_ptr<float>();
  args.records = static_cast<TokenRecord*>(records.mutable_data_ptr());
  const char* error = launch(args);
  STD_TORCH_CHECK(error == nullptr, "grpo_fast::grpo_loss_cluster: ", error);
  return {loss, logprobs, entropy, metrics};
}

// The same with a new tensor for the gradient, which is returned last; empty if none is wanted.
template <typename Launch>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> cluster_loss_and_gradient(const Tensor& given_logits, bool want_gradient,
                                                                             const ClusterLossTensors& given, const Launch& launch) {
  STD_TORCH_CHECK(given_logits.dim() == 3, "grpo_fast: logits have ", given_logits.dim(), " dimensions; expected three");
  const Tensor logits = unit_stride(given_logits);
  Tensor gradient = want_gradient ? torch::stable::new_empty(logits, {logits.size(0), logits.size(1), logits.size(2)})
                                  : torch::stable::new_empty(logits, {0});
  auto [loss, logprobs, entropy, metrics] = cluster_loss(logits, want_gradient ? &gradient : nullptr, given, launch);
  return {loss, logprobs, entropy, metrics, gradient};
}

}  // namespace grpo_fast
