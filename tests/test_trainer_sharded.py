"""Whole runs whose model is divided between two processes by FSDP2, as accelerate sets it up: drawing, evaluating, saving, resuming, LoRA.

accelerate supports FSDP on accelerators only: the test makes it believe that two processes on a CPU are two GPUs.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import part
from test_trainer_distributed import run_as_launched
from trainer_cases import ROWS, Scripted, logs, model, trainer

FSDP2 = "--use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP --fsdp_transformer_layer_cls_to_wrap Qwen2DecoderLayer"
KEYS = ("loss", "grad_norm", "entropy", "reward", "kl")
COMMON: dict[str, Any] = {"gradient_accumulation_steps": 2, "max_steps": 4, "learning_rate": 1e-3, "metrics_on": "all", "beta": 0.1}


def lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)


def losses(output: Path, *, processes: int, resume: int | None = None, **settings: Any) -> list[dict[str, float]]:
    torch.manual_seed(0)  # of LoRA's weights
    run = trainer(output, **{"of": model(), **COMMON, "per_device_train_batch_size": 8 // processes, **settings})
    assert (processes == 2) == hasattr(run.accelerator.state, "fsdp_plugin") == (str(run.accelerator.distributed_type).endswith("FSDP"))
    run.train(resume_from_checkpoint=None if resume is None else str(output / f"checkpoint-{resume}"))
    return [{key: log[key] for key in KEYS if key in log} for log in logs(run)]


def spread(ref_logprobs: Any, **columns: Any) -> list[float]:
    """Reads the reference: of completions that one process has more of than the other, since some groups are drawn again."""
    return [float(sum(values) > -20) for values in ref_logprobs]


def as_two_gpus() -> None:
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    def on_cpu(self: Any) -> None:
        self.device = torch.device("cpu")

    torch.distributed.init_process_group("gloo")
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = on_cpu


def main(output: Path) -> None:
    """In each of the processes."""
    torch.set_num_threads(1)
    as_two_gpus()
    saving: dict[str, Any] = {
        "steps_per_generation": 4,
        "save_strategy": "steps",
        "save_steps": 1,
    }  # half a rollout is in every other checkpoint
    found: dict[str, Any] = {"whole": losses(output, processes=2, sampler=Scripted(), **saving)}
    found["resumed"] = losses(output, processes=2, sampler=Scripted(), resume=3, **{**saving, "save_strategy": "no"})
    model().save_pretrained(output / "model")  # by name, and loaded in one process alone: accelerate's default
    torch.distributed.barrier()
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "true"
    found["by name"] = losses(output / "by name", processes=2, of=str(output / "model"), sampler=Scripted(), steps_per_generation=4)
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    found["lora"] = losses(output / "lora", processes=2, sampler=Scripted(), peft_config=lora())
    # Their own completions, which differ from one process's: it is enough that they are those of the policy.
    drawing: dict[str, Any] = {
        "eval_dataset": ROWS[:5],
        "eval_strategy": "steps",
        "eval_steps": 2,
        "max_steps": 2,
        "sampler_tolerance": 1e-4,
    }
    for name, settings in {
        "drawn": {"gradient_checkpointing": True},
        "drawn with lora": {"peft_config": lora(), "rewards": [spread], "dynamic_sampling_attempts": 2},
    }.items():
        run = trainer(output / "drawn", of=model(), per_device_train_batch_size=4, **{**COMMON, **drawing, **settings})
        run.train()
        found[name] = [logs(run)[0]["sampling/sampling_logp_difference/max"], run.state.log_history[-2].get("eval_rounds")]
    with pytest.raises(ValueError, match="sync_ref_model is True with a sharded model"):
        losses(output / "synced", processes=2, sampler=Scripted(), sync_ref_model=True)
    if os.environ["RANK"] == "0":
        (output / "found.json").write_text(json.dumps(found))


@pytest.mark.slow
def test_divided_between_two_processes_it_trains_as_in_one(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    run_as_launched(Path(__file__), tmp_path, *FSDP2.split())
    found = json.loads((tmp_path / "found.json").read_text())
    whole = losses(tmp_path / "alone", processes=1, sampler=Scripted(), steps_per_generation=4)
    with_lora = losses(tmp_path / "alone", processes=1, sampler=Scripted(), peft_config=lora())
    for name, expected in {"whole": whole, "resumed": whole, "by name": whole, "lora": with_lora}.items():
        assert len(found[name]) == len(expected) == 4
        for theirs, ours in zip(found[name], expected, strict=True):
            assert theirs == pytest.approx(ours, abs=1e-5), name
    assert found["lora"][0]["kl"] < 1e-6, "the reference is the adapter that training starts from"
    assert found["whole"] == found["resumed"]
    for name in ("drawn", "drawn with lora"):
        difference, rounds = found[name]
        assert 0 < difference < 1e-4 and rounds == 4


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    part()
