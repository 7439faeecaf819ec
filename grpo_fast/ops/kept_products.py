"""The operators of an LM head at the ids of kept sets: its logits, and from their gradient those of hidden states and weight.

Hidden states are ``[n, D]`` and the weight ``[V, D]``, float32, bfloat16 or float16 and contiguous along D. ``columns``, int64 ``[n, K]``,
are the rows of the weight that token n needs, negative where it needs fewer than K. Everything is summed in float32, in an order that does
not depend on the other tokens; no [n, V] matrix and no copy of weight rows exists.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_fast.ops.library import LIBRARY, define

__all__: list[str] = []

# out[n, k] = hidden[n] . weight[columns[n, k]]; 0 where the column is negative
define("kept_logits(Tensor hidden, Tensor weight, Tensor columns) -> Tensor")
# out[n] = sum over k of gradient[n, k] * weight[columns[n, k]], float32 [n, D]; gradient: float32 [n, K]
define("kept_hidden_gradient(Tensor gradient, Tensor weight, Tensor columns) -> Tensor")
# into[v] += sum of gradient[n, k] * hidden[n] over the places where columns[n, k] = v, in the order of the tokens; into: float32 [V, D]
define("add_kept_weight_gradient_(Tensor(a!) into, Tensor gradient, Tensor hidden, Tensor columns) -> ()")


@torch.library.register_fake("grpo_fast::kept_logits", lib=LIBRARY)
def _logits_fake(hidden: Tensor, weight: Tensor, columns: Tensor) -> Tensor:
    return torch.empty_like(columns, dtype=torch.float32)


@torch.library.register_fake("grpo_fast::kept_hidden_gradient", lib=LIBRARY)
def _hidden_gradient_fake(gradient: Tensor, weight: Tensor, columns: Tensor) -> Tensor:
    return gradient.new_empty(columns.shape[0], weight.shape[1])


@torch.library.register_fake("grpo_fast::add_kept_weight_gradient_", lib=LIBRARY)
def _weight_gradient_fake(into: Tensor, gradient: Tensor, hidden: Tensor, columns: Tensor) -> None:
    return None
