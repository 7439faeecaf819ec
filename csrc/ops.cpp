// Which C++ function implements which operator on which device, and nothing else. The schemas stand in grpo_fast/ops.py beside their fake
// and autograd formulas, so that they exist (for the Triton backend, say) where this extension was not built.
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include "ops.h"

PyMODINIT_FUNC PyInit__C() {  // importing grpo_fast._C runs the static registrations below; the module itself is empty
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}

STABLE_TORCH_LIBRARY_IMPL(grpo_fast, CPU, m) {
  m.impl("group_advantages", TORCH_BOX(&group_advantages_cpu));
}
