// csrc/cuda/grpo_loss_cluster.cu, run on the CPU by cuda_runtime.h and cluster_primitives.h beside this file, as operators for the tests.
#include <torch/csrc/stable/library.h>

#include "cuda/grpo_loss_cluster_tensors.h"

namespace {

using namespace grpo_fast;

const char* launch(const ClusterLossArgs& args) { return grpo_loss_cluster_launch(&args, nullptr); }

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> loss(
    const Tensor& logits, const Tensor& token_ids, const Tensor& mask, const Tensor& advantages, const Tensor& weights,
    const std::optional<Tensor>& entropy_weights, const std::optional<Tensor>& old_logprobs, const std::optional<Tensor>& ref_logprobs,
    const std::optional<Tensor>& rollout_weights, const std::optional<Tensor>& temperatures, double temperature, double softcap,
    double logit_scale, double loss_scale, std::vector<double> settings, bool only_active, bool want_gradient) {
  return cluster_loss_and_gradient(logits, want_gradient,
                                   {token_ids, mask, advantages, weights, entropy_weights, old_logprobs, ref_logprobs, rollout_weights,
                                    temperatures, temperature, softcap, logit_scale, loss_scale, settings, only_active},
                                   launch);
}

// Writes the gradient to a given tensor: the logits themselves, or any other tensor of their shape.
ClusterLossOutput loss_to(Tensor gradient, const Tensor& logits, const Tensor& token_ids, const Tensor& mask, const Tensor& advantages,
                          const Tensor& weights, const std::optional<Tensor>& entropy_weights, const std::optional<Tensor>& old_logprobs,
                          const std::optional<Tensor>& ref_logprobs, const std::optional<Tensor>& rollout_weights,
                          const std::optional<Tensor>& temperatures, double temperature, double softcap, double logit_scale,
                          double loss_scale, std::vector<double> settings, bool only_active) {
  return cluster_loss(logits, &gradient,
                      {token_ids, mask, advantages, weights, entropy_weights, old_logprobs, ref_logprobs, rollout_weights, temperatures,
                       temperature, softcap, logit_scale, loss_scale, settings, only_active},
                      launch);
}

}  // namespace

#define GF_REST                                                                                                                          \
  "Tensor token_ids, Tensor mask, Tensor advantages, Tensor weights, Tensor? entropy_weights, Tensor? old_logprobs, Tensor? "            \
  "ref_logprobs, Tensor? rollout_weights, Tensor? temperatures, float temperature, float softcap, float logit_scale, float loss_scale, " \
  "float[] settings, bool only_active"

STABLE_TORCH_LIBRARY(grpo_fast_cluster_on_host, m) {
  m.def("loss(Tensor logits, " GF_REST ", bool want_gradient) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("loss_to(Tensor(a!) gradient, Tensor logits, " GF_REST ") -> (Tensor, Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(grpo_fast_cluster_on_host, CPU, m) {
  m.impl("loss", TORCH_BOX(&loss));
  m.impl("loss_to", TORCH_BOX(&loss_to));
}
