"""The auxiliary loss of the routers of a mixture of experts: equal to TRL's, whatever the layout of a micro-batch."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from moe_models import MIXTURES, moe_model
from peers import needs_trl
from torch import Tensor
from trainer_cases import TOKENIZER, Scripted, logs, model, trainer

import grpo_fast as gf
from grpo_fast.models.batch import ForwardBatch
from grpo_fast.models.forward import ModelForward
from grpo_fast.models.router import make_router_loss

PROMPTS = [[5, 6, 7], [8], [9, 10], [11, 12, 13, 14]]
COMPLETIONS = [[3, 4, 15], [16, 17, 18, 19, 20], [21], [22, 23, 3, 1]]
ADVANTAGES = [1.0, -0.5, 0.0, 0.75]


def rows(in_loss: list[bool] | None = None) -> ForwardBatch:
    mask = torch.tensor([True] * 4 if in_loss is None else in_loss)
    return ForwardBatch(PROMPTS, COMPLETIONS, torch.ones(4), torch.tensor(ADVANTAGES), mask)


def trl_loss(of: Any, batch: ForwardBatch, accumulation: int, coef: float) -> tuple[Tensor, Tensor]:
    """Loss and auxiliary loss of TRL's own ``GRPOTrainer``, run on a stand-in for the trainer."""
    from trl.trainer.grpo_trainer import GRPOTrainer
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(of, outputs=("log_probs", "entropy"))
    logged: dict[str, list[float]] = {}
    stand_in = SimpleNamespace(
        model=of,
        accelerator=SimpleNamespace(
            num_processes=1,
            sync_gradients=True,
            autocast=nullcontext,
            gather=lambda x: x,
            gather_for_metrics=lambda x: x,
            reduce=lambda x, **_: x,
        ),
        args=SimpleNamespace(delta=None, steps_per_generation=accumulation),
        loss_type="dapo",
        importance_sampling_level="token",
        beta=0.0,
        epsilon_low=0.2,
        epsilon_high=0.2,
        current_gradient_accumulation_steps=accumulation,
        _entropy_bonus_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        aux_loss_enabled=True,
        router_aux_loss_coef=coef,
        use_vllm=False,
        _metrics={"train": _Lists(logged)},
    )
    scored = GRPOTrainer._get_per_token_logps_and_entropies
    stand_in._get_per_token_logps_and_entropies = lambda *args, **kwargs: scored.__wrapped__(stand_in, *args, **kwargs)
    prompts, completions = max(map(len, batch.prompt_ids)), max(map(len, batch.completion_ids))
    inputs = {
        "prompt_ids": torch.tensor([[0] * (prompts - len(ids)) + ids for ids in batch.prompt_ids]),
        "prompt_mask": torch.tensor([[0] * (prompts - len(ids)) + [1] * len(ids) for ids in batch.prompt_ids]),
        "completion_ids": torch.tensor([ids + [0] * (completions - len(ids)) for ids in batch.completion_ids]),
        "completion_mask": torch.tensor(
            [
                [int(counts)] * len(ids) + [0] * (completions - len(ids))
                for ids, counts in zip(batch.completion_ids, batch.loss_mask, strict=True)
            ]
        ),
        "advantages": batch.advantages,
        "num_items_in_batch": torch.tensor(26),
    }
    loss = GRPOTrainer._compute_loss(stand_in, of, inputs)
    return loss, torch.tensor(logged["aux_loss"][0])


class _Lists(dict[str, list[float]]):
    """TRL's dictionary of lists, with the lists in another dictionary."""

    def __init__(self, into: dict[str, list[float]]) -> None:
        self.into = into

    def __getitem__(self, name: str) -> list[float]:
        return self.into.setdefault(name, [])


def our_loss(of: Any, batch: ForwardBatch, accumulation: int, coef: float | None, **options: Any) -> gf.GRPOOutput:
    forward = ModelForward(Accelerator(cpu=True), 0, router_loss=make_router_loss(of, coef), **options)
    scale = 1 / accumulation
    return forward.loss(of, batch, config=gf.LossConfig(), num_items=26 / accumulation, loss_scale=scale, router_scale=scale)


def gradients(of: Any, loss: Tensor) -> dict[str, Tensor]:
    of.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in of.named_parameters() if p.grad is not None}


