// The matrix product of bfloat16 operands for processors with AMX: a tile register holds 16 rows of 64 bytes.
#include "product.h"
#if defined(GF_HAS_AMX)
#include <immintrin.h>
#define GF_VECTOR_FLOATS 16
#define GF_MICRO_ROWS 8
#if defined(__clang__)
#define GF_TARGET "amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"
#else
#define GF_TARGET "amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,prefer-vector-width=512"
#endif
// clang-format off: the order of these matters
#include "target_begin.h"
#include "product_impl.h"
// clang-format on

namespace grpo_fast {
namespace {

constexpr int64_t kTile = 16;           // rows of a tile register, and units of a row
constexpr int64_t kSquare = 2 * kTile;  // the inner loop makes kSquare x kSquare elements of the result in four registers
constexpr int64_t kOfTile = kTile * kTile;

struct alignas(64) TileConfiguration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// c += a @ b, block after block of 32 values of k: the registers begin with c. The instruction makes the sum of a block and then adds it.
// Meanwhile the cache fetches the square that is next.
template <bool kBothRows>
void amx_kernel(const float* a, const float* b, int64_t units, float* c, int64_t stride, const float* next) {
  const int64_t bytes = stride * 4, fetch = (kSquare * kTile + units - 1) / units;
  _tile_loadd(0, c, bytes);
  _tile_loadd(1, c + kTile, bytes);
  if constexpr (kBothRows) {
    _tile_loadd(2, c + kTile * stride, bytes);
    _tile_loadd(3, c + kTile * stride + kTile, bytes);
  }
  for (int64_t u = 0; u < units; u += kTile) {
    for (int64_t r = 0; r < fetch; r++, next += stride) __builtin_prefetch(next, 1), __builtin_prefetch(next + kTile, 1);
    _tile_loadd(4, a + u * kTile, 64);
    _tile_loadd(6, b + u * kTile, 64);
    _tile_loadd(7, b + (units + u) * kTile, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (kBothRows) {
      _tile_loadd(5, a + (units + u) * kTile, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, bytes);
  _tile_stored(1, c + kTile, bytes);
  if constexpr (kBothRows) {
    _tile_stored(2, c + kTile * stride, bytes);
    _tile_stored(3, c + kTile * stride + kTile, bytes);
  }
}

void amx_tile(const ProductCall& call, int64_t m0, int64_t m1, int64_t n0, int64_t n1, float* buffer) {
  static_assert(kTileRows % kSquare == 0 && kTileColumns % kSquare == 0 && kPackUnits % kTile == 0 && kSumBlock % (2 * kTile) == 0, "");
  const int64_t rows = m1 - m0, columns = n1 - n0;
  alignas(64) float edge[kSquare * kSquare] = {};
  const TileConfiguration configuration;
  _tile_loadconfig(&configuration);
  for (int64_t k = 0; k < call.k; k += 2 * kPackUnits) {
    const int64_t ks = std::min(call.k - k, 2 * kPackUnits), units = round_up((ks + 1) / 2, kTile);
    float *a = buffer, *b = buffer + round_up(rows, kSquare) * units;
    pack<true, true>(call.a, m0, rows, k, ks, kTile, units, a);
    pack<true>(call.b, n0, columns, k, ks, kTile, units, b);
    for (int64_t j = 0; j < columns; j += kSquare, b += kSquare * units) {
      const int64_t wide = std::min(kSquare, columns - j);
      for (int64_t i = 0; i < rows; i += kSquare) {
        const int64_t high = std::min(kSquare, rows - i);
        const auto kernel = high > kTile ? &amx_kernel<true> : &amx_kernel<false>;
        float* c = call.out + (m0 + i) * call.out_stride + n0 + j;
        if (wide == kSquare && high % kTile == 0) {
          kernel(a + i * units, b, units, c, call.out_stride, c + kSquare * call.out_stride);
        } else {
          copy_tile(high, wide, c, call.out_stride, edge, kSquare);
          kernel(a + i * units, b, units, edge, kSquare, edge);
          copy_tile(high, wide, edge, kSquare, c, call.out_stride);
        }
      }
    }
  }
  _tile_release();
}

}  // namespace
}  // namespace grpo_fast
#include "target_end.h"

GF_DEFINE_PRODUCT(kProductAmx, &amx_tile)
#endif
