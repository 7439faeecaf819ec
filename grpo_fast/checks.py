"""Argument checks: every error names the argument, what it was, what was expected and the cure, before anything is written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_debug = os.environ.get("GRPO_FAST_CHECK", "0") not in ("", "0")


@contextmanager
def debug_checks(enabled: bool = True) -> Iterator[None]:
    """Make every value check synchronous and exact on every device, as the environment variable GRPO_FAST_CHECK=1 does.

    On the CPU value checks always run. On a GPU reading a value stalls the stream, so there they run only inside this context.

    Example:
        >>> with debug_checks():
        ...     out = grpo_loss(logits, token_ids, advantages)
    """
    global _debug
    before, _debug = _debug, enabled
    try:
        yield
    finally:
        _debug = before


def value_checks_wanted(tensor: Tensor) -> bool:
    """Whether checks that read this tensor's values may run: they would stall a GPU, and cannot be traced by torch.compile."""
    return not torch.compiler.is_compiling() and (_debug or tensor.device.type == "cpu")
