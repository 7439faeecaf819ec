"""The operators of grpo_fast, registered with torch.library: schema, fake and autograd in one place, devices by PyTorch's dispatcher.

The C++ kernels (csrc/) and the Triton kernels (kernels/fused) attach themselves to these schemas for their device.
"""

from __future__ import annotations

import torch

LIBRARY = torch.library.Library("grpo_fast", "DEF")
