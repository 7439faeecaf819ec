// The operators' C++ entry points, one per operator and device; registered in ops.cpp.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor> group_advantages_cpu(
    const torch::stable::Tensor& rewards, const std::optional<torch::stable::Tensor>& group_offsets, int64_t group_size,
    const std::optional<torch::stable::Tensor>& reward_weights, int64_t scale, bool leave_one_out, bool normalize_then_sum, double eps,
    const std::optional<torch::stable::Tensor>& lengths, bool exclude_degenerate, int64_t pass_at_k);

int64_t cpu_isa();
int64_t cpu_matrix_isa();

// For the shapes and meanings of the arguments see grpo_fast/ops.
std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor> token_logprobs_cpu(
    const torch::stable::Tensor& logits, const torch::stable::Tensor& token_ids, const torch::stable::Tensor& mask,
    const std::optional<torch::stable::Tensor>& temperatures, double temperature, double softcap, double logit_scale);

torch::stable::Tensor token_logprobs_backward_cpu(const torch::stable::Tensor& grad_logprobs, const torch::stable::Tensor& grad_entropy,
                                                  const torch::stable::Tensor& logits, const torch::stable::Tensor& token_ids,
                                                  const torch::stable::Tensor& mask,
                                                  const std::optional<torch::stable::Tensor>& temperatures, double temperature,
                                                  double softcap, double logit_scale, const torch::stable::Tensor& logprobs,
                                                  const torch::stable::Tensor& entropy, const torch::stable::Tensor& lse);

void token_logprobs_backward_inplace_cpu(const torch::stable::Tensor& grad_logprobs, const torch::stable::Tensor& grad_entropy,
                                         torch::stable::Tensor logits, const torch::stable::Tensor& token_ids,
                                         const torch::stable::Tensor& mask, const std::optional<torch::stable::Tensor>& temperatures,
                                         double temperature, double softcap, double logit_scale, const torch::stable::Tensor& logprobs,
                                         const torch::stable::Tensor& entropy, const torch::stable::Tensor& lse, bool bfloat16_gradient);

std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor> grpo_loss_cpu(
    const torch::stable::Tensor& logits, const torch::stable::Tensor& token_ids, const torch::stable::Tensor& mask,
    const torch::stable::Tensor& advantages, const torch::stable::Tensor& weights,
    const std::optional<torch::stable::Tensor>& entropy_weights, const std::optional<torch::stable::Tensor>& old_logprobs,
    const std::optional<torch::stable::Tensor>& ref_logprobs, const std::optional<torch::stable::Tensor>& rollout_weights,
    const std::optional<torch::stable::Tensor>& temperatures, double temperature, double softcap, double logit_scale, double loss_scale,
    std::vector<double> settings, bool only_active, bool want_gradient);

std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor> grpo_loss_inplace_cpu(
    torch::stable::Tensor logits, const torch::stable::Tensor& token_ids, const torch::stable::Tensor& mask,
    const torch::stable::Tensor& advantages, const torch::stable::Tensor& weights,
    const std::optional<torch::stable::Tensor>& entropy_weights, const std::optional<torch::stable::Tensor>& old_logprobs,
    const std::optional<torch::stable::Tensor>& ref_logprobs, const std::optional<torch::stable::Tensor>& rollout_weights,
    const std::optional<torch::stable::Tensor>& temperatures, double temperature, double softcap, double logit_scale, double loss_scale,
    std::vector<double> settings, bool only_active, bool bfloat16_gradient);

torch::stable::Tensor kept_logits_cpu(const torch::stable::Tensor& hidden, const torch::stable::Tensor& weight,
                                      const torch::stable::Tensor& columns);

torch::stable::Tensor kept_hidden_gradient_cpu(const torch::stable::Tensor& gradient, const torch::stable::Tensor& weight,
                                               const torch::stable::Tensor& columns);

void add_kept_weight_gradient_cpu(torch::stable::Tensor into, const torch::stable::Tensor& gradient, const torch::stable::Tensor& hidden,
                                  const torch::stable::Tensor& columns);

void product_cpu(torch::stable::Tensor out, const torch::stable::Tensor& a, const torch::stable::Tensor& b,
                 const std::optional<torch::stable::Tensor>& bias, bool accumulate);

// Asks the system for huge pages in this tensor's memory, where it offers them.
void use_huge_pages_cpu(torch::stable::Tensor x);
