// See product.h. Both operands of a tile are packed, a block of k at a time, into panels that the inner loops read in order. Packing
// converts to float32, or makes pairs of bfloat16 with neighbouring k (kPairs), takes any strides, and fills up with zeros: the edges of
// the result go through the same loops as the rest. A "unit" is what takes four bytes of a panel: a float32 or a pair.
//
// GF_VECTOR_FLOATS: the number of floats in a vector; GF_MICRO_ROWS: the rows of the result that the inner loop has in registers.
#pragma once
#include "float_types.h"
#include "product.h"

namespace grpo_fast {
namespace {  // internal linkage: each instruction set keeps its own copy

constexpr int64_t kWidth = GF_VECTOR_FLOATS, kMicroRows = GF_MICRO_ROWS;
constexpr int64_t kPanel = std::max(kWidth, kMicroRows);  // rows of a panel of a
constexpr int64_t kMicroVectors = 3, kMicroColumns = kMicroVectors * kWidth;
static_assert(kTileRows % kPanel == 0 && kTileColumns % kMicroColumns == 0 && kPanel % kMicroRows == 0, "panels divide tiles");

typedef float Vector __attribute__((vector_size(kWidth * 4)));
typedef int32_t Integers __attribute__((vector_size(kWidth * 4)));
typedef uint32_t Words __attribute__((vector_size(kWidth * 4)));
typedef uint16_t HalfWords __attribute__((vector_size(kWidth * 2)));

template <typename V>
GF_INLINE V read_as(const void* from) {
  V x;
  std::memcpy(&x, from, sizeof(x));
  return x;
}
GF_INLINE void write(float* to, const Vector& x) { std::memcpy(to, &x, sizeof(x)); }

GF_INLINE Words widened(const BFloat* from) {
#if GF_VECTOR_FLOATS == 16  // GCC makes two halves of the general form
  return reinterpret_cast<Words>(_mm512_cvtepu16_epi32(read_as<__m256i>(from)));
#else
  return __builtin_convertvector(read_as<HalfWords>(from), Words);
#endif
}
GF_INLINE Vector load(const float* from) { return read_as<Vector>(from); }
GF_INLINE Vector load(const BFloat* from) { return reinterpret_cast<Vector>(widened(from) << 16); }
GF_INLINE Vector load(const Half* from) {
  float values[kWidth];
#pragma omp simd
  for (int64_t l = 0; l < kWidth; l++) values[l] = to_float(from[l]);
  return load(values);
}

// The lower or upper halves of a and b, element by element in turn.
template <int64_t kFrom, size_t... I>
GF_INLINE Vector interleave(const Vector& a, const Vector& b, std::index_sequence<I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, static_cast<int>(kFrom + I / 2 + (I % 2) * kWidth)...);
#else
  return __builtin_shuffle(a, b, Integers{static_cast<int32_t>(kFrom + I / 2 + (I % 2) * kWidth)...});
#endif
}

// Interleaving row i with row i + kWidth / 2 rotates the bits of (row, lane) by one; after log2(kWidth) times row and lane have changed
// places.
GF_INLINE void transpose(Vector* x) {
  constexpr auto lanes = std::make_index_sequence<static_cast<size_t>(kWidth)>();
#pragma GCC unroll 4
  for (int64_t step = 1; step < kWidth; step *= 2) {
    Vector y[kWidth];
#pragma GCC unroll 8
    for (int64_t i = 0; i < kWidth / 2; i++) {
      y[2 * i] = interleave<0>(x[i], x[i + kWidth / 2], lanes);
      y[2 * i + 1] = interleave<kWidth / 2>(x[i], x[i + kWidth / 2], lanes);
    }
#pragma GCC unroll 16
    for (int64_t i = 0; i < kWidth; i++) x[i] = y[i];
  }
}

// Loads kWidth x kWidth units of an operand, of which `outers` rows and `ks` values of k exist; the others are zeros. Returns whether x[i]
// is a k (its lanes are rows of the operand) or a row of the operand.
template <bool kPairs, typename T>
GF_INLINE bool load_block(const ProductOperand& operand, int64_t outer, int64_t outers, int64_t k, int64_t ks, Vector* x) {
  constexpr int64_t kUnit = kPairs ? 2 : 1;
  const int64_t outer_stride = operand.outer_stride, k_stride = operand.k_stride;
  const T* base = reinterpret_cast<const T*>(operand.data) + outer * outer_stride + k * k_stride;
  if (k_stride == 1 && ks >= kWidth * kUnit) {
    const auto row = [&](int64_t i) __attribute__((always_inline)) {
      if constexpr (kPairs)
        return read_as<Vector>(base + i * outer_stride);
      else
        return load(base + i * outer_stride);
    };
    if (outers >= kWidth) {  // many short rows at once are more than the processor prefetches by itself
#pragma GCC unroll 16
      for (int64_t i = 0; i < kWidth; i++) {
        __builtin_prefetch(base + (i < outers - kWidth ? i + kWidth : i) * outer_stride);
        x[i] = row(i);
      }
    } else {
#pragma GCC unroll 16
      for (int64_t i = 0; i < kWidth; i++) x[i] = i < outers ? row(i) : Vector{};
    }
    return false;
  }
  if (outer_stride == 1 && outers >= kWidth) {
    const auto unit = [&](int64_t i, bool whole) __attribute__((always_inline)) {
      if constexpr (kPairs) {
        const Words first = widened(base + 2 * i * k_stride);
        return reinterpret_cast<Vector>(whole ? first | widened(base + (2 * i + 1) * k_stride) << 16 : first);
      } else {
        return load(base + i * k_stride);
      }
    };
    if (ks >= kWidth * kUnit) {
#pragma GCC unroll 16
      for (int64_t i = 0; i < kWidth; i++) x[i] = unit(i, true);
    } else {
#pragma GCC unroll 16
      for (int64_t i = 0; i < kWidth; i++) x[i] = i * kUnit < ks ? unit(i, i * kUnit + kUnit <= ks) : Vector{};
    }
    return true;
  }
  T values[kWidth * kWidth * kUnit] = {};
  for (int64_t i = 0; i < std::min(ks, kWidth * kUnit); i++)
    for (int64_t o = 0; o < std::min(outers, kWidth); o++)
      values[(i / kUnit * kWidth + o) * kUnit + i % kUnit] = base[o * outer_stride + i * k_stride];
  for (int64_t i = 0; i < kWidth; i++) {
    if constexpr (kPairs)
      x[i] = read_as<Vector>(values + i * kWidth * 2);
    else
      x[i] = load(values + i * kWidth);
  }
  return true;
}

// Packs the rows [outer, outer + outers) of an operand, for ks values from k on, as `units` units. Panels of `panel` rows, each with the
// rows beside one another for every unit; with kOuterMajor panels of kWidth rows, in square blocks with the units beside one another.
template <bool kPairs, bool kOuterMajor, typename T>
void pack_as(const ProductOperand& operand, int64_t outer, int64_t outers, int64_t k, int64_t ks, int64_t panel, int64_t units, float* to) {
  constexpr int64_t kUnit = kPairs ? 2 : 1;
  const auto pack_block = [&](int64_t o, int64_t u) {
    Vector x[kWidth];
    const int64_t have = std::max<int64_t>(0, outers - o);
    const bool lanes_are_rows = load_block<kPairs, T>(operand, outer + o, have, k + u * kUnit, ks - u * kUnit, x);
    if (lanes_are_rows == kOuterMajor) transpose(x);
    const int64_t step = kOuterMajor ? kWidth : panel;
    float* at = kOuterMajor ? to + o * units + u * kWidth : to + o / panel * panel * units + o % panel + u * panel;
    if (u + kWidth <= units) {
#pragma GCC unroll 16
      for (int64_t i = 0; i < kWidth; i++) write(at + i * step, x[i]);
    } else {
      for (int64_t i = 0; i < units - u; i++) write(at + i * step, x[i]);
    }
  };
  const int64_t end = round_up(outers, panel);
  if (operand.k_stride == 1) {  // along the memory, for the processor to prefetch it
    for (int64_t o = 0; o < end; o += kWidth)
      for (int64_t u = 0; u < units; u += kWidth) pack_block(o, u);
  } else {
    for (int64_t u = 0; u < units; u += kWidth)
      for (int64_t o = 0; o < end; o += kWidth) pack_block(o, u);
  }
}

template <bool kPairs, bool kOuterMajor = false>
void pack(const ProductOperand& operand, int64_t outer, int64_t outers, int64_t k, int64_t ks, int64_t panel, int64_t units, float* to) {
  if (kPairs || operand.type == RowType::kBFloat16)
    return pack_as<kPairs, kOuterMajor, BFloat>(operand, outer, outers, k, ks, panel, units, to);
  if constexpr (!kPairs) {
    if (operand.type == RowType::kFloat16) return pack_as<false, kOuterMajor, Half>(operand, outer, outers, k, ks, panel, units, to);
    pack_as<false, kOuterMajor, float>(operand, outer, outers, k, ks, panel, units, to);
  }
}

// c[r][:] += the products of kRows rows of a panel of a with a panel of b: for every block of k its sum, made in registers, then added.
// With from_zero c begins with 0.
template <int64_t kRows>
void micro_kernel(const float* a, const float* b, int64_t units, float* c, int64_t stride, bool from_zero) {
#pragma GCC unroll 8
  for (int64_t r = 0; r < kRows; r++)
    for (int64_t v = 0; v < kMicroVectors; v++) __builtin_prefetch(c + r * stride + v * kWidth, 1);
  for (int64_t begin = 0; begin < units; begin += kSumBlock) {
    const int64_t end = std::min(units, begin + kSumBlock);
    Vector sums[kRows][kMicroVectors] = {};
    for (int64_t u = begin; u < end; u++) {
      Vector row[kMicroVectors];
#pragma GCC unroll 3
      for (int64_t v = 0; v < kMicroVectors; v++) row[v] = load(b + u * kMicroColumns + v * kWidth);
#pragma GCC unroll 8
      for (int64_t r = 0; r < kRows; r++) {
#pragma GCC unroll 3
        for (int64_t v = 0; v < kMicroVectors; v++) sums[r][v] += a[u * kPanel + r] * row[v];
      }
    }
#pragma GCC unroll 8
    for (int64_t r = 0; r < kRows; r++) {
#pragma GCC unroll 3
      for (int64_t v = 0; v < kMicroVectors; v++) {
        float* at = c + r * stride + v * kWidth;
        write(at, (from_zero ? Vector{} : load(at)) + sums[r][v]);
      }
    }
    from_zero = false;
  }
}

// The largest power of two of the rows that are left, so that one row does not cost as much as all. A row's bits do not depend on it.
GF_INLINE int64_t some_rows(int64_t left, const float* a, const float* b, int64_t units, float* c, int64_t stride, bool from_zero) {
  if constexpr (kMicroRows >= 8)
    if (left >= 8) return micro_kernel<8>(a, b, units, c, stride, from_zero), 8;
  if (left >= 4) return micro_kernel<4>(a, b, units, c, stride, from_zero), 4;
  if (left >= 2) return micro_kernel<2>(a, b, units, c, stride, from_zero), 2;
  return micro_kernel<1>(a, b, units, c, stride, from_zero), 1;
}

GF_INLINE void copy_tile(int64_t rows, int64_t columns, const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  for (int64_t r = 0; r < rows; r++)
    for (int64_t j = 0; j < columns; j++) to[r * to_stride + j] = from[r * from_stride + j];
}

// How a kernel packs the operands: so many values of k at a time, in panels of so many rows of a and of b.
template <bool kPairs, bool kOuterMajorA, int64_t kStepOfK, int64_t kPanelA, int64_t kPanelB, int64_t kUnitsMultiple>
struct Packing {
  static constexpr int64_t kStep = kStepOfK;

