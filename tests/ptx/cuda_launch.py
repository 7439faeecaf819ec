"""The launches of the CUDA kernels on CPU tensors. They take the places of the operators of the same names."""

from __future__ import annotations

import ctypes
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from grpo_fast.loss.kernel_settings import KERNEL_FIELDS
from grpo_fast.ops.grpo_loss import METRICS

from .cuda_arguments import VIEWS, ClusterLossArgs, GroupAdvantagesArgs, PolicyLossConfig, TokenView
from .cuda_compile import entry_of, ptx_of
from .launch import EXACT, Hardware, launch
from .parser import Entry, parse
from .tensors import TensorMemory
from .threads import Grid

SOURCE = "grpo_loss_cluster.cu"
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MANGLED = {torch.float32: "If", torch.bfloat16: "BFloat", torch.float16: "Half"}  # in the names of the kernels
CLUSTER_THREADS, TOTAL_THREADS = 608, 512
FIELDS = {each[0]: each[1] for each in PolicyLossConfig._fields_}
CONVERSIONS: dict[Any, Any] = {ctypes.c_double: float, ctypes.c_int64: int, ctypes.c_bool: bool}
HEAD = 4096  # bytes of shared memory besides the slices of rows


@dataclass
class ClusterLauncher:
    """Runs the cluster kernel and the kernel that adds its records. edit: changes the PTX of the former."""

    blocks: int = 2  # per cluster
    stages: int = 2
    clusters: int = 1  # resident at once
    hardware: Hardware = EXACT
    edit: Callable[[str], str] | None = None
    launched: set[tuple[str, str]] = field(default_factory=set)

    def loss(self, logits: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        """The operator grpo_loss_cluster."""
        *others, want_gradient = arguments
        logits = logits if logits.stride(-1) == 1 else logits.contiguous()
        gradient = torch.empty(logits.shape, dtype=logits.dtype) if want_gradient else None
        return *self.loss_to(gradient, logits, *others), torch.empty(0, dtype=logits.dtype) if gradient is None else gradient

    def loss_(self, logits: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        """The operator grpo_loss_cluster_."""
        return self.loss_to(logits, logits, *arguments)

    def loss_to(self, gradient: Tensor | None, logits: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        """Write the gradient to a tensor of the shape of the logits; returns loss, log-probabilities, entropy and metrics."""
        token_ids = arguments[0]
        outputs = [torch.empty(shape, dtype=torch.float32) for shape in ((), token_ids.shape, token_ids.shape, (len(METRICS),))]
        records = torch.empty((token_ids.numel(), 5), dtype=torch.float32)
        memory = TensorMemory()
        given = cluster_arguments(memory, gradient, logits, *arguments)
        for name, tensor in zip(("loss", "logprobs", "entropy", "metrics", "records"), (*outputs, records), strict=True):
            setattr(given, name, memory.address(tensor, name))
        vectors = logits.shape[2] // (16 // logits.element_size())
        slice_vectors = max(ceil_div(ceil_div(vectors, self.blocks), 8) * 8, 8)
        rows = logits.shape[0] * logits.shape[1]
        grid = Grid(self.blocks * min(rows, self.clusters), CLUSTER_THREADS, self.blocks)
        parameters = bytes(given) + struct.pack("qi", slice_vectors, self.stages)
        if rows > 0:
            entry = self._entry(logits.dtype, bool(given.softcap))
            launch(entry, grid, memory.memory, parameters, HEAD + self.stages * slice_vectors * 16, self.hardware)
        total = entry_of(SOURCE, "_total_kernel")
        parameters = struct.pack("QqQQ", given.records, token_ids.numel(), given.loss, given.metrics)
        launch(total, Grid(1, TOTAL_THREADS), memory.memory, parameters, 0, self.hardware)
        memory.write_back()
        return tuple(outputs)

    def _entry(self, dtype: torch.dtype, capped: bool) -> Entry:
        parts = MANGLED[dtype], f"Lb{int(capped)}E"
        self.launched.add(parts)
        if self.edit is None:
            return entry_of(SOURCE, *parts)
        (entry,) = parse(self.edit(ptx_of(SOURCE)), *parts).values()
        return entry


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def cluster_arguments(
    memory: TensorMemory, gradient: Tensor | None, logits: Tensor, token_ids: Tensor, mask: Tensor, advantages: Tensor, weights: Tensor,
    entropy_weights: Tensor | None, old_logprobs: Tensor | None, ref_logprobs: Tensor | None, rollout_weights: Tensor | None,
    temperatures: Tensor | None, temperature: float, softcap: float, logit_scale: float, loss_scale: float, settings: list[float],
    only_active: bool,
) -> ClusterLossArgs:  # fmt: skip
    """As cluster_loss in csrc/cuda/grpo_loss_cluster_tensors.h makes them of tensors."""
    given = ClusterLossArgs(type=TYPES[logits.dtype], softcap=softcap > 0, loss_scale=loss_scale, only_active=only_active)
    given.logits, given.gradient = memory.address(logits, "logits"), memory.address(gradient, "gradient")
    given.logits_strides[:] = logits.stride()[:2]
    given.gradient_strides[:] = (0, 0) if gradient is None else gradient.stride()[:2]
    given.sequences, given.positions, given.vocabulary = logits.shape
    given.length = token_ids.shape[1]
    tensors = (token_ids, mask, temperatures, advantages, weights, entropy_weights, old_logprobs, ref_logprobs, rollout_weights)
    for name, tensor in zip(VIEWS, tensors, strict=True):
        strides = (0, 0) if tensor is None or tensor.dim() == 0 else [tensor.stride(i) if tensor.shape[i] > 1 else 0 for i in (0, 1)]
        setattr(given, name, TokenView(memory.address(tensor, name), *strides))
    slope = logit_scale if temperatures is not None else logit_scale / temperature
    cap_scale = logit_scale / softcap if softcap > 0 else 1.0
    given.k, given.slope, given.cap_scale = math.log2(math.e) * slope / cap_scale, slope, cap_scale
    for name, number in zip(("surrogate", *(each.name for each in KERNEL_FIELDS)), settings, strict=True):
        setattr(given.config, name, CONVERSIONS[FIELDS[name]](number))
    given.all_active = given.config.beta != 0 or given.config.entropy_coef != 0
    return given


def group_advantages(
    rewards: Tensor, group_offsets: Tensor | None, group_size: int, reward_weights: Tensor | None, scale: int, leave_one_out: bool,
    normalize_then_sum: bool, eps: float, lengths: Tensor | None = None, exclude_degenerate: bool = False, pass_at_k: int = 0,
    *, hardware: Hardware = EXACT,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The operator group_advantages, launched as csrc/cuda/group_advantages_cuda.cu does."""
    rows, groups = rewards.shape[0], rewards.shape[0] // group_size if group_offsets is None else group_offsets.shape[0] - 1
    outputs = (torch.empty(rows), torch.empty(groups), torch.empty(groups), torch.empty(groups, dtype=torch.bool))
    if groups == 0:
        return outputs
    memory = TensorMemory()
    names = ("rewards", "group_offsets", "reward_weights", "lengths", "advantages", "mean", "std", "degenerate")
    tensors = (rewards, group_offsets, reward_weights, lengths, *outputs)
    given = GroupAdvantagesArgs(
        **{name: memory.address(tensor, name) for name, tensor in zip(names, tensors, strict=True)},
        num_rows=rows, num_rewards=rewards.shape[1] if rewards.dim() == 2 else 1, num_groups=groups, group_size=group_size, scale=scale,
        pass_at_k=pass_at_k, eps=eps, rewards_are_double=rewards.dtype == torch.float64, leave_one_out=leave_one_out,
        offsets_are_int64=group_offsets is not None and group_offsets.dtype == torch.int64, normalize_then_sum=normalize_then_sum,
        exclude_degenerate=exclude_degenerate,
    )  # fmt: skip
    between = torch.empty(3 * rows + 3 * groups, dtype=torch.float64)
    uses_batch = pass_at_k == 0 and (scale in (2, 4) or normalize_then_sum)
    if pass_at_k > 0:
        given.sets = memory.address(between, "sets")
    elif uses_batch:
        given.y = memory.address(between, "y")
        given.batch_moments = given.y + 8 * rows
    short = rows <= 512 * groups
    threads, teams = (256, 8) if short else (512, 1)
    entry = entry_of("group_advantages_cuda.cu", "ILi1ELi8EE" if short else "ILi16ELi16EE")
    one_block = uses_batch and rows <= 8192 and groups <= 8192
    launches = [(1 if one_block else min(65536, ceil_div(groups, teams)), 3 if one_block else 1)]
    if uses_batch and not one_block and rows > 0:
        launches.append((min(128, ceil_div(rows, threads)), 2))
    for blocks, stages in launches:
        launch(entry, Grid(blocks, threads), memory.memory, bytes(given) + struct.pack("i", stages), 0, hardware)
    memory.write_back()
    return outputs
