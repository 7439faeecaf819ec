// Group-relative advantages: the formula, the accumulation type and the argument checks that the CPU and CUDA kernels share.
//
//   x_i = sum_k w_k r_ik   over the rewards that apply to completion i (r_ik is not NaN); NaN, "unscorable", where none applies
//   y_i = (x_i - mean_g) * gain_g                                sum then normalise
//   y_i = sum_k w_k (r_ik - mean_gk) * gain_gk                   normalise then sum (GDPO, arXiv:2601.05242)
//   A_i = y_i, or y_i / (std of the batch + eps) where the scale is the batch's; exactly 0 for an unscorable completion
//   A_i = (y_i - mean over the batch's tokens) / (their std + eps), where the scale is that of the tokens (REINFORCE++, arXiv:2501.03262)
//
// gain is 1, 1/(std + eps), or 1/(mean + eps) (MaxRL, arXiv:2602.02710), times n/(n-1) for the leave-one-out baseline: x_i - mean of the
// n-1 others = (x_i - mean) * n/(n-1). pass_at_k.h has another y_i.
// Computation is in double, in two passes (mean, then centred squares): E[x^2] - E[x]^2 loses all digits for rewards such as 1000.0 to
// 1000.3. Equal rewards are detected (lowest == highest) and give exactly 0, whatever the rounding of their mean.
//
// The functions are templates over a team of threads that share one group, so that the warps of a GPU and the single thread of a CPU run
// the same source. A team has rank(), size(), and sum(x), min(x), max(x), which return the same bits to every member, on every run.
#pragma once
#include <cmath>
#include <cstdint>

#ifndef GF_HOST_DEVICE
#ifdef __CUDACC__
#define GF_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define GF_HOST_DEVICE inline
#endif
#endif

#include "pass_at_k.h"

namespace grpo_fast {

// What a centred reward is divided by, numbered as in grpo_fast/loss/advantages.py: nothing, the standard deviation of the group or of the
// batch, the mean of the group, or the standard deviation over the tokens of the batch. GDPO divides by the group's, then by the batch's.
constexpr int64_t kScaleNone = 0, kScaleGroup = 1, kScaleBatch = 2, kScaleMean = 3, kScaleTokens = 4;

// In place of a y of 0 that the mean over the tokens is not subtracted from. No finite reward has this y.
constexpr double kExactlyZero = -INFINITY;

// The arguments of one call, passed to the GPU by value.
struct GroupAdvantagesArgs {
  const void* rewards;            // [B, R] float32 or float64
  const void* group_offsets;      // [G+1] int32 or int64; null: equal groups of group_size
  const double* reward_weights;   // [R]; null: all 1
  float* advantages;              // [B] out
  float* mean;                    // [G] out: of x
  float* std;                     // [G] out: of x, unbiased
  bool* degenerate;               // [G] out: all advantages of the group are 0
  const double* lengths;          // [B], the tokens of each completion, for the scale of the tokens; else null
  double* y;                      // [B] between the stages; null unless the batch's std is needed
  double* batch_moments;          // [3, G] between the stages: count, mean and centred squares of each group; null likewise
  double* sets;                   // [3, B], scratch for pass@k: the rewards and two probabilities; else null
  int64_t num_rows, num_rewards;  // B, R
  int64_t num_groups, group_size;
  int64_t scale;
  int64_t pass_at_k;  // 0: off
  double eps;
  bool rewards_are_double, offsets_are_int64, leave_one_out, normalize_then_sum;
  bool exclude_degenerate;  // from the statistics of the batch

