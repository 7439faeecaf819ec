"""The reference policy of PEFT models: with a new adapter, and with one that was trained before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_cases import Scripted, logs, model, trainer

from grpo_fast.generation.merged_weights import merged_state_dict
from grpo_fast.trainer import GRPOTrainer
from grpo_fast.trainer.checkpoint_files import CheckpointError
from grpo_fast.trainer.reference_policy import FILE

peft = pytest.importorskip("peft")


def adapted(*, trained: bool = True, **settings: Any) -> Any:
    """A model with an adapter, as supervised fine-tuning leaves it."""
    torch.manual_seed(1)
    of = peft.get_peft_model(model(), peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"], **settings}))
    if trained:
        disturb(of)
    return of


def disturb(of: Any, only: str = "") -> None:
    with torch.no_grad():
        for name, p in of.named_parameters():
            if p.requires_grad and only in name:
                p += 0.2 * torch.randn(p.shape)


def two_adapters() -> Any:
    """The first was trained and stays frozen, the second is new; both are active."""
    of = adapted()
    of.add_adapter("second", peft.LoraConfig(r=2, target_modules=["o_proj"]))
    of.base_model.set_adapter(["default", "second"])
    for name, p in of.named_parameters():
        p.requires_grad_(".second." in name)
    return of


ADAPTERS: dict[str, Any] = {
    "lora": adapted,
    "trained copies": lambda: adapted(modules_to_save=["lm_head"]),
    "on the head": lambda: adapted(target_modules=["q_proj", "lm_head"]),
    "biases": lambda: adapted(bias="all"),
    "dora": lambda: adapted(use_dora=True),
    "pissa": lambda: adapted(trained=False, init_lora_weights="pissa"),
    "embeddings": lambda: adapted(target_modules=["embed_tokens"]),
    "two adapters": two_adapters,
}


def run_of(output: Path, of: Any, steps: int = 2, **settings: Any) -> GRPOTrainer:
    return trainer(output, of=of, **{"sampler": Scripted(), "beta": 0.1, "max_steps": steps, "learning_rate": 0.1, **settings})


@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_reference_is_the_policy_that_training_starts_from(tmp_path: Path, kind: str) -> None:
    of = ADAPTERS[kind]()
    start = merged_state_dict(of) if kind != "dora" else {}
    run = run_of(tmp_path, of)
    run.train()
    first, second = (log["kl"] for log in logs(run))
    assert first == pytest.approx(0, abs=1e-6) and second > 1e-3
    assert run.reference.start is not None
    assert not any(
        torch.equal(p, run.reference.start.values[name]) for name, p in of.named_parameters() if "lora_B" in name and p.requires_grad
    )
    trained = merged_state_dict(of) if kind != "dora" else {}
    with run.reference.of(of, of) as reference:
        found = merged_state_dict(reference) if kind != "dora" else {}
    assert all(torch.equal(value, start[name]) for name, value in found.items())
    after = merged_state_dict(of) if kind != "dora" else {}
    assert all(torch.equal(value, trained[name]) for name, value in after.items()), "the trained values are back"


def test_a_new_adapter_needs_no_copy(tmp_path: Path) -> None:
    for settings in ({}, {"modules_to_save": ["lm_head"]}, {"target_modules": ["embed_tokens"]}):
        of = adapted(trained=False, **settings)
        assert run_of(tmp_path, of).reference.kind == "without adapter"
        disturb(of, only="modules_to_save" if "modules_to_save" in settings else "")
        assert run_of(tmp_path, of).reference.kind == "starting adapter"
        assert run_of(tmp_path, of, beta=0.0).reference.kind == "none"


@pytest.mark.parametrize("alpha", [0.25, 1.0])
def test_the_reference_of_an_adapter_follows_it(tmp_path: Path, alpha: float, monkeypatch: pytest.MonkeyPatch) -> None:
    of = adapted()
    names = [name for name, p in of.named_parameters() if p.requires_grad]
    start = {name: p.detach().clone() for name, p in of.named_parameters()}
    run = run_of(tmp_path, of, 3, sync_ref_model=True, ref_model_sync_steps=2, ref_model_mixup_alpha=alpha)
    policies = []
    follow = run.reference.follow

    def remember(*args: Any) -> None:
        policies.append({name: p.detach().clone() for name, p in of.named_parameters()})
        follow(*args)

    monkeypatch.setattr(run.reference, "follow", remember)
    run.train()
    assert run.reference.start is not None and list(run.reference.start.values) == names
    for name, value in run.reference.start.values.items():
        torch.testing.assert_close(value, alpha * policies[2][name] + (1 - alpha) * start[name])
    assert (logs(run)[2]["kl"] == pytest.approx(0, abs=1e-6)) == (alpha == 1)


@pytest.mark.parametrize(("kind", "sync"), [("lora", True), ("two adapters", False)])
def test_a_resumed_run_has_the_same_reference(tmp_path: Path, kind: str, sync: bool) -> None:
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1}
    if sync:
        settings |= {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5}
    whole = run_of(tmp_path, ADAPTERS[kind](), 3, **settings)
    whole.train()
    checkpoint = tmp_path / "checkpoint-2"
    assert (checkpoint / FILE).exists() and not list(checkpoint.glob("*reference/"))
    saved = list(checkpoint.rglob("adapter_model.safetensors"))
    assert len(saved) == (2 if kind == "two adapters" else 1), "the reference is no adapter of the model"
    of = ADAPTERS[kind]()
    if kind == "lora":
        disturb(of)  # as a user who gives the trainer another adapter: the checkpoint's reference counts
    resumed = run_of(tmp_path, of, 3, **settings)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert logs(resumed)[2]["kl"] == logs(whole)[2]["kl"] > 0
    for (name, value), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(value, other), name


def test_a_resumed_run_that_is_given_the_checkpoints_adapter_has_the_reference_of_its_start(tmp_path: Path) -> None:
    """The run started with a new adapter; the user loads the trained one from the checkpoint, and resumes."""
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1}
    whole = run_of(tmp_path, adapted(trained=False), 3, **settings)
    whole.train()
    checkpoint = tmp_path / "checkpoint-2"
    assert not (checkpoint / FILE).exists()
    of = peft.PeftModel.from_pretrained(model(), str(checkpoint), is_trainable=True)
    resumed = run_of(tmp_path, of, 3, **settings)
    assert resumed.reference.kind == "starting adapter"
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.reference.kind == "without adapter" and logs(resumed)[2]["kl"] == logs(whole)[2]["kl"] > 0


def test_a_reference_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    run_of(tmp_path, adapted(), 1, save_strategy="steps", save_steps=1).train()
    with pytest.raises(CheckpointError, match=r"other parameters than this model's adapter"):
        run_of(tmp_path, adapted(r=3), 2).train(resume_from_checkpoint=True)
    with pytest.raises(CheckpointError, match="started from a trained adapter, its reference, and the model has a new one"):
        run_of(tmp_path, adapted(trained=False), 2).train(resume_from_checkpoint=True)


def test_an_adapter_by_the_name_of_its_folder_is_trained_on(tmp_path: Path) -> None:
    base = model()
    base.save_pretrained(tmp_path / "base")
    of = peft.get_peft_model(type(base).from_pretrained(tmp_path / "base"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    disturb(of)
    of.save_pretrained(tmp_path / "adapter")
    run = run_of(tmp_path, str(tmp_path / "adapter"))
    run.train()
    trained = [name for name, p in run.model.named_parameters() if p.requires_grad]
    assert len(trained) == 4 and all("lora_" in name for name in trained)
    assert logs(run)[0]["kl"] == pytest.approx(0, abs=1e-6) and logs(run)[1]["kl"] > 1e-3
    with pytest.raises(ValueError, match="peft_config is given with a model that has an adapter"):
        run_of(tmp_path, of, peft_config=peft.LoraConfig(r=2))
