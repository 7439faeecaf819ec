"""Two processes: the same step as one makes alone, and a run that every process stops and resumes together."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from hang import HANG
from ranks import Start, part, run_together
from trainer_cases import ROWS, Scripted, logs, model, parameters, trainer

import grpo_fast as gf
from grpo_fast.models.forward import ModelForward
from grpo_fast.trainer.rollout import Rollout

EXAMPLE = Path(__file__).parents[1] / "examples" / "two_processes.py"
GDPO = "normalize_then_sum"


def half_equal(prompts: Any, completions: Any, completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """Equal rewards for every second prompt, by its digits."""
    odd = [sum(map(int, filter(str.isdigit, str(prompt)))) % 2 for prompt in prompts]
    return [0.3 if equal else sum(token % 2 for token in ids) / len(ids) for equal, ids in zip(odd, completion_ids, strict=True)]


RUNS: dict[str, dict[str, Any]] = {
    "dapo": {"max_steps": 2},
    "grpo": {"loss_type": "grpo", "mask_truncated_completions": True, "beta": 0.1},
    "several steps a rollout": {"steps_per_generation": 4, "num_iterations": 2, "max_steps": 4, "multi_objective_aggregation": GDPO},
    "groups cut apart": {"num_generations": 16, "scale_rewards": "batch", "top_entropy_quantile": 0.5},
    "equal groups left out": {"rewards": half_equal, "exclude_degenerate": True, "scale_rewards": "tokens", "loss_type": "grpo"},
}


def settings(name: str, processes: int) -> dict[str, Any]:
    rows = {"rows": stream} if name == "grpo" else {}
    common = {"learning_rate": 1e-3, "per_device_train_batch_size": 8 // processes, "gradient_accumulation_steps": 2, "metrics_on": "all"}
    return {**common, **rows, **RUNS[name]}


def stream() -> list[dict[str, Any]]:
    """A stream of which only the main process has the right rows."""
    return ROWS if os.environ.get("RANK", "0") == "0" else [{**row, "prompt": "sort 0000="} for row in ROWS]


class Known(Scripted):
    """One completion per prompt, on every process: a completion depends on its index in the call, which differs between processes."""

    def __init__(self, first: int) -> None:
        super().__init__()
        self.first = first  # rows before this process's

    def generate(self, prompts: Any, params: Any) -> Any:
        return super().generate([*[prompts[0]] * self.first, *prompts], params)[self.first :]


def measured(output: Path, name: str, processes: int) -> dict[str, Any]:
    of = model()
    rank = int(os.environ.get("RANK", "0"))
    sampler = Known(16 // processes * rank) if RUNS[name].get("num_generations") == 16 else Scripted()
    run = trainer(output, of=of, sampler=sampler, **settings(name, processes))
    run.train()
    keys = ("loss", "grad_norm", "reward", "reward_std", "reward_std_group", "entropy", "completions/mean_length", "frac_reward_zero_std")
    checksum = {key: value.double().sum().item() for key, value in parameters(of).items()}
    evaluated = run.evaluate(ROWS[:5]) if name == "dapo" else {}  # five rows on two processes
    found = {key: value for key, value in evaluated.items() if "reward" in key or "completions" in key}
    return {"evaluated": found, "logs": [{key: log[key] for key in keys if key in log} for log in logs(run)], "checksum": checksum}


def sharded_is_the_same() -> float:
    """Loss, log-probabilities and gradient of a model under FSDP2, against the same model whole: the largest difference."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    rng = random.Random(0)
    completions = [[rng.randrange(3, 20) for _ in range(length)] for length in (3, 5, 2, 4)]
    rows = Rollout([[3, 4, 5]] * 4, completions, torch.ones(4), torch.tensor([1.0, -1.0, 0.5, -0.5]), torch.ones(4).bool())
    whole, sharded, mesh = model(), model(), init_device_mesh("cpu", (2,))
    for layer in (*sharded.model.layers, sharded):
        fully_shard(layer, mesh=mesh)
    gaps = []
    for fused in (True, False):
        forward = ModelForward(Accelerator(cpu=True), 0, fused_head=fused)
        expected, found = (forward.loss(of, rows, config=gf.LossConfig(), num_items=14) for of in (whole, sharded))
        expected.loss.backward()
        found.loss.backward()
        gaps += [(found.loss - expected.loss).abs(), *_gradient_gaps(whole, sharded)]
        whole.zero_grad()
        sharded.zero_grad()
        gaps.append((forward.logprobs(sharded, rows, batch_size=2).logprobs - expected.logprobs).abs().max())
    return float(torch.stack(gaps).max())


