// The element types of the CPU kernels and their conversions from and to float. Included between target_begin.h and target_end.h, so that
// the conversions are compiled for the instruction set of the kernels that inline them.
#pragma once
#define GF_INLINE inline __attribute__((always_inline))

namespace grpo_fast {
namespace {  // internal linkage: each instruction set keeps its own copy

template <typename To, typename From>
GF_INLINE To bits(From x) {
  static_assert(sizeof(To) == sizeof(From), "bits: same size only");
  To y;
  std::memcpy(&y, &x, sizeof(y));
  return y;
}

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

GF_INLINE float to_float(float x) { return x; }
GF_INLINE float to_float(BFloat x) { return bits<float>(static_cast<uint32_t>(x.bits) << 16); }
GF_INLINE float to_float(Half x) {
  const uint32_t shifted = static_cast<uint32_t>(x.bits & 0x7fff) << 13, exponent = shifted & 0x0f800000u;
  const uint32_t normal = shifted + 0x38000000u;
  const float subnormal = bits<float>(normal + 0x00800000u) - bits<float>(0x38800000u);
  uint32_t u = exponent == 0x0f800000u ? normal + 0x38000000u : normal;  // infinity and NaN
  u = exponent == 0 ? bits<uint32_t>(subnormal) : u;
  return bits<float>(u | static_cast<uint32_t>(x.bits & 0x8000) << 16);
}

// Rounded to the nearest, ties to even.
GF_INLINE void from_float(float x, float* out) { *out = x; }
GF_INLINE void from_float(float x, BFloat* out) {  // a NaN from a bfloat16 has its low bits clear, so it stays NaN
  const uint32_t u = bits<uint32_t>(x);
  out->bits = static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
// Any float32 number: a NaN, whose low bits may be all that it has, stays NaN.
GF_INLINE void round_any(float x, BFloat* out) {
  const uint32_t u = bits<uint32_t>(x), rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  out->bits = static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}
GF_INLINE void from_float(float x, Half* out) {
  const uint32_t u = bits<uint32_t>(x), a = u & 0x7fffffffu;
  const uint32_t normal = (a - 0x38000000u + 0xfffu + ((a >> 13) & 1u)) >> 13;
  const uint32_t subnormal = bits<uint32_t>(bits<float>(a) + 0.5f) - 0x3f000000u;
  const uint32_t overflow = a > 0x7f800000u ? 0x7e00u : 0x7c00u;
  uint32_t v = a < 0x38800000u ? subnormal : normal;
  v = a >= 0x47800000u ? overflow : v;
  out->bits = static_cast<uint16_t>(v | ((u >> 16) & 0x8000u));
}
GF_INLINE void round_any(float x, Half* out) { from_float(x, out); }

}  // namespace
}  // namespace grpo_fast
