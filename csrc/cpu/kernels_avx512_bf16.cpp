// The matrix product of bfloat16 operands for processors with AVX-512 and its products of bfloat16 pairs (AVX512-BF16).
#include "product.h"
#if defined(GF_HAS_AVX512_BF16)
#include <immintrin.h>
#define GF_VECTOR_FLOATS 16
#define GF_MICRO_ROWS 8
#if defined(__clang__)
#define GF_TARGET "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma"
#else
#define GF_TARGET "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,prefer-vector-width=512"
#endif
// clang-format off: the order of these matters
#define GF_DOT_PAIRS(sum, unit, units) \
  reinterpret_cast<Vector>(_mm512_dpbf16_ps((sum), (__m512bh)(_mm512_set1_ps(unit)), (__m512bh)(units)))
#include "target_begin.h"
#include "product_impl.h"
#include "target_end.h"
// clang-format on

GF_DEFINE_PRODUCT(kProductAvx512BFloat16, &product_tile<true>)
#endif
