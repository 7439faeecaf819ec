// Matrix products, out += a @ b, of float32, bfloat16 and float16 operands with any strides, summed in float32; the result is float32, or
// rounded once at the end.
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
  int64_t k;
};

constexpr int64_t kSumBlock = 64;    // every kernel's block of k divides it; grpo_fast/ops/product.py states it
constexpr int64_t kPackUnits = 256;  // the most that is packed of a row at a time: float32 values, or pairs of bfloat16

// The tiles of the result have a multiple of these numbers of rows and columns, where it is large enough.
constexpr int64_t kTileRows = 32, kTileColumns = 96;

inline int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

// How many floats, aligned to 64 bytes, hold so many rows or columns of an operand for kPackUnits, or packed for all of k.
inline int64_t block_size(int64_t outers, int64_t unit) { return round_up(outers, unit) * kPackUnits; }
inline int64_t packed_size(int64_t outers, int64_t unit, int64_t k) { return round_up(outers, unit) * round_up(k, kPackUnits); }

struct Tile {  // rows m0 ... m1 and columns n0 ... n1 of the result
  int64_t m0, m1, n0, n1;
};

// What a tile is computed from: operands that are packed for all of k, or null, and room for what is packed on the way. With `from_zero`
// the sums begin with 0, whatever stands in their memory.
struct Packed {
  const float *a, *b;
  float *room_a, *room_b;
  bool from_zero;
};

// Rows of a result in memory: `data` is the first element of a tile.
struct ProductOutput {
  char* data;
  int64_t stride;  // in elements; the columns are contiguous
  RowType type;
};

struct ProductKernel {
  // Packs rows m0 ... m1 of a, or rows n0 ... n1 of b, for all of k.
  void (*pack_a)(const ProductCall& call, int64_t m0, int64_t m1, float* to);
  void (*pack_b)(const ProductCall& call, int64_t n0, int64_t n1, float* to);
  // Adds a[m0:m1] @ b[n0:n1].T to `sums`, whose first element is that of the tile. `next`, or null, is the tile that follows: its operands
  // are fetched in advance.
  void (*add)(const ProductCall& call, const Tile& tile, const Packed& packed, float* sums, int64_t stride, const Tile* next);
  // Writes the sums of a tile, rounded to the type of `out`, past the caches: a result is larger than they are.
  void (*store)(const float* sums, int64_t stride, int64_t rows, int64_t columns, const ProductOutput& out);
  // Reads the values of a tile that its sums begin with.
  void (*load)(float* sums, int64_t stride, int64_t rows, int64_t columns, const ProductOutput& out);
};

// One per instruction set; that of AMX is for operands that are both bfloat16.
extern const ProductKernel kProductPortable, kProductAvx2, kProductAvx512, kProductAmx;

}  // namespace grpo_fast
