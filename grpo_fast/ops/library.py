"""The torch.library of grpo_fast, and how its operators are called.

Each operator has a file in this folder with its schema, its fake implementation (the shapes, for torch.compile) and its autograd. The C++
kernels (csrc/) and the Triton kernels (kernels/fused, by triton_registration.py) attach themselves to these schemas, and PyTorch's
dispatcher chooses by the device of the arguments.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._ops import OpOverload

__all__ = ["LIBRARY", "call_below_autograd", "define"]

LIBRARY = torch.library.Library("grpo_fast", "DEF")


def define(schema: str) -> None:
    """Define an operator that works under torch.compile."""
    LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)


LIBRARY.define("cpu_isa() -> int")  # the instruction set that the C++ kernels run with, see backends.cpu_isa
LIBRARY.define("cpu_matrix_isa() -> int")  # that of product_ with bfloat16 operands: also 3, AMX


def call_below_autograd(operator: OpOverload, *arguments: Any) -> Any:
    """Call an operator's kernel directly, for an autograd.Function that has its own backward.

    It skips the Python of the registered autograd, which takes a third of the time of a small call.
    """
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)
