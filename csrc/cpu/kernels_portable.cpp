// The CPU kernels for any processor.
// clang-format off: the order of these matters
#include "rows.h"
#include "target_begin.h"
#include "rows_impl.h"
#include "target_end.h"
// clang-format on

GF_DEFINE_ROWS(kRowsPortable)
