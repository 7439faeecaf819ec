"""A run that is killed by SIGKILL at random moments and resumed ends as an undisturbed one."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hang import HANG
from trainer_cases import logs, trainer

from grpo_fast.trainer.checkpoints import last_checkpoint

STEPS = 60


def main(output: Path) -> None:
    torch.set_num_threads(1)
    settings = {"steps_per_generation": 2, "per_device_train_batch_size": 8, "num_iterations": 2}
    saving = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 3}
    run = trainer(output, max_steps=STEPS, **settings, **saving)
    run.train(resume_from_checkpoint=last_checkpoint(output))
    (output / "losses.json").write_text(json.dumps([log["loss"] for log in logs(run)]))


@pytest.mark.sweep
def test_killed_at_any_moment(tmp_path: Path) -> None:
    rng, kills = random.Random(int(os.environ.get("SEED", "0"))), 0

    def start(folder: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, __file__, str(tmp_path / folder)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    assert start("undisturbed").wait(timeout=HANG) == 0
    killed = tmp_path / "killed"
    while kills < 4:
        process = start("killed")
        reached = last_checkpoint(killed)
        while last_checkpoint(killed) == reached and process.poll() is None:  # until the resumed run has saved a checkpoint
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 1))
        if process.poll() is not None:
            break
        process.kill()
        process.wait()
        kills += 1
    assert start("killed").wait(timeout=HANG) == 0
    assert kills >= 2
    assert json.loads((killed / "losses.json").read_text()) == json.loads((tmp_path / "undisturbed" / "losses.json").read_text())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
