"""Checkpoints that are damaged or incomplete, a full disk, two runs in one folder, and settings that changed before a run was resumed."""

from __future__ import annotations

import errno
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from trainer_cases import Scripted, logs, odd_tokens, parameters, short, trainer

from grpo_fast.trainer import GRPOTrainer
from grpo_fast.trainer.checkpoint_files import CHECKSUMS, STATE, CheckpointError, checksums_of, files_of, missing_from, write_checksums
from grpo_fast.trainer.checkpoints import UNFINISHED
from grpo_fast.trainer.rollout import Rollout
from grpo_fast.utils.disk import DiskFullError

SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1}


def run_of(output: Path, steps: int = 3, **settings: Any) -> GRPOTrainer:
    return trainer(output, **{"sampler": Scripted(), "max_steps": steps, **SAVING, **settings})


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two steps, with a checkpoint of each; the second is in the middle of a rollout."""
    output = tmp_path_factory.mktemp("two steps")
    run_of(output, 2, steps_per_generation=2, per_device_train_batch_size=8, num_iterations=2).train()
    return output


@pytest.fixture
def copied(two_steps: Path, tmp_path: Path) -> Path:
    return shutil.copytree(two_steps, tmp_path / "run")


def resume(output: Path, checkpoint: Any = True, **settings: Any) -> GRPOTrainer:
    same = {"steps_per_generation": 2, "per_device_train_batch_size": 8, "num_iterations": 2, "save_strategy": "no"}
    run = run_of(output, **{**same, **settings})
    run.train(resume_from_checkpoint=checkpoint)
    return run


def rewrite(path: Path, **values: Any) -> None:
    """Change values of a JSON file of a checkpoint, and its checksum."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    write_checksums(path.parent, checksums_of(path.parent, files_of(path.parent)))


# Files -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors", CHECKSUMS, STATE])
def test_half_a_checkpoint_is_not_resumed_from(copied: Path, name: str) -> None:
    (copied / "checkpoint-2" / name).unlink()
    with pytest.raises(CheckpointError, match=rf"lacks .*{name}.*\. To start a new run from its weights instead: model ="):
        resume(copied, copied / "checkpoint-2")


def test_weights_alone_start_a_new_run_as_the_message_says(tmp_path: Path) -> None:
    run_of(tmp_path / "a", 1, save_only_model=True).train()
    with pytest.raises(CheckpointError, match=r"no complete checkpoint \(checkpoint-1 lacks .*optimizer.pt.*save_only_model=True"):
        resume(tmp_path / "a")
    new = run_of(tmp_path / "b", 1, of=str(tmp_path / "a" / "checkpoint-1"))
    new.train()
    assert new.state.global_step == 1


