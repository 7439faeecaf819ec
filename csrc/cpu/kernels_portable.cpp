// The CPU kernels for any processor.
#define GF_VECTOR_FLOATS 4
#if defined(__aarch64__)
#define GF_MICRO_ROWS 8  // 32 vector registers
#else
#define GF_MICRO_ROWS 4
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

GF_DEFINE_KEPT_PRODUCTS(kKeptPortable)
GF_DEFINE_PRODUCT(kProductPortable, FloatPacking, &add_tile)
GF_DEFINE_ROWS(kRowsPortable)
