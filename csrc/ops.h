// The operators' C++ entry points, one per operator and device; registered in ops.cpp.
#pragma once
#include <torch/csrc/stable/tensor.h>
