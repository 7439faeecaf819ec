"""The arguments of the CUDA kernels, laid out as in csrc/cuda/grpo_loss_cluster.h and csrc/group_advantages.h."""

from __future__ import annotations

import ctypes
from ctypes import c_bool, c_double, c_float, c_int32, c_int64, c_uint64
from typing import Any

from grpo_fast.loss.kernel_settings import KERNEL_FIELDS

VIEWS = (
    "token_ids", "mask", "temperatures", "advantages", "weights", "entropy_weights", "old_logprobs", "ref_logprobs", "rollout_weights",
)  # fmt: skip


class TokenView(ctypes.Structure):
    """A [B, T] tensor."""

    _fields_ = [("data", c_uint64), ("sequence_stride", c_int64), ("token_stride", c_int64)]


def _config_type(field: Any) -> Any:
    if field.metadata.get("names"):
        return c_int64
    return c_bool if field.type == "bool" else c_double


class PolicyLossConfig(ctypes.Structure):
    """The settings of the loss."""

    _fields_ = [("surrogate", c_int64), *((field.name, _config_type(field)) for field in KERNEL_FIELDS)]


class ClusterLossArgs(ctypes.Structure):
    """Of the cluster kernel."""

    _fields_ = [
        ("logits", c_uint64),
        ("gradient", c_uint64),
        ("logits_strides", c_int64 * 2),
        ("gradient_strides", c_int64 * 2),
        *((name, c_int64) for name in ("sequences", "positions", "length", "vocabulary")),
        ("type", c_int32),
        *((name, TokenView) for name in VIEWS),
        *((name, c_float) for name in ("k", "cap_scale", "slope")),
        ("softcap", c_bool),
        ("config", PolicyLossConfig),
        ("loss_scale", c_double),
        ("only_active", c_bool),
        ("all_active", c_bool),
        *((name, c_uint64) for name in ("logprobs", "entropy", "loss", "metrics", "records")),
        ("force_cluster", c_int32),
        ("force_stages", c_int32),
    ]


class GroupAdvantagesArgs(ctypes.Structure):
    """Of group_advantages."""

    _fields_ = [
        *((name, c_uint64) for name in ("rewards", "group_offsets", "reward_weights", "advantages", "mean", "std", "degenerate")),
        *((name, c_uint64) for name in ("lengths", "y", "batch_moments", "sets")),
        *((name, c_int64) for name in ("num_rows", "num_rewards", "num_groups", "group_size", "scale", "pass_at_k")),
        ("eps", c_double),
        *(
            (name, c_bool)
            for name in ("rewards_are_double", "offsets_are_int64", "leave_one_out", "normalize_then_sum", "exclude_degenerate")
        ),
    ]


def layout_check() -> str:
    """A C++ program that compiles only if these structures are laid out as those of the sources."""
    lines = ["#include <cstddef>", '#include "cuda/grpo_loss_cluster.h"', '#include "group_advantages.h"']
    structures: tuple[type[ctypes.Structure], ...] = (TokenView, PolicyLossConfig, ClusterLossArgs, GroupAdvantagesArgs)
    for structure in structures:
        name = f"grpo_fast::{structure.__name__}" + "<float>" * (structure is TokenView)
        lines.append(f"static_assert(sizeof({name}) == {ctypes.sizeof(structure)});")
        for field, *_ in structure._fields_:
            lines.append(f"static_assert(offsetof({name}, {field}) == {getattr(structure, field).offset});")
    return "\n".join(lines)
