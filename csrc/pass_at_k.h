// Advantages for pass@k, the chance that the best of k completions solves the prompt: "Pass@k Training", arXiv:2508.10751,
// in its analytical form.
//
// A set of k of the group's n completions has the reward of its best one. Over all sets of k, with F(c) = C(c, k) / C(n, k) and
// F1(c) = C(c - 1, k - 1) / C(n - 1, k - 1), and c(x), b(x) = how many rewards of the group are at most x, and below x:
//
//   mean, variance   of the best reward: it is x with probability F(c(x)) - F(b(x))
//   best_i           its mean over the sets with completion i: x_i with probability F1(c(x_i)), any x > x_i with F1(c(x)) - F1(b(x))
//   A_i              (best_i - mean) / (std + eps), or best_i - mean without the scale
//
// The paper has it for rewards of 0 and 1. Equal rewards share their probability equally, so that their advantages
// have the same bits. All differences are taken from the highest reward: where fewer than k rewards are below it, every set has it, and
// every difference is exactly 0. The time grows with the square of the group's size.
#pragma once
#include <cmath>
#include <cstdint>

namespace grpo_fast {

// A difference that is smaller than this, relative to the terms it is made of, is what their roundings leave of 0.
constexpr double kCancelled = 0x1p-36;

// C(c - first, k - first) / C(n - first, k - first), for whole c <= n.
GF_HOST_DEVICE double share_of_sets(double c, double n, int64_t k, int64_t first) {
  if (c < static_cast<double>(k)) return 0;
  double share = 1;
  for (int64_t t = first; t < k; ++t) share *= (c - static_cast<double>(t)) / (n - static_cast<double>(t));
  return share;
}

// How many of the values are below x, and at most x. A comparison with NaN, a completion without a reward, is false.
struct Rank {
  double below = 0, at_most = 0;
  GF_HOST_DEVICE Rank(const double* values, int64_t begin, int64_t end, double x) {
    for (int64_t row = begin; row < end; ++row) {
      below += values[row] < x ? 1 : 0;
      at_most += values[row] <= x ? 1 : 0;
    }
  }
};

// Writes the advantages of the rows [begin, end), whose rewards are in `values`, by write(row, advantage), and returns whether all of them
// are exactly 0. n: how many rewards are not NaN. probability, probability_with: scratch, one number for each row.
template <typename Team, typename Write>
GF_HOST_DEVICE bool pass_at_k_advantages(const Team& team, const double* values, double* probability, double* probability_with,
                                         int64_t begin, int64_t end, double n, int64_t k, bool by_std, double eps, const Write& write) {
  double highest = -INFINITY;
  for (int64_t row = begin + team.rank(); row < end; row += team.size()) highest = values[row] > highest ? values[row] : highest;
  highest = team.max(highest);
  double lower = 0;
  for (int64_t row = begin + team.rank(); row < end; row += team.size()) lower += values[row] < highest ? 1 : 0;
  lower = team.sum(lower);
  if (lower < static_cast<double>(k)) {  // every set of k has the highest reward, or the group has no set of k
    for (int64_t row = begin + team.rank(); row < end; row += team.size()) write(row, 0.0);
    return true;
  }

  double mean = 0;  // of the best reward, from the highest
  for (int64_t row = begin + team.rank(); row < end; row += team.size()) {
    const double x = values[row];
    if (x != x) continue;
    const Rank rank(values, begin, end, x);
    const double ties = rank.at_most - rank.below;
    probability[row] = (share_of_sets(rank.at_most, n, k, 0) - share_of_sets(rank.below, n, k, 0)) / ties;
    probability_with[row] = (share_of_sets(rank.at_most, n, k, 1) - share_of_sets(rank.below, n, k, 1)) / ties;
    mean += probability[row] * (x - highest);
  }
  mean = team.sum(mean);
  double variance = 0;
  for (int64_t row = begin + team.rank(); row < end; row += team.size()) {
    const double d = values[row] - highest - mean;
    if (d == d) variance += probability[row] * d * d;
  }
  variance = team.sum(variance);
  const double spread = std::sqrt(variance), divisor = by_std ? spread + eps : 1.0;
  const double gain = divisor == 0 ? 0 : 1 / divisor;
  team.sync();  // the other threads' probabilities are written
  for (int64_t row = begin + team.rank(); row < end; row += team.size()) {
    const double x = values[row];
    if (x != x) {
      write(row, 0.0);
      continue;
    }
    double best = (x - highest - mean) * share_of_sets(Rank(values, begin, end, x).at_most, n, k, 1);
    for (int64_t other = begin; other < end; ++other) {
      if (values[other] > x) best += (values[other] - highest - mean) * probability_with[other];
    }
    write(row, std::fabs(best) <= kCancelled * spread ? 0.0 : best * gain);
  }
  return false;
}

}  // namespace grpo_fast
