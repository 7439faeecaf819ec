// Registers the C++ functions as implementations of the operators. The schemas stand in grpo_fast/ops beside
// their fake and autograd formulas, so that they exist (for the Triton backend, say) where this extension was not built. A library of
// operators and no Python module: torch.ops.load_library() runs these static registrations, and neither Python nor its headers are needed.
#include "ops.h"

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_IMPL(grpo_fast, CPU, m) {
  m.impl("group_advantages", TORCH_BOX(&group_advantages_cpu));
  m.impl("token_logprobs", TORCH_BOX(&token_logprobs_cpu));
  m.impl("token_logprobs_backward", TORCH_BOX(&token_logprobs_backward_cpu));
  m.impl("token_logprobs_backward_", TORCH_BOX(&token_logprobs_backward_inplace_cpu));
  m.impl("grpo_loss", TORCH_BOX(&grpo_loss_cpu));
  m.impl("grpo_loss_", TORCH_BOX(&grpo_loss_inplace_cpu));
  m.impl("kept_logits", TORCH_BOX(&kept_logits_cpu));
  m.impl("kept_hidden_gradient", TORCH_BOX(&kept_hidden_gradient_cpu));
  m.impl("add_kept_weight_gradient_", TORCH_BOX(&add_kept_weight_gradient_cpu));
  m.impl("product_", TORCH_BOX(&product_cpu));
  m.impl("use_huge_pages_", TORCH_BOX(&use_huge_pages_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(grpo_fast, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("cpu_matrix_isa", TORCH_BOX(&cpu_matrix_isa));
}