  GF_HOST_DEVICE double reward(int64_t row, int64_t k) const {
    const int64_t i = row * num_rewards + k;
    return rewards_are_double ? static_cast<const double*>(rewards)[i] : static_cast<const float*>(rewards)[i];
  }
  GF_HOST_DEVICE double weight(int64_t k) const { return reward_weights ? reward_weights[k] : 1.0; }
  GF_HOST_DEVICE int64_t offset(int64_t g) const {
    if (!group_offsets) return g * group_size;
    return offsets_are_int64 ? static_cast<const int64_t*>(group_offsets)[g] : static_cast<const int32_t*>(group_offsets)[g];
  }
  GF_HOST_DEVICE bool uses_batch() const { return y != nullptr; }
  GF_HOST_DEVICE void write(int64_t row, double value) const {
    if (uses_batch())
      y[row] = value;
    else
      advantages[row] = static_cast<float>(value);
  }
};

// The values that moments() reduces: one reward of a row, or the weighted sum of all of them.
struct OneReward {
  const GroupAdvantagesArgs& args;
  int64_t k;
  GF_HOST_DEVICE double operator()(int64_t row) const { return args.reward(row, k); }
};

struct CombinedReward {
  const GroupAdvantagesArgs& args;
  GF_HOST_DEVICE double operator()(int64_t row) const {
    double sum = 0;
    bool applies = false;
    for (int64_t k = 0; k < args.num_rewards; ++k) {
      const double r = args.reward(row, k);
      if (r != r) continue;
      sum += args.weight(k) * r;
      applies = true;
    }
    return applies ? sum : NAN;
  }
};

struct Moments {
  double count = 0, mean = 0, centred_squares = 0;  // over the values that apply
  bool equal = true;                                // all equal, or fewer than two

