"""The operator ``group_advantages``; loss/advantages.py has the public function, csrc/group_advantages.h the kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_fast.ops.library import LIBRARY, define

define(
    "group_advantages(Tensor rewards, Tensor? group_offsets, int group_size, Tensor? reward_weights, int scale, bool leave_one_out, "
    "bool normalize_then_sum, float eps, Tensor? lengths=None, bool exclude_degenerate=False, int pass_at_k=0) "
    "-> (Tensor advantages, Tensor mean, Tensor std, Tensor degenerate)"
)


@torch.library.register_fake("grpo_fast::group_advantages", lib=LIBRARY)
def _group_advantages_fake(
    rewards: Tensor,  # [B] or [B, R]
    group_offsets: Tensor | None,  # [G + 1]
    group_size: int,
    reward_weights: Tensor | None,  # [R]
    scale: int,
    leave_one_out: bool,
    normalize_then_sum: bool,
    eps: float,
    lengths: Tensor | None = None,  # [B]
    exclude_degenerate: bool = False,
    pass_at_k: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_groups = rewards.shape[0] // group_size if group_offsets is None else group_offsets.shape[0] - 1
    per_group = rewards.new_empty(num_groups, dtype=torch.float32)
    advantages = rewards.new_empty(rewards.shape[0], dtype=torch.float32)
    return advantages, per_group, torch.empty_like(per_group), torch.empty_like(per_group, dtype=torch.bool)
