"""Rollouts and evaluations under bf16 and fp16: the samplers draw from the distribution that the loss computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_cases import ROWS, logs, model, trainer


@pytest.fixture(autouse=True)
def no_garbage_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' continuous batching runs gc.collect twice after each rollout, which would take most of the time of these tests."""
    monkeypatch.setattr("gc.collect", lambda *_: 0)


def with_adapter(dtype: torch.dtype = torch.float32, attention: str = "eager") -> Any:
    peft = pytest.importorskip("peft", reason="an adapter needs peft")
    torch.manual_seed(1)
    base = model(attn_implementation=attention).to(dtype)
    if dtype != torch.float32:  # as preparation for training in 4 bits leaves it
        for name, p in base.named_parameters():
            if "norm" in name:
                p.data = p.data.float()
    return peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))


MODELS: dict[str, Any] = {
    "lora": with_adapter,
    "lora, sdpa": lambda: with_adapter(attention="sdpa"),
    "lora, float32 norms over bf16": lambda: with_adapter(torch.bfloat16),
    "full": model,
    "full, bf16 weights": lambda: model().to(torch.bfloat16),
}


@pytest.mark.parametrize(
    ("sampler", "kind"),
    [
        *(("transformers", kind) for kind in ("lora", "lora, sdpa", "lora, float32 norms over bf16")),
        *(("continuous_batching", kind) for kind in MODELS),
    ],
)
def test_samplers_draw_from_the_losss_distribution_in_bf16(tmp_path: Path, sampler: str, kind: str) -> None:
    run = trainer(tmp_path, of=MODELS[kind](), sampler=sampler, bf16=True, logging_steps=1, eval_dataset=ROWS[:2], metrics_on="all")
    run.train()
    (record,) = logs(run)
    # In bf16 the rounding of sdpa depends on how many queries there are, and a sampler has one; a rollout in float32 is 6e-3 off.
    assert record["sampling/sampling_logp_difference/mean"] < (5e-3 if "sdpa" in kind else 1e-6)
    assert "eval_reward" in run.evaluate()
