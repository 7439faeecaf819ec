"""The operator of a matrix product on the CPU, summed in float32, whose bits depend on nothing but the operands.

PyTorch's products round to the operands' type on the CPU, and their bits vary with the shape of the call and the number of threads. Here
operands of float32, bfloat16 and float16 are multiplied exactly and summed in float32 (float16 is converted first); a result of 16 bits is
rounded once, at the end. An element of the result is a fixed sequence of operations over k: blocks of k are summed, and the sums added one
after the other, whatever the other rows and columns are and however threads share the work. The bits differ between instruction sets.

One operator serves the three products of an LM head; transposed views cost no copy::

    product_(logits, hidden, weight.t(), bias, False)                   # [n, V] = hidden @ weight.T + bias
    product_(hidden_gradient, dlogits, weight, None, False)             # [n, D] = dlogits @ weight
    product_(weight_gradient, dlogits.t(), hidden, None, True)          # [V, D] += dlogits.T @ hidden
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_fast.ops.library import LIBRARY, define

__all__ = ["SUM_BLOCK"]

# Sums over k may be divided among calls with accumulate=True: divided at multiples of this number, they have the bits of one call.
SUM_BLOCK = 64

# out = a @ b, or with bias a @ b + bias, or with accumulate out + a @ b.
# out: float32, bfloat16 or float16 [M, N] with contiguous, possibly padded rows, not overlapping a, b or bias in memory; a: [M, K] and
# b: [K, N], each float32, bfloat16 or float16 with any strides; bias: float32 [N], what the sums begin with, not together with accumulate.
define("product_(Tensor(a!) out, Tensor a, Tensor b, Tensor? bias, bool accumulate) -> ()")


@torch.library.register_fake("grpo_fast::product_", lib=LIBRARY)
def _product_fake(out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, accumulate: bool) -> None:
    return None
