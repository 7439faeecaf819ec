// See kept_products.h. Plain loops that the compiler vectorises.
//
// The rows of the weight come from memory in no order, so several are read at once: their loads are under way together.
#pragma once
#include "float_types.h"
#include "kept_products.h"

namespace grpo_fast {
namespace {  // internal linkage: each instruction set keeps its own copy

constexpr int64_t kLanes = 32;  // partial sums of a product: two vectors of AVX-512
constexpr int64_t kRowsAtOnce = 4;

// Sums of a fixed shape: lane l adds the elements l, l + kLanes, ..., then the lanes are added in pairs.
template <typename T, int64_t kRows>
GF_INLINE void products(const float* hidden, const T* const* rows, int64_t size, float* out) {
  float sums[kRows][kLanes] = {};
  int64_t j = 0;
  for (; j + kLanes <= size; j += kLanes)
    for (int64_t r = 0; r < kRows; r++)
#pragma omp simd
      for (int64_t l = 0; l < kLanes; l++) sums[r][l] += hidden[j + l] * to_float(rows[r][j + l]);
  for (int64_t l = 0; j + l < size; l++)
    for (int64_t r = 0; r < kRows; r++) sums[r][l] += hidden[j + l] * to_float(rows[r][j + l]);
  for (int64_t r = 0; r < kRows; r++) {
    for (int64_t width = kLanes / 2; width > 0; width /= 2)
      for (int64_t l = 0; l < width; l++) sums[r][l] += sums[r][l + width];
    out[r] = sums[r][0];
  }
}

template <typename T>
void kept_logits(const float* hidden, const void* weight, int64_t weight_stride, int64_t size, const int64_t* columns, int64_t count,
                 float* out) {
  const T* typed = static_cast<const T*>(weight);
  const T* rows[kRowsAtOnce];
  float found[kRowsAtOnce];
  int64_t places[kRowsAtOnce], waiting = 0;
  for (int64_t k = 0; k < count; k++) {
    out[k] = 0;
    if (columns[k] < 0) continue;
    rows[waiting] = typed + columns[k] * weight_stride;
    places[waiting++] = k;
    if (waiting < kRowsAtOnce) continue;
    products<T, kRowsAtOnce>(hidden, rows, size, found);
    for (int64_t r = 0; r < kRowsAtOnce; r++) out[places[r]] = found[r];
    waiting = 0;
  }
  for (int64_t r = 0; r < waiting; r++) products<T, 1>(hidden, rows + r, size, out + places[r]);
}

template <typename T, int64_t kRows>
GF_INLINE void add_scaled(const float* g, const T* const* rows, int64_t size, float* out) {
#pragma omp simd
  for (int64_t j = 0; j < size; j++) {
    float sum = out[j];
    for (int64_t r = 0; r < kRows; r++) sum += g[r] * to_float(rows[r][j]);
    out[j] = sum;
  }
}

template <typename T>
void add_kept_rows(const float* g, const void* weight, int64_t weight_stride, int64_t size, const int64_t* columns, int64_t count,
                   float* out) {
  const T* typed = static_cast<const T*>(weight);
  const T* rows[kRowsAtOnce];
  float factors[kRowsAtOnce];
  int64_t waiting = 0;
  for (int64_t k = 0; k < count; k++) {
    if (columns[k] < 0) continue;
    rows[waiting] = typed + columns[k] * weight_stride;
    factors[waiting++] = g[k];
    if (waiting < kRowsAtOnce) continue;
    add_scaled<T, kRowsAtOnce>(factors, rows, size, out);
    waiting = 0;
  }
  for (int64_t r = 0; r < waiting; r++) add_scaled<T, 1>(factors + r, rows + r, size, out);
}

template <typename T>
void row_to_float(const void* row, int64_t size, float* out) {
  const T* typed = static_cast<const T*>(row);
#pragma omp simd
  for (int64_t j = 0; j < size; j++) out[j] = to_float(typed[j]);
}

}  // namespace
}  // namespace grpo_fast

#define GF_DEFINE_KEPT_PRODUCTS(table)                                       \
  namespace grpo_fast {                                                      \
  extern const KeptProducts table[3];                                        \
  const KeptProducts table[3] = {                                            \
      {&kept_logits<float>, &add_kept_rows<float>, &row_to_float<float>},    \
      {&kept_logits<BFloat>, &add_kept_rows<BFloat>, &row_to_float<BFloat>}, \
      {&kept_logits<Half>, &add_kept_rows<Half>, &row_to_float<Half>},       \
  };                                                                         \
  }
