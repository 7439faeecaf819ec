// Compiles what follows for the instruction set GF_TARGET, if it is defined. The standard headers come before: their inline functions may
// be shared with code that runs on other processors.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#if defined(GF_TARGET)
#define GF_STRINGIFY(x) #x
#define GF_PRAGMA(x) _Pragma(GF_STRINGIFY(x))
#if defined(__clang__)
GF_PRAGMA(clang attribute push(__attribute__((target(GF_TARGET))), apply_to = function))
#else
#pragma GCC push_options
GF_PRAGMA(GCC target(GF_TARGET))
#endif
#endif
