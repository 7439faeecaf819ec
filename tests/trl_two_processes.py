"""Run by tests/test_integrations_trl.py in processes of their own, which leave what they found in a file.

    python tests/trl_two_processes.py trl|ours MODEL FILE OPTIONS          the log of a run; under torchrun too
    torchrun ... tests/trl_two_processes.py sharded MODEL FILE OPTIONS     loss and gradients of one step, the model sharded by FSDP2

OPTIONS: of GRPOConfig, as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

torch.set_num_threads(1)

from ranks import part  # noqa: E402
from test_integrations_trl import batch, build, loss_of  # noqa: E402


def log_of_a_run(trainer: Any, out: Path) -> None:
    trainer.train()
    if trainer.accelerator.is_main_process:
        out.write_text(json.dumps({"processes": trainer.accelerator.num_processes, "logs": trainer.state.log_history}))


def sharded_step(trainer: Any, model_path: Path, out: Path) -> None:
    """accelerate knows no FSDP on a CPU, so that the model is sharded here, as accelerate does it: the root gives its parameters back after
    forward as well."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for module in (*trainer.model.model.layers, trainer.model):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    loss, gradients, _ = loss_of(trainer, batch(model_path))
    whole = {name: gradient.full_tensor() for name, gradient in gradients.items() if isinstance(gradient, DTensor)}
    assert whole.keys() == gradients.keys()
    if trainer.accelerator.is_main_process:
        torch.save({"processes": mesh.size(), "loss": loss, "gradients": whole}, out)


def main(which: str, model_path: str, out: str, options: str) -> None:
    import trl

    from grpo_fast.integrations.trl import GRPOTrainer

    trainer_class = trl.GRPOTrainer if which == "trl" else GRPOTrainer
    trainer = build(trainer_class, Path(model_path), Path(out).parent, **json.loads(options))
    if which == "sharded":
        sharded_step(trainer, Path(model_path), Path(out))
    else:
        log_of_a_run(trainer, Path(out))


if __name__ == "__main__":
    main(*sys.argv[1:])
    part()
