// The settings of the loss as the operators pass them: numbers in the order of loss_settings() in grpo_fast/loss/kernel_settings.py.
#pragma once
#include <torch/headeronly/util/Exception.h>

#include <vector>

#include "policy_loss.h"

namespace grpo_fast {

inline PolicyLossConfig config_of(const std::vector<double>& settings) {
  STD_TORCH_CHECK(settings.size() == 12, "grpo_loss: 12 settings expected, got ", settings.size());
  const double* s = settings.data();
  return {Surrogate(static_cast<int64_t>(s[0])),
          KlEstimator(static_cast<int64_t>(s[1])),
          s[2] != 0,
          s[3],
          s[4],
          s[5],
          s[6],
          s[7],
          s[8],
          s[9],
          s[10],
          s[11]};
}

}  // namespace grpo_fast
