// The settings of the loss as the operators pass them: the numbers that loss_settings() in grpo_fast/loss/kernel_settings.py returns.
#pragma once
#include <torch/headeronly/util/Exception.h>

#include <vector>

#include "policy_loss.h"

namespace grpo_fast {

inline PolicyLossConfig checked_config(const std::vector<double>& settings) {
  STD_TORCH_CHECK(static_cast<int64_t>(settings.size()) == kLossSettings, "grpo_loss: ", settings.size(), " settings given, expected ",
                  kLossSettings, ". The extension was built from other sources than the Python package. Fix: build it again.");
  return to_policy_loss_config(settings.data());
}

}  // namespace grpo_fast
