// Matrix products with a float32 result, out += a @ b, of float32, bfloat16 and float16 operands with any strides.
//
// An element of the result is a fixed sequence of operations over k: the sums of blocks of k, of a fixed size and each in a fixed order,
// are added to the result one after the other. It depends on K and on the operands' types, and on nothing else: not on M or N, nor on the
// place of the element in a tile, nor on the number of threads, which divide M and N only. A sum that is continued by another call at a
// multiple of kSumBlock has the bits of one call.
#pragma once
#include <cstdint>
#include <utility>

#include "rows.h"

// Whether the compiler can make AMX code; whether this processor runs it is found at run time (rows.cpp).
#if defined(__x86_64__) && defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define GF_HAS_AMX
#endif

namespace grpo_fast {

struct ProductOperand {  // a: [M, K], b: [N, K]; strides in elements
  const char* data;
  int64_t outer_stride, k_stride;
  RowType type;
};

struct ProductCall {
  ProductOperand a, b;
  float* out;  // [M, N], its columns contiguous
  int64_t out_stride, k;
};

constexpr int64_t kSumBlock = 64;    // every kernel's block of k divides it; grpo_fast/ops/product.py states it
constexpr int64_t kPackUnits = 256;  // the most that is packed of a row at a time: float32 values, or pairs of bfloat16

// The tiles of the result have a multiple of these numbers of rows and columns, where it is large enough.
constexpr int64_t kTileRows = 32, kTileColumns = 96;

inline int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

// How many floats, aligned to 64 bytes, a kernel needs for the packed operands of a tile.
inline int64_t product_buffer_size(int64_t rows, int64_t columns) {
  return (round_up(rows, kTileRows) + round_up(columns, kTileColumns)) * kPackUnits;
}

// Adds a[m0:m1] @ b[n0:n1].T to out[m0:m1, n0:n1].
using ProductKernel = void (*)(const ProductCall& call, int64_t m0, int64_t m1, int64_t n0, int64_t n1, float* buffer);

// One kernel per instruction set; that of AMX is for operands that are both bfloat16.
extern const ProductKernel kProductPortable, kProductAvx2, kProductAvx512, kProductAmx;

}  // namespace grpo_fast
