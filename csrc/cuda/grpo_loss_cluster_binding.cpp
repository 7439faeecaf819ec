// Tensors, device and stream for the cluster kernel. group_advantages_cuda_binding.cpp explains USE_CUDA, the weak symbol and the two
// files.
#ifdef USE_CUDA
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "grpo_loss_cluster_tensors.h"

#pragma weak aoti_torch_get_current_cuda_stream

namespace {

using namespace grpo_fast;

// Launches on the device of the logits and its current stream.
const char* launch(const ClusterLossArgs& args, torch::stable::accelerator::DeviceIndex device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return grpo_loss_cluster_launch(&args, stream);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> grpo_loss_cluster(
    const Tensor& logits, const Tensor& token_ids, const Tensor& mask, const Tensor& advantages, const Tensor& weights,
    const std::optional<Tensor>& entropy_weights, const std::optional<Tensor>& old_logprobs, const std::optional<Tensor>& ref_logprobs,
    const std::optional<Tensor>& rollout_weights, const std::optional<Tensor>& temperatures, double temperature, double softcap,
    double logit_scale, double loss_scale, std::vector<double> settings, bool only_active, bool want_gradient) {
  const auto device = logits.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  return cluster_loss_and_gradient(logits, want_gradient,
                                   {token_ids, mask, advantages, weights, entropy_weights, old_logprobs, ref_logprobs, rollout_weights,
                                    temperatures, temperature, softcap, logit_scale, loss_scale, settings, only_active},
                                   [device](const ClusterLossArgs& args) { return launch(args, device); });
}

ClusterLossOutput grpo_loss_cluster_inplace(Tensor logits, const Tensor& token_ids, const Tensor& mask, const Tensor& advantages,
                                            const Tensor& weights, const std::optional<Tensor>& entropy_weights,
                                            const std::optional<Tensor>& old_logprobs, const std::optional<Tensor>& ref_logprobs,
                                            const std::optional<Tensor>& rollout_weights, const std::optional<Tensor>& temperatures,
                                            double temperature, double softcap, double logit_scale, double loss_scale,
                                            std::vector<double> settings, bool only_active) {
  const auto device = logits.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  return cluster_loss(logits, &logits,
                      {token_ids, mask, advantages, weights, entropy_weights, old_logprobs, ref_logprobs, rollout_weights, temperatures,
                       temperature, softcap, logit_scale, loss_scale, settings, only_active},
                      [device](const ClusterLossArgs& args) { return launch(args, device); });
}

int64_t cluster_row_bytes(int64_t device) {
  const torch::stable::accelerator::DeviceGuard guard(static_cast<torch::stable::accelerator::DeviceIndex>(device));
  const char* why = nullptr;
  const int64_t bytes = grpo_loss_cluster_row_bytes(static_cast<int32_t>(device), &why);
  STD_TORCH_CHECK(bytes > 0, why);
  return bytes;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(grpo_fast, CUDA, m) {
  m.impl("grpo_loss_cluster", TORCH_BOX(&grpo_loss_cluster));
  m.impl("grpo_loss_cluster_", TORCH_BOX(&grpo_loss_cluster_inplace));
}
STABLE_TORCH_LIBRARY_IMPL(grpo_fast, CompositeExplicitAutograd, m) { m.impl("cluster_row_bytes", TORCH_BOX(&cluster_row_bytes)); }
#endif  // USE_CUDA
