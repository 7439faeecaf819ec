// The matrix products of an LM head at a few ids per token: the weight's rows are read where they stand, nothing is gathered into memory.
// Every sum is float32, in an order that depends on the token's own set only. The source (kept_products_impl.h) is compiled once per
// instruction set; kept_products() returns the kernels for the best one that this machine supports.
#pragma once
#include <cstdint>

#include "rows.h"

namespace grpo_fast {

struct KeptProducts {
  // out[k] = hidden . weight[columns[k]] for the columns >= 0, and 0 for the others.
  void (*logits)(const float* hidden, const void* weight, int64_t weight_stride, int64_t size, const int64_t* columns, int64_t count,
                 float* out);
  // out += sum over k of g[k] * weight[columns[k]], for the columns >= 0.
  void (*add_rows)(const float* g, const void* weight, int64_t weight_stride, int64_t size, const int64_t* columns, int64_t count,
                   float* out);
  // out[j] = row[j], in float32
  void (*to_float)(const void* row, int64_t size, float* out);
};

const KeptProducts& kept_products(RowType type);

// One table per instruction set, indexed by RowType.
extern const KeptProducts kKeptPortable[3], kKeptAvx2[3], kKeptAvx512[3];

}  // namespace grpo_fast
