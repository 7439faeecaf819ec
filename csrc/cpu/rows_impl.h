// The row kernels, compiled once per instruction set (kernels_*.cpp). Plain loops that the compiler vectorises, no intrinsics: any
// architecture works.
//
// A row is read in blocks that fit in the first-level cache. Statistics: sum e and sum e*t, e = 2^t relative to the largest logit so far,
// without the target column. Gradient: a second read, of a row that is still in the cache.
#pragma once
#include "float_types.h"
#include "rows.h"

namespace grpo_fast {
namespace {  // internal linkage: each instruction set keeps its own copy

constexpr int64_t kBlock = 512;  // values: two blocks, one of them being prefetched, fit in the first-level cache
constexpr double kLog2E = 1.4426950408889634074, kLn2 = 0.69314718055994530942;
constexpr float kExponentFloor = -126.0f;  // smaller 2^t are rounded up to the smallest normal float, 1e-38 of the row's sum

// 2^t for -126 <= t < 127, NaN for NaN: within 1.7e-7 of it, rounding included. The polynomial is the degree-5 minimax of 2^f on [-1/2,
// 1/2] that is 1 at 0 (relative error 9.2e-8); the exponent is set by integer arithmetic.
GF_INLINE float exp2_fast(float t) {
  const float shifted = t + 12582912.0f;  // 1.5 * 2^23: the sum's low mantissa bits are t rounded to nearest
  const float f = t - (shifted - 12582912.0f);
  float p = 1.32647017e-3f;
  p = p * f + 9.67150461e-3f;
  p = p * f + 5.55073358e-2f;
  p = p * f + 2.40222424e-1f;
  p = p * f + 6.93147004e-1f;
  p = p * f + 1.0f;
  return bits<float>(bits<uint32_t>(p) + (bits<uint32_t>(shifted) << 23));
}

GF_INLINE float at_least(float floor, float t) { return t < floor ? floor : t; }  // NaN stays NaN

// kExponentFloor, hidden from the compiler, which would fold 2^floor and turn one max into two compares and blends.
GF_INLINE float exponent_floor() {
  float floor = kExponentFloor;
  __asm__("" : "+m"(floor));
  return floor;
}

// tanh within 2 ulp: an odd polynomial near 0 (Cephes, S. Moshier), 1 - 2/(e^2x + 1) beyond.
GF_INLINE float tanh_fast(float x) {
  const float a = std::fabs(x), z = x * x;
  float p = -5.70498872745e-3f;
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const float small = x + x * z * p;
  const float e = exp2_fast(at_least(kExponentFloor, a * static_cast<float>(-2 * kLog2E)));  // e^-2|x|
  const float large = std::copysign((1.0f - e) / (1.0f + e), x);
  return a < 0.625f ? small : large;
}

// The derivative of tanh, c (2 - c) with c = 1 - |tanh x| = 2 e^-2|x| / (1 + e^-2|x|): it keeps its digits where 1 - tanh(x)^2 has none.
GF_INLINE float tanh_derivative(float x) {
  const float e = exp2_fast(at_least(kExponentFloor, std::fabs(x) * static_cast<float>(-2 * kLog2E))), c = (e + e) / (1.0f + e);
  return c * (2.0f - c);
}
inline double tanh_derivative(double x) {
  const double e = std::exp(-2 * std::fabs(x)), c = (e + e) / (1 + e);
  return c * (2 - c);
}

// The values of f(z) of a block: the row itself, or with a soft cap its float32 values in the buffer.
template <bool kCapped, typename T>
GF_INLINE auto block_of(const T* row, int64_t n, const RowTransform& transform, float* buffer) {
  if constexpr (kCapped) {
    const float scale = static_cast<float>(transform.logit_scale), softcap = static_cast<float>(transform.softcap);
#pragma omp simd
    for (int64_t j = 0; j < n; j++) buffer[j] = softcap * tanh_fast(to_float(row[j]) * scale / softcap);
    return static_cast<const float*>(buffer);
  } else {
    return row;
  }
}

// f(z) of one column in double, for the target, on which the accuracy of a token with a probability near 1 depends.
template <typename T, bool kCapped>
GF_INLINE double column(const T* row, int64_t v, const RowTransform& transform) {
  const double z = to_float(row[v]);
  return kCapped ? transform.softcap * std::tanh(z * transform.logit_scale / transform.softcap) : z;
}

// s = slope * what block_of() returns (a logit scale without a soft cap is folded in here).
template <bool kCapped>
GF_INLINE double slope_of(const RowTransform& transform) {
  return (kCapped ? 1.0 : transform.logit_scale) / transform.temperature;
}

struct Sums {                                                 // over the columns seen so far
  float reference = -std::numeric_limits<float>::infinity();  // their maximum, or a little below
  double e = 0, et = 0;                                       // sum 2^t and sum t * 2^t, t = (f - reference) * slope * log2(e)
};

template <typename E>
GF_INLINE float maximum_of(const E* __restrict f, int64_t n) {
  float maximum = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : maximum)
  for (int64_t j = 0; j < n; j++) {
    const float x = to_float(f[j]);
    maximum = x > maximum ? x : maximum;
  }
  return maximum;
}

// Prefetches n values. The hardware's prefetching stops at each page of 4 KiB, which is two blocks of float32.
template <typename E>
GF_INLINE void prefetch(const E* f, int64_t n) {
  const char* bytes = reinterpret_cast<const char*>(f);
  for (int64_t i = 0; i < n * static_cast<int64_t>(sizeof(E)); i += 64) __builtin_prefetch(bytes + i);
}

// The sums in one pass over the block, so that arithmetic and memory overlap, relative to the maximum of the blocks before. If the block
// contains a logit that is larger by more than kHeadroom, its sums are inaccurate or have overflowed and are computed again. (The loop
// tests for such a logit instead of computing the maximum: not every compiler vectorises a maximum that propagates NaN.)
template <typename E>
GF_INLINE void add_block(const E* __restrict f, int64_t n, double slope_log2, Sums* sums) {
  constexpr float kHeadroom = 4.0f;  // in powers of two
  const float infinity = std::numeric_limits<float>::infinity(), k = static_cast<float>(slope_log2), floor = exponent_floor();
  float next = sums->reference == -infinity ? maximum_of(f, n) : sums->reference;
  for (;;) {
    if (next > sums->reference) {
      const double shift = sums->e > 0 ? (static_cast<double>(sums->reference) - next) * slope_log2 : 0, factor = std::exp2(shift);
      sums->et = factor * (sums->et + shift * sums->e);
      sums->e *= factor;
      sums->reference = next;
    }
    const float reference = sums->reference == -infinity ? 0.0f : sums->reference;
    float e_sum = 0, et_sum = 0;
    int32_t too_large = 0;
#pragma omp simd reduction(+ : e_sum, et_sum) reduction(| : too_large)
    for (int64_t j = 0; j < n; j++) {
      const float t = at_least(floor, (to_float(f[j]) - reference) * k), e = exp2_fast(t);
      too_large |= t > kHeadroom;
      e_sum += e;
      et_sum += e * t;
    }
    if (too_large) {
      next = maximum_of(f, n);
      continue;
    }
    if (sums->reference == -infinity && e_sum == e_sum) return;  // nothing but -inf so far
    sums->e += e_sum;
    sums->et += et_sum;
    return;
  }
}

template <typename T, bool kCapped>
GF_INLINE RowStatistics statistics_of(const T* row, int64_t vocabulary, int64_t target, const RowTransform& transform) {
  alignas(64) float buffer[kBlock];
  const double slope = slope_of<kCapped>(transform);
  Sums sums;
  for (int64_t begin = 0, end; begin < vocabulary; begin = end) {
    if (begin == target) {  // exclude the target: blocks end before it and begin after it
      end = begin + 1;
      continue;
    }
    end = begin + kBlock < vocabulary ? begin + kBlock : vocabulary;
    if (begin < target && target < end) end = target;
    prefetch(row + end, kBlock);  // harmless beyond the last row: a prefetch never faults
    add_block(block_of<kCapped>(row + begin, end - begin, transform, buffer), end - begin, slope * kLog2E, &sums);
  }

  RowStatistics out;
  const double f_target = column<T, kCapped>(row, target, transform);
  out.pivot = std::isinf(sums.reference) ? f_target : sums.reference;  // no finite logit but the target's
  // Subtract before multiplying by the slope, which is huge at a low temperature, to keep all digits.
  const double s_target = (f_target - out.pivot) * slope, log_others = std::log(sums.e), d = log_others - s_target;
  out.logprob = d > 0 ? -(d + std::log1p(std::exp(-d))) : -std::log1p(std::exp(d));
  out.log_pivot = d > 0 ? -(log_others + std::log1p(std::exp(-d))) : -(s_target + std::log1p(std::exp(d)));
  const bool impossible = out.logprob == -std::numeric_limits<double>::infinity();  // the target's logit is -inf: its share of both is 0
  out.lse = impossible ? out.pivot * slope - out.log_pivot : f_target * slope - out.logprob;
  out.entropy = impossible ? 0.0 : -std::exp(out.logprob) * out.logprob;
  if (sums.e > 0)  // - sum p log p over the others, with log p = t ln 2 + log_pivot
    out.entropy -= std::exp(out.log_pivot) * (sums.et * kLn2 + sums.e * out.log_pivot);
  if (sums.e != sums.e) out.entropy = sums.e;
  return out;
}

struct GradientTerms {  // d loss / d f = e * (constant + linear * t), e = 2^t, t = (f - pivot) * k
  float pivot, k, constant, linear;
  float cap_scale;  // a soft cap's derivative is that of tanh at z * cap_scale
};

// Conversion of float to the type of the gradient. Only a row in the gradient's own type has no NaN that from_float() might lose.
template <typename T, typename G>
GF_INLINE void round_gradient(float d, G* out) {
  if constexpr (std::is_same_v<T, G>)
    from_float(d, out);
  else
    round_any(d, out);
}

template <bool kCapped, bool kEntropy, typename T, typename E, typename G>
GF_INLINE void gradient_block(const E* f, const float* cap_slope, G* out, int64_t n, const GradientTerms& terms) {
  const GradientTerms c = terms;  // a copy, which stores to out cannot alias
  const float floor = exponent_floor();
#pragma omp simd
  for (int64_t j = 0; j < n; j++) {
    const float x = to_float(f[j]), t = at_least(floor, (x - c.pivot) * c.k), e = exp2_fast(t);
    float d = kEntropy ? e * (c.constant + c.linear * t) : e * c.constant;
    if (kCapped) d *= cap_slope[j];
    round_gradient<T>(d, out + j);
  }
}

// G is T, or a shorter type: then the gradient of a block may be written over the logits of this block and of those before.
template <typename T, typename G, bool kCapped, bool kEntropy>
GF_INLINE void gradient_of(const T* row, G* gradient, int64_t vocabulary, int64_t target, const RowTransform& transform,
                           const RowStatistics& statistics, double g, double h) {
  alignas(64) float buffer[kBlock], cap_slope[kCapped ? kBlock : 1];
  const double cap_slope_of_target =
      kCapped && target != kNoTarget ? tanh_derivative(to_float(row[target]) * transform.logit_scale / transform.softcap) : 1.0;
  const double factor = std::exp(statistics.log_pivot) * transform.logit_scale / transform.temperature;
  GradientTerms terms;
  terms.pivot = static_cast<float>(statistics.pivot);
  terms.k = static_cast<float>(slope_of<kCapped>(transform) * kLog2E);
  terms.constant = static_cast<float>(factor * (-g - h * (statistics.entropy + statistics.log_pivot)));
  terms.linear = static_cast<float>(factor * -h * kLn2);
  terms.cap_scale = kCapped ? static_cast<float>(transform.logit_scale / transform.softcap) : 0.0f;

  // The gradient of the target from 1 - p = -expm1(log p), accurate also for p near 1. Computed before the row is overwritten.
  const double p = std::exp(statistics.logprob);
  double d_target = g * -std::expm1(statistics.logprob);
  if (p != 0) d_target -= h * p * (statistics.logprob + statistics.entropy);  // 0 * -inf is NaN; p is NaN for a row without statistics
  d_target *= transform.logit_scale / transform.temperature * cap_slope_of_target;

  for (int64_t begin = 0; begin < vocabulary; begin += kBlock) {
    const int64_t n = begin + kBlock < vocabulary ? kBlock : vocabulary - begin;
    if constexpr (kCapped) {  // before the row is written over
#pragma omp simd
      for (int64_t j = 0; j < n; j++) cap_slope[j] = tanh_derivative(to_float(row[begin + j]) * terms.cap_scale);
    }
    const auto f = block_of<kCapped>(row + begin, n, transform, buffer);
    if constexpr (std::is_same_v<T, G>) {
      gradient_block<kCapped, kEntropy, T>(f, cap_slope, gradient + begin, n, terms);
    } else {
      alignas(64) G rounded[kBlock];
      gradient_block<kCapped, kEntropy, T>(f, cap_slope, rounded, n, terms);
      std::memcpy(gradient + begin, rounded, static_cast<size_t>(n) * sizeof(G));
    }
  }
  if (target != kNoTarget) round_gradient<T>(static_cast<float>(d_target), gradient + target);
}

template <typename T>
RowStatistics statistics(const void* row, int64_t vocabulary, int64_t target, const RowTransform& transform) {
  const T* typed = static_cast<const T*>(row);
  return transform.softcap > 0 ? statistics_of<T, true>(typed, vocabulary, target, transform)
                               : statistics_of<T, false>(typed, vocabulary, target, transform);
}

template <typename T, typename G>
void gradient(const void* row, void* gradient, int64_t vocabulary, int64_t target, const RowTransform& transform,
              const RowStatistics& statistics, double g, double h) {
  const T* in = static_cast<const T*>(row);
  G* out = static_cast<G*>(gradient);
  if (transform.softcap > 0) {
    if (h != 0)
      gradient_of<T, G, true, true>(in, out, vocabulary, target, transform, statistics, g, h);
    else
      gradient_of<T, G, true, false>(in, out, vocabulary, target, transform, statistics, g, h);
  } else {
    if (h != 0)
      gradient_of<T, G, false, true>(in, out, vocabulary, target, transform, statistics, g, h);
    else
      gradient_of<T, G, false, false>(in, out, vocabulary, target, transform, statistics, g, h);
  }
}

}  // namespace
}  // namespace grpo_fast

#define GF_DEFINE_ROWS(table)                                                                               \
  namespace grpo_fast {                                                                                     \
  extern const RowKernels table[3];                                                                         \
  const RowKernels table[3] = {{&statistics<float>, &gradient<float, float>, &gradient<float, BFloat>},     \
                               {&statistics<BFloat>, &gradient<BFloat, BFloat>, &gradient<BFloat, BFloat>}, \
                               {&statistics<Half>, &gradient<Half, Half>, nullptr}};                        \
  }
