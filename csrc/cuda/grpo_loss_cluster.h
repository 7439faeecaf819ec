// The arguments of the cluster kernel as plain pointers and strides, for the binding, the kernel, and the tests that run it on the host.
#pragma once
#include <cstdint>

#include "../policy_loss.h"

namespace grpo_fast {

enum class LogitType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

template <typename T>
struct TokenView {  // a [B, T] tensor, one that broadcasts to it, or none
  const T* data = nullptr;
  int64_t sequence_stride = 0, token_stride = 0;

  GF_HOST_DEVICE bool given() const { return data != nullptr; }
  GF_HOST_DEVICE T at(int64_t b, int64_t t, T otherwise = T()) const {
    return data ? data[b * sequence_stride + t * token_stride] : otherwise;
  }
};

struct TokenRecord {  // of one token; added in a fixed order at the end
  float loss, entropy, ratio, kl;
  uint32_t flags;
};
enum TokenFlag : uint32_t { kCounts = 1, kComputed = 2, kActive = 4, kClipLow = 8, kClipHigh = 16 };

// The positions of METRICS in grpo_fast/ops/grpo_loss.py.
enum TokenMetric { kKl, kEntropy, kRatioMean, kRatioMax, kClipLowShare, kClipHighShare, kClipRegion, kActiveFraction, kTokenMetrics };

struct ClusterLossArgs {
  const char* logits;  // [sequences, positions, vocabulary], contiguous over the vocabulary
  char* gradient;      // the same shape; the logits themselves if in place, or null if no gradient is wanted
  int64_t logits_strides[2], gradient_strides[2];
  int64_t sequences, positions, length, vocabulary;  // position `length`, if there is one, predicts no token
  LogitType type;

  TokenView<int64_t> token_ids;
  TokenView<bool> mask;
  TokenView<float> temperatures, advantages, weights, entropy_weights, old_logprobs, ref_logprobs, rollout_weights;

  // s * log2(e) = k * f(z), f(z) = z or tanh(cap_scale * z); ds/dz = slope * (1 - f^2). Temperatures divide k and slope.
  float k, cap_scale, slope;
  bool softcap;
  PolicyLossConfig config;
  double loss_scale;
  bool only_active, all_active;

  float *logprobs, *entropy, *loss, *metrics;  // [B, T], [B, T], one, kTokenMetrics
  TokenRecord* records;                        // scratch, [B * T]
  int32_t force_cluster, force_stages;         // 0: chosen by the row's length; otherwise for tests and tuning
};

}  // namespace grpo_fast

// Returns null, or a message that says why nothing was launched. `stream` is a cudaStream_t.
extern "C" const char* grpo_loss_cluster_launch(const grpo_fast::ClusterLossArgs* args, void* stream);
// Returns the bytes of the longest row that fits in a cluster of this device; 0, and the reason in `why`, if the kernel does not run there.
extern "C" int64_t grpo_loss_cluster_row_bytes(int32_t device, const char** why);
