// The CPU kernels for processors with AVX-512.
#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define GF_VECTOR_FLOATS 16
#define GF_MICRO_ROWS 8
#if defined(__clang__)
#define GF_TARGET "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"
#else
#define GF_TARGET "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,prefer-vector-width=512"
#endif
// clang-format off: the order of these matters
#include "kept_products.h"
#include "product.h"
#include "rows.h"
#include "target_begin.h"
#include "kept_products_impl.h"
#include "product_impl.h"
#include "rows_impl.h"
#include "target_end.h"
// clang-format on

GF_DEFINE_KEPT_PRODUCTS(kKeptAvx512)
GF_DEFINE_PRODUCT(kProductAvx512, FloatPacking, &add_tile)
GF_DEFINE_ROWS(kRowsAvx512)
#endif