@pytest.mark.parametrize("damage", ["empty", "truncated", "flipped"])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer_state.json", "rollout-0.safetensors"])
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_taken(
    copied: Path, damage: str, name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr("grpo_fast.trainer.checkpoint_files.BLOCK", 64)
    path = copied / "checkpoint-2" / name
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes({"empty": b"", "truncated": bytes(whole[:-9]), "flipped": bytes(whole)}[damage])
    assert damage == "flipped" or name in str(missing_from(path.parent)), "before the contents are read"
    with pytest.raises(CheckpointError, match=name):
        resume(copied, copied / "checkpoint-2")
    run = resume(copied)
    assert "checkpoint-2 is skipped: it" in caplog.text and name in caplog.text
    assert [log["step"] for log in logs(run)] == [1, 2, 3] and run.state.global_step == 3


def test_files_in_subfolders_are_checked_too(copied: Path) -> None:
    """Shards of FSDP and DeepSpeed."""
    checkpoint = copied / "checkpoint-2"
    shard = checkpoint / "pytorch_model_fsdp_0" / "__0_0.distcp"
    shard.parent.mkdir()
    shard.write_bytes(b"weights")
    write_checksums(checkpoint, checksums_of(checkpoint, files_of(checkpoint)))
    assert missing_from(checkpoint) is None
    shard.write_bytes(b"weight5")
    with pytest.raises(CheckpointError, match=r"has damaged files: pytorch_model_fsdp_0/__0_0\.distcp"):
        resume(copied, checkpoint)
    shutil.rmtree(shard.parent)
    assert missing_from(checkpoint) == "pytorch_model_fsdp_0/__0_0.distcp"
    assert set(json.loads((checkpoint / CHECKSUMS).read_text())) >= {"model.safetensors", "optimizer.pt", "rng_state.pth", STATE}


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        (STATE, {"step_tokens": [1.5]}, "step_tokens is .*expected a list of whole numbers"),
        (STATE, {"step_sequences": [16, 16, 16]}, "step_sequences has 3 numbers, expected [12], as step_tokens"),
        (STATE, {"step_sequences": [-1]}, "step_sequences is .*expected a list of whole numbers"),
        (STATE, {"batches": {"processes": "2"}}, "batches is .*expected an object of whole numbers"),
        (STATE, {"settings": []}, r"settings is \[\], expected an object"),
        (STATE, {"version": 3}, "version is 3, expected a whole number from 1 to 2"),
        (STATE, {"more": 1}, "unknown 'more'"),
        ("trainer_state.json", {"global_step": "2"}, "global_step is '2'"),
        ("trainer_state.json", {"global_step": -1}, "global_step is -1"),
        ("trainer_state.json", {"log_history": {}, "more": 1}, "unexpected keyword argument 'more'"),
        ("trainer_state.json", {"stateful_callbacks": [1]}, "a valid trainer_state.json"),
    ],
)
def test_values_of_another_type_are_refused(copied: Path, name: str, values: dict[str, Any], message: str) -> None:
    rewrite(copied / "checkpoint-2" / name, **values)
    with pytest.raises(CheckpointError, match=message):
        resume(copied, copied / "checkpoint-2")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("completion_ids", lambda ids: ids + 1000, "completion_ids go from .*expected ids of the vocabulary"),
        ("completion_lengths", lambda lengths: lengths + 2**40, "do not add up"),
        ("temperature", lambda temperature: -temperature, "temperature is not above 0"),
        ("advantages", lambda advantages: advantages[:-1], "advantages has the shape"),
        ("tokens.old", lambda values: values.long(), "unknown 'tokens.old' of torch.int64"),
    ],
)
def test_a_rollout_that_is_none_is_refused(copied: Path, name: str, change: Any, message: str) -> None:
    checkpoint = copied / "checkpoint-2"
    table = load_file(checkpoint / "rollout-0.safetensors")
    save_file({**table, name: change(table[name])}, checkpoint / "rollout-0.safetensors")
    rewrite(checkpoint / STATE)
    with pytest.raises(CheckpointError, match=message):
        resume(copied, checkpoint)
    (checkpoint / "rollout-0.safetensors").write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match="cannot be read"):
        Rollout.load(checkpoint / "rollout-0.safetensors", torch.device("cpu"))


def test_names_outside_of_the_checkpoint_are_not_read(copied: Path) -> None:
    checksums = copied / "checkpoint-2" / CHECKSUMS
    for name in ("/dev/zero", "../checkpoint-1/optimizer.pt"):
        checksums.write_text(json.dumps({name: [0, ""]}))
        assert str(missing_from(checksums.parent)).startswith(f"a valid {CHECKSUMS}")


def test_checkpoints_of_the_version_before_are_read(copied: Path) -> None:
    checkpoint = copied / "checkpoint-2"
    state = json.loads((checkpoint / STATE).read_text())
    old = {"batches": state["batches"], "temperature": {"kind": "constant", "value": 1.0, "mean": None, "observed": 0}}
    (checkpoint / STATE).write_text(json.dumps({**old, "step_tokens": state["step_tokens"], "version": 1}))
    (checkpoint / CHECKSUMS).unlink()
    assert resume(copied).state.global_step == 3


