#include "rows_impl.h"
GF_DEFINE_ROWS(kRowsPortable)
