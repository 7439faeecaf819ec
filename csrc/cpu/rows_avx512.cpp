#if defined(__x86_64__) && defined(__GNUC__)
#if defined(__clang__)
#define GF_TARGET "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"
#else
#define GF_TARGET "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,prefer-vector-width=512"
#endif
#include "rows_impl.h"
GF_DEFINE_ROWS(kRowsAvx512)
#endif