@pytest.mark.parametrize("error", [RuntimeError("PytorchStreamWriter failed writing file data/0"), OSError(errno.ENOSPC, "No space left")])
def test_a_full_disk_is_named_and_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def save(folder: str) -> None:
        if run.state.global_step == 2:
            raise error
        GRPOTrainer._save_rng_state(run, folder)

    def no_space(*args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    run = run_of(tmp_path)
    monkeypatch.setattr(run, "_save_rng_state", save)
    monkeypatch.setattr("grpo_fast.utils.disk.tempfile.TemporaryFile", no_space)
    with pytest.raises(DiskFullError, match=r"the disk is full: checkpoint-2 .* The last complete checkpoint is .*checkpoint-1\. Fix:"):
        run.train()
    assert not (tmp_path / UNFINISHED).exists() and not (tmp_path / "checkpoint-2").exists()
    monkeypatch.undo()
    run = run_of(tmp_path / "other")
    monkeypatch.setattr(run, "_save_rng_state", lambda folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # there is space: the error is another one
        run.train()
    assert not (tmp_path / "other" / UNFINISHED).exists()


def test_two_runs_in_one_folder_are_refused(tmp_path: Path) -> None:
    second = run_of(tmp_path, 1)

    def reward(**columns: Any) -> list[float]:
        if not messages:
            with pytest.raises(CheckpointError) as refused:
                second.train()
            messages.append(str(refused.value))
        return odd_tokens(**columns)

    messages: list[str] = []
    run_of(tmp_path, 1, rewards=reward).train()
    assert "in which another run is training now; expected a folder for each run. Fix: another output_dir" in messages[0]
    with pytest.raises(CheckpointError, match=r"holds a run already \(checkpoint-1\); expected another folder, or resume_from_checkpoint"):
        second.train()
    run = run_of(tmp_path, 2)
    run.train(resume_from_checkpoint=True)
    assert run.state.global_step == 2


# Changed settings --------------------------------------------------------------------------------------------------------------


def resumed_with(copied: Path, caplog: pytest.LogCaptureFixture, checkpoint: Any = True, **settings: Any) -> tuple[GRPOTrainer, list[str]]:
    caplog.clear()
    run = resume(copied, checkpoint, **settings)
    return run, [record.getMessage() for record in caplog.records if "Resumed from" in record.getMessage()]


def test_a_temperature_that_was_changed_is_used_and_named(copied: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert resumed_with(copied, caplog, copied / "checkpoint-1", steps=2, **SAVING)[1] == [], "nothing has changed"
    run, lines = resumed_with(copied, caplog, temperature=0.8, steps=5, top_p=0.9)
    assert logs(run)[-1]["temperature"] == pytest.approx(0.8) and run.state.global_step == 5
    (line,) = lines
    for part in ("Resumed from step 2", "temperature: 1.0 -> 0.8", "top_p: 1.0 -> 0.9", "max_steps: 2 -> 5", "already drawn and scored"):
        assert part in line
    assert "learning_rate" not in line and "output_dir" not in line


def test_settings_that_the_optimizers_state_holds_are_those_of_the_run(copied: Path, caplog: pytest.LogCaptureFixture) -> None:
    new: dict[str, Any] = {"learning_rate": 0.003, "weight_decay": 0.25, "adam_beta2": 0.95, "lr_scheduler_type": "linear", "steps": 4}
    run, (line,) = resumed_with(copied, caplog, **new)
    group, other = run.optimizer.param_groups
    assert (group["initial_lr"], group["weight_decay"], group["betas"]) == (0.003, 0.25, (0.9, 0.95)) and other["weight_decay"] == 0
    assert [log["learning_rate"] for log in logs(run)[2:]] == pytest.approx([0.003 * 2 / 4, 0.003 / 4])
    assert "learning_rate: 0.01 -> 0.003" in line and "weight_decay: 0.0 -> 0.25" in line
    unchanged = resume(copied, copied / "checkpoint-2").optimizer.param_groups[0]
    assert (unchanged["initial_lr"], unchanged["weight_decay"]) == (0.01, 0)


def test_rewards_and_intervals_that_were_changed(copied: Path, caplog: pytest.LogCaptureFixture) -> None:
    run, (line,) = resumed_with(copied, caplog, rewards=[short], logging_steps=3, steps=6, epsilon=0.1)
    assert "reward_funcs: ['odd_tokens'] -> ['short']" in line and "epsilon: 0.2 -> 0.1" in line
    assert [log["step"] for log in logs(run)] == [1, 2, 3, 6]


def test_a_loss_that_needs_more_than_the_rest_of_the_rollout_has_is_refused(copied: Path) -> None:
    with pytest.raises(CheckpointError, match=r"middle of a rollout, with beta and entropy_coef 0, and now they are 0.1 and 0;"):
        resume(copied, beta=0.1)


def test_an_adaptive_temperature_continues_unless_its_start_has_changed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def schedule(**settings: Any) -> dict[str, Any]:
        return {"temperature_schedule": {"kind": "entropy", "target": 0.1, "gain": 0.5, **settings}}

    run = run_of(tmp_path, 2, **schedule())
    run.train()
    reached = run.temperatures.base(2)
    assert reached < 0.99
    for settings, expected in (
        (schedule(target=0.2), reached),
        (schedule(min=0.99), 0.99),
        (schedule(start=1.3), 1.3),
        ({"temperature": 0.9}, 0.9),
    ):
        caplog.clear()
        found = run_of(tmp_path, 3, save_strategy="no", **settings)
        found.train(resume_from_checkpoint=True)
        assert logs(found)[-1]["temperature"] == pytest.approx(expected)
        assert "temperature_schedule" in caplog.text and ("continues at" in caplog.text) == (expected in (reached, 0.99))


def test_the_same_run_without_changes_has_the_same_weights(two_steps: Path, copied: Path) -> None:
    same = resume(copied, copied / "checkpoint-1", steps=2)
    final = load_file(two_steps / "checkpoint-2" / "model.safetensors")
    assert all(torch.equal(value, final[name]) for name, value in parameters(same.model).items())
