// Tensors, device and stream for the CUDA kernel. Separate from the .cu file, so that nvcc does not compile torch headers and this file
// needs no CUDA header: a stream is a void*. USE_CUDA is the macro of torch for the CUDA part of the stable ABI; the build sets it for a
// CUDA extension.
#ifdef USE_CUDA
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "../group_advantages.h"

// Defined in libtorch_cuda only. Weak, so that the extension also loads with a CPU build of torch, where it is null and never called.
#pragma weak aoti_torch_get_current_cuda_stream

extern "C" const char* group_advantages_cuda_launch(const grpo_fast::GroupAdvantagesArgs* args, void* stream);

namespace {

grpo_fast::GroupAdvantagesOutput group_advantages_cuda(const torch::stable::Tensor& rewards,
                                                       const std::optional<torch::stable::Tensor>& group_offsets, int64_t group_size,
                                                       const std::optional<torch::stable::Tensor>& reward_weights, int64_t scale,
                                                       bool leave_one_out, bool normalize_then_sum, double eps,
                                                       const std::optional<torch::stable::Tensor>& lengths, bool exclude_degenerate,
                                                       int64_t pass_at_k) {
  const auto device = rewards.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const auto run = [device](const grpo_fast::GroupAdvantagesArgs& args) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    const char* error = group_advantages_cuda_launch(&args, stream);
    STD_TORCH_CHECK(error == nullptr, "grpo_fast::group_advantages on cuda:", device, ": ", error);
  };
  return grpo_fast::with_group_advantages_args(rewards, group_offsets, group_size, reward_weights, scale, leave_one_out, normalize_then_sum,
                                               eps, lengths, exclude_degenerate, pass_at_k, run);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(grpo_fast, CUDA, m) { m.impl("group_advantages", TORCH_BOX(&group_advantages_cuda)); }
#endif  // USE_CUDA
