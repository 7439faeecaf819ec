"""Large tensors on a CPU: new memory costs a page fault for every 4 KiB, which is a third of the time of a head's product.

Linux offers pages of 2 MiB to a process that asks for them; elsewhere nothing changes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_fast.ops import extension
from grpo_fast.ops.library import LIBRARY, define

__all__ = ["empty"]

# Requests huge pages for a contiguous tensor that nothing has been written to.
define("use_huge_pages_(Tensor(a!) x) -> ()")


@torch.library.register_fake("grpo_fast::use_huge_pages_", lib=LIBRARY)
def _use_huge_pages_fake(x: Tensor) -> None:
    return None


def empty(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a new contiguous tensor, not initialised: as ``torch.empty``, on a CPU in huge pages where the system has them."""
    x = torch.empty(shape, dtype=dtype, device=device)
    if device.type == "cpu" and extension.load():
        torch.ops.grpo_fast.use_huge_pages_.default(x)
    return x
