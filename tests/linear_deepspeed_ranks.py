"""Processes whose tiny model DeepSpeed ZeRO-3 has partitioned; test_linear_deepspeed.py starts them and looks at what they leave.

By hand: python tests/linear_deepspeed_ranks.py RANK PROCESSES FOLDER PORT
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from linear_sharded_ranks import KINDS, T, batch, loss_of, mean_over_processes
from peers import PEERS
from torch import Tensor

import grpo_fast as gf
from grpo_fast.head.weights import is_partitioned


def engine_of(model: Any, processes: int) -> Any:
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 2,
        "train_batch_size": 2 * processes,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    return deepspeed.initialize(model=model, optimizer=torch.optim.SGD(trained, lr=0.1), config=config)[0]


def partitioned(model: Any, rank: int, processes: int, by: str) -> dict[str, Tensor]:
    """Gradients as each process finds them together with the others."""
    from deepspeed.utils import safe_get_full_grad

    engine = engine_of(model, processes)
    assert all(is_partitioned(p) for p in engine.module.parameters())
    with torch.no_grad():
        gf.linear_logprobs_from(engine, batch(rank)["inputs"], batch(rank)["inputs"]["input_ids"][:, -T:])
    engine.backward(loss_of(engine, batch(rank), by))
    assert all(is_partitioned(p) for p in engine.module.parameters())
    return {name: safe_get_full_grad(p) for name, p in engine.module.named_parameters() if p.requires_grad}


def main() -> None:
    rank, processes, folder, port = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
    sys.path.append(str(PEERS))
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    os.environ |= {"LOCAL_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    torch.set_num_threads(1)
    import deepspeed

    # Collectives of its own, compiled at the first start, behind a lock that a killed process leaves to the next ones: gloo has them all.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    results: dict[str, Any] = {}
    for by in ("loss", "logprobs"):
        for kind, make in KINDS.items():
            results[f"{kind} {by}"] = mean_over_processes(make(), processes, by)
            results[f"{kind} {by} zero"] = partitioned(make(), rank, processes, by)
    torch.save(results, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
