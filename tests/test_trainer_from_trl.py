"""A script written for TRL runs after its import is changed: TRL's own script, and examples of its documentation."""

from __future__ import annotations

import json
import re
import runpy
import sys
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_cases import ROWS, TOKENIZER, Scripted, model, trainer

from grpo_fast.trainer import GRPOConfig, GRPOTrainer

trl = pytest.importorskip("trl", reason="the scripts are TRL's: pip install trl")


@pytest.fixture
def on_disk(tmp_path: Path) -> Path:
    """A folder with a model in bfloat16 and its tokenizer, and one with a data set."""
    model().bfloat16().save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    lines = [json.dumps({"prompt": row["prompt"], "solution": row["answer"], "completion": "not ours to see"}) for row in ROWS]
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(lines))
    return tmp_path


def test_trls_own_script(on_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = (Path(trl.__file__).parent / "scripts" / "grpo.py").read_text()
    for name in ("GRPOTrainer", "GRPOConfig"):
        source, count = re.subn(
            rf"( +)from trl import (.*){name}, ", rf"\1from grpo_fast.trainer import {name}\n\1from trl import \2", source
        )
        assert count == 1
    (on_disk / "script.py").write_text(source)
    (on_disk / "rewards_of_a_script.py").write_text(
        "def length(completion_ids, **kwargs):\n    return [float(len(ids)) for ids in completion_ids]\n"
    )
    monkeypatch.chdir(on_disk)
    named = "--model_name_or_path model --dataset_name data --output_dir out --reward_funcs rewards_of_a_script.length --report_to none"
    added = "--use_adaptive_entropy --entropy_target 2.5 --off_policy_mask_threshold 0.5"
    short = "--max_steps 1 --per_device_train_batch_size 8 --max_completion_length 8 --use_cpu --save_strategy no"
    monkeypatch.setattr(sys, "argv", ["script.py", *f"{named} {added} {short} --use_peft --lora_target_modules all-linear".split()])
    monkeypatch.setattr(sys, "path", [*sys.path])  # the script adds this folder
    runpy.run_path("script.py", run_name="__main__")
    del sys.modules["rewards_of_a_script"]
    assert (on_disk / "out" / "adapter_model.safetensors").exists()


def test_a_model_by_name_has_the_weights_and_the_attention_that_training_needs(on_disk: Path) -> None:
    settings: dict[str, Any] = {"per_device_train_batch_size": 8, "use_cpu": True}
    for given, dtype in (({}, torch.float32), ({"dtype": "bfloat16", "attn_implementation": None}, torch.bfloat16)):
        run = GRPOTrainer(str(on_disk / "model"), "format", GRPOConfig(str(on_disk / "out"), model_init_kwargs=given, **settings))
        assert run.model.dtype == dtype and run.model.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="quantization_config is given with a model; expected None, or the model's name"):
        trainer(on_disk / "out", quantization_config=object())


def test_columns_that_a_reward_logs_belong_to_its_completion(tmp_path: Path) -> None:
    def reward(completion_ids: list[list[int]], log_extra: Any = None, log_metric: Any = None, **kwargs: Any) -> list[float]:
        log_extra("tokens", [len(ids) for ids in completion_ids])
        log_metric("answered", 0.25)
        return [float(i) for i in range(len(completion_ids))]

    run = trainer(tmp_path, rewards=reward, sampler=Scripted(), log_completions=True)
    run.train()
    assert run.rollout is not None and run.state.log_history[0]["answered"] == 0.25
    records = [json.loads(line) for line in next((tmp_path / "completions").iterdir()).read_text().splitlines()]
    assert [record["extra"]["tokens"] for record in records] == run.rollout.lengths


def test_async_rewards_and_none(tmp_path: Path) -> None:
    async def reward(prompts: Any, completions: Any, **kwargs: Any) -> list[float | None]:
        return [None if i % 4 == 0 else float(i) for i in range(len(completions))]

    run = trainer(tmp_path, rewards=reward, sampler=Scripted())
    run.train()
    assert run.state.log_history[0]["rewards/reward/mean"] == 8.0
    assert run.rollout is not None and run.rollout.advantages[::4].tolist() == [0.0] * 4


def test_pushed_to_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With TRL's argument for the model card; the hub is replaced by a list of what was uploaded."""
    from huggingface_hub import HfApi, RepoUrl

    sent: list[dict[str, Any]] = []
    monkeypatch.setattr(HfApi, "create_repo", lambda *args, **kwargs: RepoUrl("https://huggingface.co/me/mine"))

    def upload(self: Any, **kwargs: Any) -> Future[str]:
        sent.append({**kwargs, "files": _files(kwargs["folder_path"])})
        done: Future[str] = Future()
        done.set_result("sent")
        return done

    monkeypatch.setattr(HfApi, "upload_folder", upload)
    run = trainer(tmp_path, push_to_hub=True, hub_model_id="mine", save_strategy="steps", save_steps=1, max_steps=2, sampler=Scripted())
    run.train()
    assert any("model.safetensors" in call["files"] for call in sent)  # from the completed checkpoint
    run.push_to_hub(dataset_name="trl-lib/tldr")
    assert "model.safetensors" in sent[-1]["files"] and sent[-1]["repo_id"] == "me/mine"
    assert "trl-lib/tldr" in (tmp_path / "README.md").read_text()


def _files(folder: Any) -> list[str]:
    return [path.name for path in Path(folder).iterdir()]
