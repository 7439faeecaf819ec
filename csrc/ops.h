// The operators' C++ entry points, one per operator and device; registered in ops.cpp.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor> group_advantages_cpu(
    const torch::stable::Tensor& rewards, const std::optional<torch::stable::Tensor>& group_offsets, int64_t group_size,
    const std::optional<torch::stable::Tensor>& reward_weights, int64_t scale, bool leave_one_out, bool normalize_then_sum, double eps);
