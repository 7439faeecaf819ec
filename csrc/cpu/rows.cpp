#include "rows.h"

#include <algorithm>
#include <cstdlib>

#include "../ops.h"
#include "product.h"

#if defined(GF_HAS_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace grpo_fast {

namespace {

#if defined(GF_HAS_AMX)
bool may_use_amx() {  // the system saves the tile registers of a process only if it asks
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

int64_t detect() {
  int64_t best = 0, limit = 3;
  if (const char* wanted = std::getenv("GRPO_FAST_ISA")) {
    const int64_t number = std::strtol(wanted, nullptr, 10);
    if (number >= 0) limit = std::min(number, limit);
  }
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) best = 1;
  if (best == 1 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    best = 2;
#endif
#if defined(GF_HAS_AMX)
  if (best == 2 && limit >= 3 && may_use_amx()) best = 3;
#endif
  return std::min(best, limit);
}
}  // namespace

int64_t matrix_instruction_set() {
  static const int64_t value = detect();
  return value;
}

int64_t instruction_set() { return std::min<int64_t>(matrix_instruction_set(), 2); }

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
int64_t cpu_matrix_isa() { return grpo_fast::matrix_instruction_set(); }