@needs_trl
@pytest.mark.parametrize("name", MIXTURES)
def test_loss_and_gradient_are_trls(name: str) -> None:
    """For one of two micro-batches, padded and packed, from hidden states; TRL pads on the left, and its mask leaves padding out."""
    batch, ours = rows(), moe_model(name)
    theirs = moe_model(name)
    loss, aux_loss = trl_loss(theirs, batch, 2, 0.5)
    expected = gradients(theirs, loss)
    for packing in (False,) if name == "gpt_oss" else (False, True):  # GPT-OSS attends to packed neighbours, which is detected
        out = our_loss(ours, batch, 2, None, packing=packing)
        assert out.loss.item() == pytest.approx(loss.item(), abs=1e-5), packing
        assert out.metrics["aux_loss"].item() == pytest.approx(aux_loss.item(), rel=1e-5)
        found = gradients(ours, out.loss)
        routers = [key for key in expected if "gate.weight" in key or "router.weight" in key]
        assert routers and found.keys() == expected.keys()
        for key, gradient in expected.items():
            torch.testing.assert_close(found[key], gradient, rtol=1e-3, atol=2e-5)
    without = our_loss(ours, batch, 2, 0.0, packing=False)
    assert "aux_loss" not in without.metrics and abs(without.loss.item() - loss.item()) > 0.1


@needs_trl
def test_completions_outside_of_the_loss_do_not_count() -> None:
    """As with TRL's mask_truncated_completions; and the same from logits."""
    batch = rows([True, False, True, False])
    _, aux_loss = trl_loss(moe_model("mixtral"), batch, 1, 0.5)
    whole = our_loss(moe_model("mixtral"), rows(), 1, None).metrics["aux_loss"]
    for fused in (True, False):
        found = our_loss(moe_model("mixtral"), batch, 1, None, fused_head=fused).metrics["aux_loss"]
        assert found.item() == pytest.approx(aux_loss.item(), rel=1e-5) and abs(found.item() - whole.item()) > 1e-3


def mixture(**settings: Any) -> Any:
    ends = {"eos_token_id": TOKENIZER.eos_token_id, "pad_token_id": TOKENIZER.pad_token_id}
    return moe_model("qwen3_moe", len(TOKENIZER), **ends, **settings)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_run_adds_and_logs_it(tmp_path: Path, checkpointing: bool) -> None:
    """The loss of the step has the mean over the micro-batches; the config's coefficient is the default. Dead groups count too."""
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "gradient_checkpointing": checkpointing}
    found = {}
    for coef in (None, 0.0, 0.5):
        run = trainer(tmp_path, of=mixture(), sampler=Scripted(), router_aux_loss_coef=coef, **settings)
        run.train()
        found[coef] = logs(run)[0]
    assert "aux_loss" not in found[0.0]
    assert found[None]["aux_loss"] == found[0.5]["aux_loss"] > 2.0
    assert found[None]["loss"] == pytest.approx(found[0.0]["loss"] + 0.5 * found[None]["aux_loss"], abs=1e-4)
    assert found[None]["grad_norm"] != pytest.approx(found[0.0]["grad_norm"], rel=1e-3)


def test_gradient_checkpointing_changes_nothing() -> None:
    """The router logits of the forward pass are part of the graph, and recomputing a layer does not add them twice."""
    found = []
    for checkpointing in (False, True):
        of = mixture()
        if checkpointing:
            of.train()
            of.gradient_checkpointing_enable({"use_reentrant": False})
        out = our_loss(of, rows(), 1, None)
        found.append((out.metrics["aux_loss"], gradients(of, out.loss)))
    torch.testing.assert_close(found[0], found[1])


def test_models_without_such_a_loss(tmp_path: Path) -> None:
    assert make_router_loss(model()) is None and make_router_loss(model(), 0.0) is None
    with pytest.raises(ValueError, match=r"router_aux_loss_coef is 0\.1, and Qwen2ForCausalLM has no auxiliary loss .* Fix: leave it out"):
        trainer(tmp_path, router_aux_loss_coef=0.1)
    with pytest.raises(ValueError, match=r"router_aux_loss_coef is -1\.0; expected a finite number of at least 0"):
        trainer(tmp_path, router_aux_loss_coef=-1.0)
