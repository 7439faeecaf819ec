// The CPU kernels for any processor.
// clang-format off: the order of these matters
#include "kept_products.h"
#include "rows.h"
#include "target_begin.h"
#include "kept_products_impl.h"
#include "rows_impl.h"
#include "target_end.h"
// clang-format on

GF_DEFINE_KEPT_PRODUCTS(kKeptPortable)
GF_DEFINE_ROWS(kRowsPortable)
