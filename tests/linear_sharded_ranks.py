"""Two processes train a tiny model through its fused head, sharded (FSDP2) or wrapped (DDP); test_linear_sharded.py starts them.

By hand: python tests/linear_sharded_ranks.py RANK PROCESSES FOLDER
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from hang import HANG
from test_linear_models import P, T, V, gradients, tiny, with_lora
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import grpo_fast as gf
from grpo_fast.head.weights import gathered

KINDS: dict[str, Callable[[], Any]] = {"tied": lambda: tiny("Qwen2 tied"), "untied": lambda: tiny("Qwen2"), "lora": with_lora}


def batch(rank: int) -> dict[str, Any]:
    """Each process has other sequences."""
    generator = torch.Generator().manual_seed(10 + rank)
    ids = torch.randint(3, V, (2, P + T), generator=generator)
    return {"inputs": {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, "advantages": torch.tensor([1.0, -0.4]) * (rank + 1)}


def loss_of(model: Any, b: dict[str, Any], by: str) -> Tensor:
    ids = b["inputs"]["input_ids"][:, -T:]
    if by == "loss":
        return gf.linear_loss_from(model, b["inputs"], ids, b["advantages"], temperature=0.9, chunk_bytes=3 * 4 * V).loss
    return -(gf.linear_logprobs_from(model, b["inputs"], ids).logprobs * b["advantages"].unsqueeze(1)).mean()


def step(model: Any, b: dict[str, Any], by: str) -> None:
    """Forward and backward; twice, with the first not counted, for what a wrapper does differently once it has begun."""
    for _ in range(2):
        model.zero_grad()
        loss_of(model, b, by).backward()


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def mean_over_processes(model: nn.Module, processes: int, by: str) -> dict[str, Tensor]:
    """What one process has, without any wrapper."""
    found = []
    for rank in range(processes):
        step(model, batch(rank), by)
        found.append(gradients(model))
    return {name: sum(x[name] for x in found) / processes for name in found[0]}  # type: ignore[misc]


def sharded(kind: str, rank: int, by: str, reshard: bool) -> dict[str, Tensor]:
    model = KINDS[kind]()
    inner = model.get_base_model() if kind == "lora" else model
    for layer in inner.model.layers:
        fully_shard(layer)
    if kind != "tied":
        fully_shard(inner.lm_head)
    fully_shard(model, reshard_after_forward=reshard)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    with torch.no_grad():  # an evaluation in between leaves the root's parameters gathered
        gf.linear_logprobs_from(model, batch(rank)["inputs"], batch(rank)["inputs"]["input_ids"][:, -T:])
    step(model, batch(rank), by)
    return {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def wrapped(kind: str, rank: int, by: str, unused: bool) -> dict[str, Tensor]:
    model = DistributedDataParallel(KINDS[kind](), find_unused_parameters=unused)
    step(model, batch(rank), by)
    return {name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.grad is not None}


def one_weight(rank: int, processes: int) -> dict[str, Tensor]:
    """A head's weight as a DTensor, its rows divided unevenly; and what does not concern `gathered`."""
    mesh = init_device_mesh("cpu", (processes,))
    torch.manual_seed(0)
    full = torch.randn(7, 4)
    weight = nn.Parameter(distribute_tensor(full, mesh, [Shard(0)]))
    plain = nn.Parameter(full.clone())
    assert gathered(plain) is plain
    hidden = torch.randn(2, 3, 4) * (rank + 1)
    out = gf.linear_grpo_loss(hidden, weight, torch.arange(6).view(2, 3), torch.tensor([1.0, -1.0]))
    out.loss.backward()
    with torch.no_grad():
        assert not gathered(weight).requires_grad
    assert isinstance(weight.grad, DTensor)
    each = []
    for other in range(processes):
        mine = nn.Parameter(full.clone())
        gf.linear_grpo_loss(hidden / (rank + 1) * (other + 1), mine, torch.arange(6).view(2, 3), torch.tensor([1.0, -1.0])).loss.backward()
        assert mine.grad is not None
        each.append(mine.grad)
    return {"found": whole(weight.grad), "expected": torch.stack(each).sum(0) / processes}


def main() -> None:
    rank, processes, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(folder / "store"), processes)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=processes, timeout=timedelta(seconds=HANG))
    results: dict[str, Any] = {"one weight": one_weight(rank, processes)}
    for kind in KINDS:
        for by in ("loss", "logprobs"):
            results[f"{kind} {by}"] = mean_over_processes(KINDS[kind](), processes, by)
            for reshard in (True, False):
                results[f"{kind} {by} fsdp {reshard}"] = sharded(kind, rank, by, reshard)
            for unused in (True, False):
                results[f"{kind} {by} ddp {unused}"] = wrapped(kind, rank, by, unused)
    torch.save(results, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