def _gradient_gaps(whole: Any, sharded: Any) -> list[torch.Tensor]:
    gaps = []
    for theirs, ours in zip(whole.parameters(), sharded.parameters(), strict=True):
        assert theirs.grad is not None and ours.grad is not None
        gaps.append((ours.grad.full_tensor() - theirs.grad).abs().max())
    return gaps


def main(output: Path) -> None:
    """In each of the processes."""
    torch.set_num_threads(1)
    found = {name: measured(output / name.replace(" ", "_"), name, 2) for name in RUNS}
    # Half the rollout is used up at step 1: each process has its part in the checkpoint.
    midway: dict[str, Any] = {
        "steps_per_generation": 2,
        "per_device_train_batch_size": 4,
        "save_strategy": "steps",
        "save_steps": 1,
        "max_steps": 4,
        "rows": stream,
    }
    whole = trainer(output / "whole", **midway)
    whole.train()
    resumed = trainer(output / "whole", **midway)
    resumed.train(resume_from_checkpoint=str(output / "whole" / "checkpoint-1"))
    same = [log["loss"] for log in logs(whole)] == [log["loss"] for log in logs(resumed)]
    gap = sharded_is_the_same()
    if os.environ["RANK"] == "0":
        (output / "found.json").write_text(json.dumps({**found, "resumed the same": same, "sharded": gap}))


def launched(*arguments: str) -> str:
    """What `accelerate launch` printed."""
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--main_process_port=0", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def run_as_launched(script: Path, output: Path, *arguments: str) -> None:
    """The script in two processes with the environment that `accelerate launch` with these arguments gives it, but for the launcher: it and
    each of the processes would import torch and transformers. test_the_example_starts_two_processes_as_it_says launches one in earnest."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    asked = ["--num_processes", "2", "--main_process_port=0", *arguments, str(script)]
    args = _validate_launch_command(launch_command_parser().parse_args(asked))[0]
    common = {**prepare_multi_gpu_env(args), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": args.master_port, "WORLD_SIZE": "2"}
    common |= {"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "2"}
    run_together(script, [Start([str(output)], {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)])


@pytest.mark.slow
def test_the_example_starts_two_processes_as_it_says(tmp_path: Path) -> None:
    command = re.search(r"accelerate launch (--multi_gpu .*?) examples/two_processes.py (--cpu) ", EXAMPLE.read_text())
    assert command is not None
    arguments = [*command[1].split(), str(EXAMPLE), command[2]]
    assert "2 processes, losses [" in launched(*arguments, "--steps", "1", "--output", str(tmp_path))


@pytest.mark.slow
def test_two_processes_make_the_step_of_one(tmp_path: Path) -> None:
    run_as_launched(Path(__file__), tmp_path, "--multi_gpu")
    found = json.loads((tmp_path / "found.json").read_text())
    assert found.pop("resumed the same")
    assert found.pop("sharded") < 1e-6
    for name in RUNS:
        expected = measured(tmp_path / "alone", name, 1)
        for theirs, ours in zip(found[name]["logs"], expected["logs"], strict=True):
            for key, value in ours.items():
                assert theirs[key] == pytest.approx(value, abs=1e-5), (name, key)
        assert found[name]["evaluated"] == pytest.approx(expected["evaluated"], abs=1e-6)
        for key, value in expected["checksum"].items():
            assert found[name]["checksum"][key] == pytest.approx(value, abs=2e-4), (name, key)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    part()