  static int64_t units(int64_t ks) { return round_up(kPairs ? (ks + 1) / 2 : ks, kUnitsMultiple); }
  // The sizes of a block, which is also the distance between the blocks of an operand that is packed for all of k.
  static int64_t size_a(int64_t rows) { return round_up(rows, kTileRows) * units(kStep); }
  static int64_t size_b(int64_t columns) { return round_up(columns, kTileColumns) * units(kStep); }

  static void pack_a(const ProductCall& call, int64_t m0, int64_t rows, int64_t k, float* to) {
    const int64_t ks = std::min(call.k - k, kStep);
    pack<kPairs, kOuterMajorA>(call.a, m0, rows, k, ks, kPanelA, units(ks), to);
  }
  static void pack_b(const ProductCall& call, int64_t n0, int64_t columns, int64_t k, float* to) {
    const int64_t ks = std::min(call.k - k, kStep);
    pack<kPairs>(call.b, n0, columns, k, ks, kPanelB, units(ks), to);
  }
  static void all_of_a(const ProductCall& call, int64_t m0, int64_t m1, float* to) {
    for (int64_t k = 0; k < call.k; k += kStep, to += size_a(m1 - m0)) pack_a(call, m0, m1 - m0, k, to);
  }
  static void all_of_b(const ProductCall& call, int64_t n0, int64_t n1, float* to) {
    for (int64_t k = 0; k < call.k; k += kStep, to += size_b(n1 - n0)) pack_b(call, n0, n1 - n0, k, to);
  }

