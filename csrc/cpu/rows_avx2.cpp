#if defined(__x86_64__) && defined(__GNUC__)
#define GF_TARGET "avx2,fma"
#include "rows_impl.h"
GF_DEFINE_ROWS(kRowsAvx2)
#endif