  GF_HOST_DEVICE double std() const { return equal ? 0.0 : std::sqrt(centred_squares / (count - 1)); }
  GF_HOST_DEVICE double gain(bool leave_one_out, int64_t scale, double eps) const {
    if (equal) return 0;  // exactly 0, also if contraction of a * b + c makes equal weighted sums differ
    const double factor = leave_one_out ? count / (count - 1) : 1.0;
    if (scale == kScaleMean) return mean + eps > 0 ? factor / (mean + eps) : NAN;  // a mean below 0 would turn the signs around
    const double divisor = scale == kScaleGroup ? std() + eps : 1.0;
    return divisor == 0 ? 0 : factor / divisor;  // 0 only if the squares underflowed and eps is 0
  }
};

template <typename Team, typename Values>
GF_HOST_DEVICE Moments moments(const Team& team, int64_t begin, int64_t end, const Values& values) {
  Moments m;
  double count = 0, total = 0, lowest = INFINITY, highest = -INFINITY;
  for (int64_t row = begin + team.rank(); row < end; row += team.size()) {
    const double x = values(row);
    if (x != x) continue;
    count += 1;
    total += x;
    lowest = x < lowest ? x : lowest;
    highest = x > highest ? x : highest;
  }
  m.count = team.sum(count);
  lowest = team.min(lowest);
  highest = team.max(highest);
  m.equal = m.count < 2 || lowest == highest;
  if (m.equal) {
    m.mean = m.count > 0 ? lowest : 0.0;  // total / count may differ from it by a rounding
    return m;
  }
  m.mean = team.sum(total) / m.count;
  double squares = 0;
  for (int64_t row = begin + team.rank(); row < end; row += team.size()) {
    const double d = values(row) - m.mean;
    if (d == d) squares += d * d;
  }
  m.centred_squares = team.sum(squares);
  return m;
}

// First stage, for one group: writes its statistics and its rows of y or of the advantages.
template <typename Team>
GF_HOST_DEVICE void normalize_group(const Team& team, const GroupAdvantagesArgs& args, int64_t g) {
  // The host does not read offsets on a GPU, so wrong offsets must not read out of bounds or leave an output unwritten.
  const int64_t raw_begin = args.offset(g), raw_end = args.offset(g + 1), num_rows = args.num_rows;
  const int64_t begin = raw_begin < 0 ? 0 : raw_begin > num_rows ? num_rows : raw_begin;
  const int64_t end = raw_end < begin ? begin : raw_end > num_rows ? num_rows : raw_end;
  const bool valid = begin == raw_begin && end == raw_end;
  if (g == 0)
    for (int64_t row = team.rank(); row < begin; row += team.size()) args.write(row, NAN);
  if (g == args.num_groups - 1)
    for (int64_t row = end + team.rank(); row < num_rows; row += team.size()) args.write(row, NAN);

  const CombinedReward combined{args};
  const Moments m = moments(team, begin, end, combined);
  bool degenerate = m.equal;
  double batch_count_term = m.count, batch_mean_term = m.mean, batch_squares_term = m.centred_squares;

  if (args.pass_at_k > 0) {
    double* values = args.sets;
    for (int64_t row = begin + team.rank(); row < end; row += team.size()) values[row] = combined(row);
    team.sync();
    degenerate = pass_at_k_advantages(team, values, values + num_rows, values + 2 * num_rows, begin, end, m.count, args.pass_at_k,
                                      args.scale == kScaleGroup, args.eps, [&](int64_t row, double y) { args.write(row, y); });
  } else if (args.scale == kScaleTokens) {
    const double gain = m.gain(args.leave_one_out, args.scale, args.eps);
    const bool excluded = degenerate && args.exclude_degenerate;
    double tokens = 0, total = 0;
    for (int64_t row = begin + team.rank(); row < end; row += team.size()) {  // the same thread handles y[row] in both loops
      const double x = combined(row);
      args.y[row] = x != x || excluded ? kExactlyZero : (x - m.mean) * gain;
      if (args.y[row] == kExactlyZero) continue;
      tokens += args.lengths[row];
      total += args.lengths[row] * args.y[row];
    }
    batch_count_term = team.sum(tokens);
    total = team.sum(total);
    batch_mean_term = batch_count_term > 0 ? total / batch_count_term : 0.0;
    double squares = 0;
    for (int64_t row = begin + team.rank(); row < end; row += team.size()) {
      if (args.y[row] == kExactlyZero) continue;
      const double d = args.y[row] - batch_mean_term;
      squares += args.lengths[row] * d * d;
    }
    batch_squares_term = team.sum(squares);
  } else if (!args.normalize_then_sum) {
    const double gain = m.gain(args.leave_one_out, args.scale, args.eps);
    for (int64_t row = begin + team.rank(); row < end; row += team.size()) {
      const double x = combined(row);
      args.write(row, x != x ? 0.0 : (x - m.mean) * gain);
    }
  } else {
    degenerate = true;
    double size = 0;  // of a row's terms, typically
    for (int64_t k = 0; k < args.num_rewards; ++k) {
      const OneReward reward{args, k};
      const double weight = args.weight(k);
      const Moments mk = moments(team, begin, end, reward);
      const double gain = mk.gain(args.leave_one_out, kScaleGroup, args.eps) * weight;
      if (!mk.equal && weight != 0) degenerate = false;
      size += mk.std() * std::fabs(gain);
      for (int64_t row = begin + team.rank(); row < end; row += team.size()) {  // the same thread handles y[row] for every k
        const double r = reward(row);
        args.y[row] = (k == 0 ? 0.0 : args.y[row]) + (r != r ? 0.0 : (r - mk.mean) * gain);
      }
    }
    double squares = 0;
    for (int64_t row = begin + team.rank(); row < end; row += team.size()) {
      // Rewards that cancel. The division by the batch's std, which is as small where all of them cancel, would make advantages of it.
      if (std::fabs(args.y[row]) <= kCancelled * size) args.y[row] = 0;
      squares += args.y[row] * args.y[row];
    }
    // The y of each reward add up to 0 in every group, so the mean of the batch is 0. Subtracting its rounding error would change the exact
    // 0 of a degenerate group.
    batch_mean_term = 0;
    batch_squares_term = team.sum(squares);
  }

  if (team.rank() != 0) return;
  args.mean[g] = valid ? static_cast<float>(m.mean) : NAN;
  args.std[g] = valid ? static_cast<float>(m.std()) : NAN;
  args.degenerate[g] = degenerate;
  if (args.uses_batch()) {
    const bool excluded = degenerate && args.exclude_degenerate;
    args.batch_moments[g] = excluded ? 0.0 : batch_count_term;
    args.batch_moments[args.num_groups + g] = excluded ? 0.0 : batch_mean_term;
    args.batch_moments[2 * args.num_groups + g] = excluded ? 0.0 : batch_squares_term;
  }
}

// A_i = (y_i - shift) * gain
struct BatchScale {
  double shift, gain;
};

// Second stage, for the scales of the batch: 1/(std + eps) over all scorable rows or tokens, and the mean over the tokens, from the moments
// of the groups.
template <typename Team>
GF_HOST_DEVICE BatchScale batch_scale(const Team& team, const GroupAdvantagesArgs& args) {
  const double *counts = args.batch_moments, *means = counts + args.num_groups, *squares = means + args.num_groups;
  double count = 0, total = 0;
  for (int64_t g = team.rank(); g < args.num_groups; g += team.size()) {
    count += counts[g];
    total += counts[g] * means[g];
  }
  count = team.sum(count);
  if (count < 2) return {0, 0};
  const double mean = team.sum(total) / count;
  double centred_squares = 0;
  for (int64_t g = team.rank(); g < args.num_groups; g += team.size()) {
    centred_squares += squares[g] + counts[g] * (means[g] - mean) * (means[g] - mean);
  }
  const double divisor = std::sqrt(team.sum(centred_squares) / (count - 1)) + args.eps;
  return {args.scale == kScaleTokens ? mean : 0, divisor == 0 ? 0 : 1 / divisor};
}

GF_HOST_DEVICE void scale_row(const GroupAdvantagesArgs& args, int64_t row, const BatchScale& batch) {
  const double y = args.y[row];
  args.advantages[row] = static_cast<float>(args.scale == kScaleTokens && y == kExactlyZero ? 0.0 : (y - batch.shift) * batch.gain);
}

}  // namespace grpo_fast