  // A block of an operand: packed before, or now.
  static const float* a_of(const ProductCall& call, const Tile& tile, const Packed& packed, int64_t k) {
    if (packed.a) return packed.a + k / kStep * size_a(tile.m1 - tile.m0);
    pack_a(call, tile.m0, tile.m1 - tile.m0, k, packed.room_a);
    return packed.room_a;
  }
  static const float* b_of(const ProductCall& call, const Tile& tile, const Packed& packed, int64_t k) {
    if (packed.b) return packed.b + k / kStep * size_b(tile.n1 - tile.n0);
    pack_b(call, tile.n0, tile.n1 - tile.n0, k, packed.room_b);
    return packed.room_b;
  }
};

// Fetches a part of an operand into the second-level cache, a few lines at a time, while something else is computed.
class Fetch {
 public:
  Fetch() = default;
  Fetch(const ProductOperand& operand, int64_t outer, int64_t outers, int64_t k, int64_t ks, int64_t calls) {
    const int64_t element = operand.type == RowType::kFloat32 ? 4 : 2;
    const bool along_k = operand.k_stride == 1;
    if (!along_k && operand.outer_stride != 1) return;
    at_ = operand.data + (outer * operand.outer_stride + k * operand.k_stride) * element;
    stride_ = (along_k ? operand.outer_stride : operand.k_stride) * element;
    lines_ = ((along_k ? ks : outers) * element + kLine - 1) / kLine;
    left_ = (along_k ? outers : ks) * lines_;
    each_ = (left_ + calls - 1) / std::max<int64_t>(calls, 1);
  }
  GF_INLINE void some() {
    for (int64_t i = std::min(each_, left_); i > 0; i--, left_--) {
      __builtin_prefetch(at_ + line_ * kLine, 0, 2);
      if (++line_ == lines_) line_ = 0, at_ += stride_;
    }
  }

