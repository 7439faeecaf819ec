"""The float32 head while a model generates: the sampler's logits are those of the loss, and not rounded to the model's 16-bit type."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from grpo_fast.head.precision import Precision
from grpo_fast.head.products import products_for
from grpo_fast.models.unwrap import inner_model, is_sharded
from grpo_fast.ops.invariance import is_batch_invariant

__all__ = ["float32_head"]


@contextmanager
def float32_head(model: nn.Module) -> Iterator[None]:
    """Let the model's LM head return float32 logits inside the ``with``, as ``logits_dtype="float32"`` computes them.

    It acts where the operands have 16 bits, by the model's type or by autocast, and the head is a plain Linear. An adapter on the head and
    a quantised head keep their own forward. The weight is converted at most once.

    Args:
        model: the model, wrapped or not; nothing is changed if its parameters are sharded.
    """
    head = None if is_sharded(model) else inner_model(model).get_output_embeddings()
    if type(head) is not nn.Linear or "forward" in vars(head):
        yield
        return
    converted: dict[torch.dtype, tuple[Tensor, Tensor | None]] = {}

    def forward(hidden: Tensor) -> Tensor:
        autocast, device = torch.is_autocast_enabled(hidden.device.type), hidden.device.type
        dtype = torch.get_autocast_dtype(device) if autocast else torch.promote_types(hidden.dtype, head.weight.dtype)
        if dtype not in (torch.bfloat16, torch.float16):
            return nn.functional.linear(hidden, head.weight, head.bias)
        if dtype not in converted:
            converted[dtype] = head.weight.detach().to(dtype), None if head.bias is None else head.bias.detach().float()
        weight, bias = converted[dtype]
        rows = hidden.reshape(-1, hidden.shape[-1]).to(dtype)
        precision = Precision(dtype, torch.float32, is_batch_invariant())
        logits = precision.new_logits(rows.shape[0], weight.shape[0], rows.device)
        with torch.autocast(device, enabled=False):
            products_for(precision, rows.device).logits(logits, rows, weight, bias)
        return logits.view(*hidden.shape[:-1], weight.shape[0])

    head.forward = forward  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del head.forward
