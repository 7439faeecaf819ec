#include "rows.h"

#include <cstdlib>

#include "../ops.h"

namespace grpo_fast {

namespace {
int64_t detect() {
  int64_t best = 0;
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) best = 1;
  if (best == 1 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    best = 2;
#endif
  if (const char* wanted = std::getenv("GRPO_FAST_ISA")) {
    const int64_t limit = std::strtol(wanted, nullptr, 10);
    if (limit >= 0 && limit < best) best = limit;
  }
  return best;
}
}  // namespace

int64_t instruction_set() {
  static const int64_t value = detect();
  return value;
}

const RowKernels& rows(RowType type) {
  const int index = static_cast<int>(type);
#if defined(__x86_64__) && defined(__GNUC__)
  if (instruction_set() == 2) return kRowsAvx512[index];
  if (instruction_set() == 1) return kRowsAvx2[index];
#endif
  return kRowsPortable[index];
}

}  // namespace grpo_fast

int64_t cpu_isa() { return grpo_fast::instruction_set(); }