#ifndef __CUDACC__  // The host part, from tensors to tensors. nvcc does not compile torch headers.
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <tuple>

namespace grpo_fast {

using GroupAdvantagesOutput = std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor>;

// Checks the arguments, allocates the outputs on the rewards' device, and calls run(args), which fills them. grpo_fast/loss/advantages.py
// checks them before; these checks are for direct calls of the operator.
template <typename Run>
GroupAdvantagesOutput with_group_advantages_args(const torch::stable::Tensor& rewards,
                                                 const std::optional<torch::stable::Tensor>& group_offsets, int64_t group_size,
                                                 const std::optional<torch::stable::Tensor>& reward_weights, int64_t scale,
                                                 bool leave_one_out, bool normalize_then_sum, double eps,
                                                 const std::optional<torch::stable::Tensor>& lengths, bool exclude_degenerate,
                                                 int64_t pass_at_k, const Run& run) {
  using torch::headeronly::ScalarType;
  using torch::stable::new_empty;
  using torch::stable::Tensor;
  constexpr const char* kOp = "grpo_fast::group_advantages: ";
  const ScalarType rewards_type = rewards.scalar_type();
  STD_TORCH_CHECK(rewards_type == ScalarType::Float || rewards_type == ScalarType::Double, kOp, "rewards must be float32 or float64");
  STD_TORCH_CHECK(rewards.dim() == 1 || rewards.dim() == 2, kOp, "rewards must be [B] or [B, R], got ", rewards.dim(), " dimensions");
  STD_TORCH_CHECK(rewards.is_contiguous(), kOp, "rewards must be contiguous");
  STD_TORCH_CHECK(scale >= kScaleNone && scale <= kScaleTokens, kOp,
                  "scale must be 0 (none), 1 (group), 2 (batch), 3 (mean) or 4 (tokens), got ", scale);
  STD_TORCH_CHECK(!normalize_then_sum || scale == kScaleGroup, kOp, "normalize_then_sum needs the scale 1 (group), got ", scale);
  STD_TORCH_CHECK(pass_at_k >= 0, kOp, "pass_at_k must be >= 0, got ", pass_at_k);
  STD_TORCH_CHECK(pass_at_k == 0 || (scale <= kScaleGroup && !leave_one_out && !normalize_then_sum), kOp,
                  "pass_at_k needs the scale 0 (none) or 1 (group), the mean as baseline, and no normalize_then_sum");
  STD_TORCH_CHECK(eps >= 0, kOp, "eps must be >= 0, got ", eps);

  GroupAdvantagesArgs args{};
  args.num_rows = rewards.size(0);
  args.num_rewards = rewards.dim() == 2 ? rewards.size(1) : 1;
  args.rewards = rewards.const_data_ptr();
  args.rewards_are_double = rewards_type == ScalarType::Double;
  STD_TORCH_CHECK(args.num_rewards > 0, kOp, "rewards must have at least one column");

  if (group_offsets.has_value()) {
    const ScalarType offsets_type = group_offsets->scalar_type();
    STD_TORCH_CHECK(offsets_type == ScalarType::Int || offsets_type == ScalarType::Long, kOp, "group_offsets must be int32 or int64");
    STD_TORCH_CHECK(group_offsets->dim() == 1 && group_offsets->numel() > 0 && group_offsets->is_contiguous(), kOp,
                    "group_offsets must be contiguous and [G+1]");
    STD_TORCH_CHECK(group_offsets->is_cpu() == rewards.is_cpu() && group_offsets->get_device_index() == rewards.get_device_index(), kOp,
                    "group_offsets must be on the rewards' device");
    args.group_offsets = group_offsets->const_data_ptr();
    args.offsets_are_int64 = offsets_type == ScalarType::Long;
    args.num_groups = group_offsets->numel() - 1;
    STD_TORCH_CHECK(args.num_groups > 0 || args.num_rows == 0, kOp, "group_offsets has no group, but rewards has ", args.num_rows, " rows");
  } else {
    STD_TORCH_CHECK(group_size > 0 && args.num_rows % group_size == 0, kOp, "rewards has ", args.num_rows,
                    " rows, not a multiple of group_size = ", group_size);
    args.group_size = group_size;
    args.num_groups = args.num_rows / group_size;
  }
  if (reward_weights.has_value()) {
    STD_TORCH_CHECK(reward_weights->scalar_type() == ScalarType::Double && reward_weights->numel() == args.num_rewards &&
                        reward_weights->is_contiguous(),
                    kOp, "reward_weights must be contiguous float64 [R = ", args.num_rewards, "]");
    STD_TORCH_CHECK(reward_weights->is_cpu() == rewards.is_cpu() && reward_weights->get_device_index() == rewards.get_device_index(), kOp,
                    "reward_weights must be on the rewards' device");
    args.reward_weights = static_cast<const double*>(reward_weights->const_data_ptr());
  }
  STD_TORCH_CHECK(lengths.has_value() == (scale == kScaleTokens), kOp, "lengths belong to the scale 4 (tokens)");
  if (lengths.has_value()) {
    STD_TORCH_CHECK(lengths->scalar_type() == ScalarType::Double && lengths->numel() == args.num_rows && lengths->is_contiguous(), kOp,
                    "lengths must be contiguous float64 [B = ", args.num_rows, "]");
    STD_TORCH_CHECK(lengths->is_cpu() == rewards.is_cpu() && lengths->get_device_index() == rewards.get_device_index(), kOp,
                    "lengths must be on the rewards' device");
    args.lengths = static_cast<const double*>(lengths->const_data_ptr());
  }
  args.scale = scale;
  args.pass_at_k = pass_at_k;
  args.exclude_degenerate = exclude_degenerate;
  args.eps = eps;
  args.leave_one_out = leave_one_out;
  args.normalize_then_sum = normalize_then_sum;

  Tensor advantages = new_empty(rewards, {args.num_rows}, ScalarType::Float);
  Tensor mean = new_empty(rewards, {args.num_groups}, ScalarType::Float);
  Tensor std = new_empty(rewards, {args.num_groups}, ScalarType::Float);
  Tensor degenerate = new_empty(rewards, {args.num_groups}, ScalarType::Bool);
  args.advantages = static_cast<float*>(advantages.mutable_data_ptr());
  args.mean = static_cast<float*>(mean.mutable_data_ptr());
  args.std = static_cast<float*>(std.mutable_data_ptr());
  args.degenerate = static_cast<bool*>(degenerate.mutable_data_ptr());
  std::optional<Tensor> between_stages;
  if (pass_at_k > 0) {
    between_stages = new_empty(rewards, {3 * args.num_rows}, ScalarType::Double);
    args.sets = static_cast<double*>(between_stages->mutable_data_ptr());
  } else if (scale == kScaleBatch || scale == kScaleTokens || normalize_then_sum) {
    between_stages = new_empty(rewards, {args.num_rows + 3 * args.num_groups}, ScalarType::Double);
    args.y = static_cast<double*>(between_stages->mutable_data_ptr());
    args.batch_moments = args.y + args.num_rows;
  }
  if (args.num_groups > 0) run(args);
  return {advantages, mean, std, degenerate};
}

}  // namespace grpo_fast
#endif  // !__CUDACC__
