"""Truncated sampling with a real model: the policy that is trained is the one that sampled. `make real-parts` builds model and server."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from test_vllm_real import part, serving

pytest.importorskip("datasets", reason="the trainer's rows are a dataset")

from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_fast.trainer import GRPOConfig, GRPOTrainer

pytestmark = pytest.mark.sweep

ROWS: list[dict[str, Any]] = [
    {"prompt": [{"role": "user", "content": text}]}
    for text in ("Name three fruits.", "Write a short sentence about the sea.", "What is the capital of France?", "Tell me a joke.")
]


def odd(prompts: Any, completions: Any, completion_ids: list[list[int]], **columns: Any) -> list[float]:
    return [sum(token % 2 for token in ids) / len(ids) for ids in completion_ids]


@pytest.mark.parametrize("sampler", ["transformers", "continuous_batching", "vllm"])
def test_the_ratio_to_the_sampler_is_one(tmp_path: Path, sampler: str) -> None:
    with ExitStack() as stack:
        options: dict[str, Any] = {}
        if sampler == "vllm":  # it has the route of sampling masks, but no masks: vLLM 0.32 has them on GPUs only
            server = stack.enter_context(serving(part("MODEL"), tmp_path, "--max-logprobs", "66", "--enable-scale-out"))
            options = {"url": server.url, "weight_sync": "none", "concurrency": 4}
        assert_the_ratio_is_one(tmp_path, sampler, options)


def assert_the_ratio_is_one(tmp_path: Path, sampler: str, options: dict[str, Any]) -> None:
    folder = part("MODEL")
    ratios = {}
    for replay in ("auto", "false"):
        settings: dict[str, Any] = {"top_p": 0.9, "top_k": 50, "max_completion_length": 24, "num_generations": 4, "num_iterations": 2}
        settings |= {"per_device_train_batch_size": 8, "max_steps": 1, "learning_rate": 0.0, "sampler_tolerance": 10.0, "use_cpu": True}
        config = GRPOConfig(
            str(tmp_path / replay),
            sampler=sampler,
            sampler_options=options,
            replay_support=replay,
            save_strategy="no",
            report_to=[],
            metrics_on="all",
            **settings,
        )
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        run = GRPOTrainer(model, odd, config, train_dataset=ROWS, processing_class=AutoTokenizer.from_pretrained(folder))
        run.train()
        assert run.rollout is not None
        ratios[replay] = (run.rollout.tokens["old"] - run.rollout.tokens["sampler"]).exp()
        assert (run.rollout.support is not None) == (replay == "auto")
        found = ratios[replay]
        print(
            f"{sampler}, replay_support={replay}: mean ratio {found.mean():.6f}, {((found - 1).abs() > 0.1).float().mean():.1%} beyond 0.1"
        )
    assert (ratios["auto"].mean() - 1).abs() < 1e-4 and (ratios["auto"] - 1).abs().max() < 1e-3
    assert ratios["false"].mean() < 0.95 and ((ratios["false"] - 1).abs() > 0.1).float().mean() > 0.3
