// One vocabulary row on the CPU: its statistics, and its gradient from g and h. Independent of the loss. The same source (rows_impl.h) is
// compiled once per instruction set; rows() returns the kernels for the best one that this machine supports.
#pragma once
#include <cstdint>

namespace grpo_fast {

enum class RowType { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// s_v = f(z_v) / temperature, f(z) = logit_scale * z, then softcap * tanh(. / softcap) if softcap > 0
struct RowTransform {
  double temperature, logit_scale, softcap;
};

// In nats of the scaled logits s.
struct RowStatistics {
  double logprob;  // of the target, accurate also for a probability near 1
  double entropy;
  double lse;        // log sum exp over the whole row, target included
  double pivot;      // a reference near the largest logit, in the units of f(z), so that the argument of exp is small and accurate
  double log_pivot;  // log-probability of a column with f(z) = pivot: pivot / temperature - lse, without the cancellation
};

// The target is not a column of this row: it is in the vocabulary shard of another process, or out of range, and then lse is NaN.
constexpr int64_t kNoTarget = -1;

struct RowKernels {
  RowStatistics (*statistics)(const void* row, int64_t vocabulary, int64_t target, const RowTransform& transform);
  // d loss / d z for the whole row; gradient may be the row itself, target may be kNoTarget.
  void (*gradient)(const void* row, void* gradient, int64_t vocabulary, int64_t target, const RowTransform& transform,
                   const RowStatistics& statistics, double g, double h);
  // The same rounded to bfloat16, where the row is float32; gradient may be the beginning of the row's memory.
  void (*gradient_bfloat16)(const void* row, void* gradient, int64_t vocabulary, int64_t target, const RowTransform& transform,
                            const RowStatistics& statistics, double g, double h);
};

const RowKernels& rows(RowType type);
int64_t instruction_set();         // 0 portable, 1 AVX2, 2 AVX-512; the environment variable GRPO_FAST_ISA lowers it
int64_t matrix_instruction_set();  // also 3 AMX, for products of bfloat16; lowered likewise

// One table per instruction set, indexed by RowType.
extern const RowKernels kRowsPortable[3], kRowsAvx2[3], kRowsAvx512[3];

}  // namespace grpo_fast
