// csrc/cuda/group_advantages_cuda.cu, run on the CPU by cuda_runtime.h beside this file, as a separate operator for the tests.
#include <torch/csrc/stable/library.h>

#include "group_advantages.h"

extern "C" const char* group_advantages_cuda_launch(const grpo_fast::GroupAdvantagesArgs* args, void* stream);

static grpo_fast::GroupAdvantagesOutput group_advantages(const torch::stable::Tensor& rewards,
                                                         const std::optional<torch::stable::Tensor>& group_offsets, int64_t group_size,
                                                         const std::optional<torch::stable::Tensor>& reward_weights, int64_t scale,
                                                         bool leave_one_out, bool normalize_then_sum, double eps,
                                                         const std::optional<torch::stable::Tensor>& lengths, bool exclude_degenerate,
                                                         int64_t pass_at_k) {
  return grpo_fast::with_group_advantages_args(
      rewards, group_offsets, group_size, reward_weights, scale, leave_one_out, normalize_then_sum, eps, lengths, exclude_degenerate,
      pass_at_k, [](const grpo_fast::GroupAdvantagesArgs& args) { group_advantages_cuda_launch(&args, nullptr); });
}

extern "C" int cuda_on_host_launches();
static int64_t launches() { return cuda_on_host_launches(); }

STABLE_TORCH_LIBRARY(grpo_fast_cuda_on_host, m) {
  m.def(
      "group_advantages(Tensor rewards, Tensor? group_offsets, int group_size, Tensor? reward_weights, int scale, bool leave_one_out, bool "
      "normalize_then_sum, float eps, Tensor? lengths=None, bool exclude_degenerate=False, int pass_at_k=0) -> (Tensor, Tensor, Tensor, "
      "Tensor)");
  m.def("launches() -> int");
}
STABLE_TORCH_LIBRARY_IMPL(grpo_fast_cuda_on_host, CPU, m) { m.impl("group_advantages", TORCH_BOX(&group_advantages)); }
STABLE_TORCH_LIBRARY_IMPL(grpo_fast_cuda_on_host, CompositeExplicitAutograd, m) { m.impl("launches", TORCH_BOX(&launches)); }
