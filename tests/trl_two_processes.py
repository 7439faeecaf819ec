"""Run by tests/test_integrations_trl.py under torchrun: a few steps of a trainer of TRL's or ours in two processes, logs to a file.

torchrun --nproc-per-node 2 tests/trl_two_processes.py <trl|ours> <model folder> <file> <options as JSON>
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

torch.set_num_threads(1)

from test_integrations_trl import build  # noqa: E402


def main(which: str, model_path: str, out: str, options: str) -> None:
    import trl

    from grpo_fast.integrations.trl import GRPOTrainer

    trainer = build(GRPOTrainer if which == "ours" else trl.GRPOTrainer, Path(model_path), Path(out).parent, **json.loads(options))
    trainer.train()
    if trainer.accelerator.is_main_process:
        Path(out).write_text(json.dumps({"processes": trainer.accelerator.num_processes, "logs": trainer.state.log_history}))


if __name__ == "__main__":
    main(*sys.argv[1:])