 private:
  static constexpr int64_t kLine = 64;
  const char* at_ = nullptr;
  int64_t stride_ = 0, lines_ = 0, left_ = 0, each_ = 0, line_ = 0;
};

using FloatPacking = Packing<false, false, kPackUnits / 2, kPanel, kMicroColumns, 1>;  // a panel of b stays in the first-level cache

[[maybe_unused]] void add_tile(const ProductCall& call, const Tile& tile, const Packed& packed, float* sums, int64_t stride,
                               const Tile* /*next*/) {
  const int64_t rows = tile.m1 - tile.m0, columns = tile.n1 - tile.n0;
  float edge[kMicroRows * kMicroColumns] = {};
  for (int64_t k = 0; k < call.k; k += FloatPacking::kStep) {
    const int64_t units = std::min(call.k - k, FloatPacking::kStep);
    const bool from_zero = packed.from_zero && k == 0;
    const float *a = FloatPacking::a_of(call, tile, packed, k), *b = FloatPacking::b_of(call, tile, packed, k);
    for (int64_t j = 0; j < columns; j += kMicroColumns, b += kMicroColumns * units) {
      const int64_t wide = std::min(kMicroColumns, columns - j);
      for (int64_t i = 0; i < rows;) {
        const float* panel = a + i / kPanel * kPanel * units + i % kPanel;
        const int64_t left = std::min(kMicroRows - i % kMicroRows, rows - i);
        float* c = sums + i * stride + j;
        if (wide == kMicroColumns) {
          i += some_rows(left, panel, b, units, c, stride, from_zero);
        } else {
          copy_tile(left, wide, c, stride, edge, kMicroColumns);
          const int64_t done = some_rows(left, panel, b, units, edge, kMicroColumns, from_zero);
          copy_tile(done, wide, edge, kMicroColumns, c, stride);
          i += done;
        }
      }
    }
  }
}

// Copies bytes. Whole cache lines bypass the caches where the processor can: they need not be read before they are written, and what is in
// the caches stays there.
GF_INLINE void copy_past_caches(char* to, const char* from, int64_t bytes) {
#if GF_VECTOR_FLOATS == 16
  const int64_t head = std::min<int64_t>(bytes, static_cast<int64_t>(-reinterpret_cast<uintptr_t>(to) & 63));
  std::memcpy(to, from, static_cast<size_t>(head));
  int64_t at = head;
  for (; at + 64 <= bytes; at += 64) _mm512_stream_si512(reinterpret_cast<__m512i*>(to + at), read_as<__m512i>(from + at));
  std::memcpy(to + at, from + at, static_cast<size_t>(bytes - at));
#else
  std::memcpy(to, from, static_cast<size_t>(bytes));
#endif
}

template <typename T>
void store_tile_as(const float* sums, int64_t stride, int64_t rows, int64_t columns, char* out, int64_t out_stride) {
  constexpr int64_t kPart = 512;
  alignas(64) T rounded[kPart];
  for (int64_t i = 0; i < rows; i++) {
    for (int64_t j = 0; j < columns; j += kPart) {
      const int64_t n = std::min(kPart, columns - j);
      const float* row = sums + i * stride + j;
      char* to = out + (i * out_stride + j) * static_cast<int64_t>(sizeof(T));
      if constexpr (std::is_same_v<T, float>) {
        copy_past_caches(to, reinterpret_cast<const char*>(row), n * 4);
      } else {
#pragma omp simd
        for (int64_t l = 0; l < n; l++) round_any(row[l], rounded + l);
        copy_past_caches(to, reinterpret_cast<const char*>(rounded), n * 2);
      }
    }
  }
#if GF_VECTOR_FLOATS == 16
  _mm_sfence();
#endif
}

void store_tile(const float* sums, int64_t stride, int64_t rows, int64_t columns, const ProductOutput& out) {
  if (out.type == RowType::kFloat32) return store_tile_as<float>(sums, stride, rows, columns, out.data, out.stride);
  if (out.type == RowType::kBFloat16) return store_tile_as<BFloat>(sums, stride, rows, columns, out.data, out.stride);
  store_tile_as<Half>(sums, stride, rows, columns, out.data, out.stride);
}

template <typename T>
void load_tile_as(float* sums, int64_t stride, int64_t rows, int64_t columns, const char* out, int64_t out_stride) {
  for (int64_t i = 0; i < rows; i++) {
    const T* from = reinterpret_cast<const T*>(out) + i * out_stride;
    float* to = sums + i * stride;
#pragma omp simd
    for (int64_t j = 0; j < columns; j++) to[j] = to_float(from[j]);
  }
}

void load_tile(float* sums, int64_t stride, int64_t rows, int64_t columns, const ProductOutput& out) {
  if (out.type == RowType::kFloat32) return load_tile_as<float>(sums, stride, rows, columns, out.data, out.stride);
  if (out.type == RowType::kBFloat16) return load_tile_as<BFloat>(sums, stride, rows, columns, out.data, out.stride);
  load_tile_as<Half>(sums, stride, rows, columns, out.data, out.stride);
}

}  // namespace
}  // namespace grpo_fast

#define GF_DEFINE_PRODUCT(name, packing, add)                                                        \
  namespace grpo_fast {                                                                              \
  extern const ProductKernel name;                                                                   \
  const ProductKernel name = {&packing::all_of_a, &packing::all_of_b, add, &store_tile, &load_tile}; \
  }
