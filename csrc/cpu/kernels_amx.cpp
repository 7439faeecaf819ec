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
// Meanwhile the first-level cache fetches the square that is next, and the second-level cache what is packed next.
template <bool kBothRows>
void amx_kernel(const float* a, const float* b, int64_t units, float* c, int64_t stride, bool from_zero, const float* next, Fetch* fetch_a,
                Fetch* fetch_b) {
  const int64_t bytes = stride * 4, fetch = (kSquare * kTile + units - 1) / units;
  if (from_zero) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, c, bytes);
    _tile_loadd(1, c + kTile, bytes);
    if constexpr (kBothRows) {
      _tile_loadd(2, c + kTile * stride, bytes);
      _tile_loadd(3, c + kTile * stride + kTile, bytes);
    }
  }
  for (int64_t u = 0; u < units; u += kTile) {
    for (int64_t r = 0; r < fetch; r++, next += stride) __builtin_prefetch(next, 1), __builtin_prefetch(next + kTile, 1);
    fetch_a->some(), fetch_b->some();
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

using AmxPacking = Packing<true, true, 2 * kPackUnits, kTile, kTile, kTile>;
constexpr int64_t kStep = AmxPacking::kStep;

void add_tile_amx(const ProductCall& call, const Tile& tile, const Packed& packed, float* sums, int64_t stride, const Tile* next) {
  static_assert(kTileRows % kSquare == 0 && kTileColumns % kSquare == 0 && kPackUnits % kTile == 0 && kSumBlock % (2 * kTile) == 0, "");
  const int64_t rows = tile.m1 - tile.m0, columns = tile.n1 - tile.n0;
  const int64_t squares = round_up(rows, kSquare) / kSquare * (round_up(columns, kSquare) / kSquare);
  alignas(64) float edge[kSquare * kSquare] = {};
  const TileConfiguration configuration;
  _tile_loadconfig(&configuration);
  for (int64_t k = 0; k < call.k; k += kStep) {
    const int64_t units = AmxPacking::units(std::min(call.k - k, kStep));
    const bool from_zero = packed.from_zero && k == 0;
    const float *a = AmxPacking::a_of(call, tile, packed, k), *b = AmxPacking::b_of(call, tile, packed, k);
    Fetch fetch_a, fetch_b;  // what is packed next
    const int64_t steps = squares * (units / kTile);
    const int64_t next_k = k + kStep < call.k ? k + kStep : 0;
    if (const Tile* of = next_k ? &tile : next) {
      const int64_t ks = std::min(call.k - next_k, kStep);
      if (!packed.a) fetch_a = Fetch(call.a, of->m0, of->m1 - of->m0, next_k, ks, steps);
      if (!packed.b) fetch_b = Fetch(call.b, of->n0, of->n1 - of->n0, next_k, ks, steps);
    }
    for (int64_t j = 0; j < columns; j += kSquare, b += kSquare * units) {
      const int64_t wide = std::min(kSquare, columns - j);
      for (int64_t i = 0; i < rows; i += kSquare) {
        const int64_t high = std::min(kSquare, rows - i);
        const auto kernel = high > kTile ? &amx_kernel<true> : &amx_kernel<false>;
        float* c = sums + i * stride + j;
        if (wide == kSquare && high % kTile == 0) {
          kernel(a + i * units, b, units, c, stride, from_zero, c + kSquare * stride, &fetch_a, &fetch_b);
        } else {
          copy_tile(high, wide, c, stride, edge, kSquare);
          kernel(a + i * units, b, units, edge, kSquare, from_zero, edge, &fetch_a, &fetch_b);
          copy_tile(high, wide, edge, kSquare, c, stride);
        }
      }
    }
  }
  _tile_release();
}

}  // namespace
}  // namespace grpo_fast
#include "target_end.h"

GF_DEFINE_PRODUCT(kProductAmx, AmxPacking, &add_tile_amx)
#endif
