// Group-relative advantages on the CPU: parallel over groups, one thread per group, so that the result does not depend on the number of
// threads.
#include <algorithm>

#include "../group_advantages.h"
#include "../ops.h"

namespace {

struct OneThread {
  int64_t rank() const { return 0; }
  int64_t size() const { return 1; }
  double sum(double x) const { return x; }
  double min(double x) const { return x; }
  double max(double x) const { return x; }
  void sync() const {}
};

constexpr int64_t kRowsPerTask = 16384;  // below this a second thread costs more than it saves

void run(const grpo_fast::GroupAdvantagesArgs& args) {
  const int64_t groups_per_task = std::max<int64_t>(1, kRowsPerTask * args.num_groups / std::max<int64_t>(1, args.num_rows));
  torch::stable::parallel_for(0, args.num_groups, groups_per_task, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) normalize_group(OneThread(), args, g);
  });
  if (!args.uses_batch()) return;
  const grpo_fast::BatchScale batch = batch_scale(OneThread(), args);
  torch::stable::parallel_for(0, args.num_rows, kRowsPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) scale_row(args, row, batch);
  });
}

}  // namespace

grpo_fast::GroupAdvantagesOutput group_advantages_cpu(const torch::stable::Tensor& rewards,
                                                      const std::optional<torch::stable::Tensor>& group_offsets, int64_t group_size,
                                                      const std::optional<torch::stable::Tensor>& reward_weights, int64_t scale,
                                                      bool leave_one_out, bool normalize_then_sum, double eps,
                                                      const std::optional<torch::stable::Tensor>& lengths, bool exclude_degenerate,
                                                      int64_t pass_at_k) {
  return grpo_fast::with_group_advantages_args(rewards, group_offsets, group_size, reward_weights, scale, leave_one_out, normalize_then_sum,
                                               eps, lengths, exclude_degenerate, pass_at_k, run);
}
