// The CPU kernels for processors with AVX2 and FMA.
#if defined(__x86_64__) && defined(__GNUC__)
#define GF_VECTOR_FLOATS 8
#define GF_MICRO_ROWS 4
#define GF_TARGET "avx2,fma"
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

GF_DEFINE_KEPT_PRODUCTS(kKeptAvx2)
GF_DEFINE_PRODUCT(kProductAvx2, FloatPacking, &add_tile)
GF_DEFINE_ROWS(kRowsAvx2)
#endif
