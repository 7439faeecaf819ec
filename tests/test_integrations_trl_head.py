"""TRL's fused LM head replaced by ours: its five results with their gradients, and short runs of trainers that use it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peers import needs_trl
from tiny_model import save_tiny_model

pytestmark = needs_trl


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(("softcap", "scale", "with_bias"), [(None, 1.0, False), (4.0, 0.5, True)])
def test_the_five_results(softcap: float | None, scale: float, with_bias: bool, frozen: bool, generator: torch.Generator) -> None:
    from trl.kernels import ChunkedLogProbFunction

    from grpo_fast.integrations.trl.lm_head import FusedLogProbFunction

    hidden, weight = torch.randn(9, 8, generator=generator), torch.randn(53, 8, generator=generator)
    bias = torch.randn(53, generator=generator) if with_bias else None
    targets = torch.randint(53, (9,), generator=generator)
    targets[0] = (hidden[0] @ weight.T + (0 if bias is None else bias)).argmax()  # a top-1 prediction
    upstream = torch.randn(2, 9, generator=generator)
    outputs = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    results = []
    for function in (ChunkedLogProbFunction, FusedLogProbFunction):
        leaves = [x.clone().requires_grad_(not frozen) for x in (weight, *([] if bias is None else [bias]))]
        h = hidden.clone().requires_grad_()
        out = function.apply(h, leaves[0], leaves[1] if with_bias else None, targets, 0.7, 16, softcap, scale, outputs)
        assert out[0] is not None and out[1] is not None
        total = (out[0] * upstream[0]).sum() + (out[1] * upstream[1]).sum()
        results.append((*out, *torch.autograd.grad(total, [h] if frozen else [h, *leaves])))
    for theirs, ours in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert results[1][4].any(), "some target must be the most likely token"
    assert not results[1][4].all()


@pytest.mark.parametrize(
    ("hidden_type", "weight_type", "autocast"),
    [
        (torch.bfloat16, torch.bfloat16, False),
        (torch.float32, torch.bfloat16, False),
        (torch.bfloat16, torch.float32, False),
        (torch.float32, torch.float32, True),
        (torch.float16, torch.float16, False),
    ],
)
def test_other_types(hidden_type: torch.dtype, weight_type: torch.dtype, autocast: bool, generator: torch.Generator) -> None:
    """Each result has TRL's type, and is about as near to float64 as TRL's, whose logits are rounded alike."""
    from trl.kernels import ChunkedLogProbFunction

    from grpo_fast.integrations.trl.lm_head import FusedLogProbFunction

    hidden = torch.randn(64, 8, generator=generator).to(hidden_type)
    weight, bias = (torch.randn(*shape, generator=generator).to(weight_type) for shape in ((53, 8), (53,)))
    targets = torch.randint(53, (64,), generator=generator)
    outputs = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits")

    def results(function: Any, *given: torch.Tensor) -> list[torch.Tensor]:
        leaves = [x.clone().requires_grad_() for x in given]
        with torch.autocast("cpu", enabled=autocast and given[0].dtype != torch.float64):
            out = function.apply(*leaves, targets, 0.7, 16, None, 1.0, outputs)[:4]
        return [*out, *torch.autograd.grad(out[0].sum() + out[1].sum(), leaves)]

    truth = results(ChunkedLogProbFunction, hidden.double(), weight.double(), bias.double())
    theirs = results(ChunkedLogProbFunction, hidden, weight, bias)
    ours = results(FusedLogProbFunction, hidden, weight, bias)
    for exact, stock, mine in zip(truth, theirs, ours, strict=True):
        assert mine.dtype == stock.dtype
        error, of_stock = ((x.double() - exact).abs().mean() for x in (mine, stock))
        assert 0 < error <= 2 * of_stock


def test_outputs_that_were_not_requested_are_none() -> None:
    from grpo_fast.integrations.trl.lm_head import FusedLogProbFunction

    out = FusedLogProbFunction.apply(torch.randn(2, 4), torch.randn(5, 4), None, torch.tensor([1, 2]), 1.0, 16, None, 1.0, ("log_probs",))
    assert [x is None for x in out] == [False, True, True, True, True]


def test_no_position_at_all() -> None:
    """A micro-batch that is masked as a whole still has a gradient, of 0."""
    from grpo_fast.integrations.trl.lm_head import FusedLogProbFunction

    hidden, weight = torch.randn(0, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    outputs = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    out = FusedLogProbFunction.apply(hidden, weight, None, torch.zeros(0, dtype=torch.int64), 1.0, 16, None, 1.0, outputs)
    assert [tuple(x.shape) for x in out if x is not None] == [(0,)] * 5
    assert out[0] is not None and out[1] is not None
    (out[0].sum() + out[1].sum()).backward()
    assert hidden.grad is not None and weight.grad is not None
    assert hidden.grad.shape == (0, 4)
    assert (weight.grad == 0).all()


def test_the_patch_is_taken_back() -> None:
    import trl.trainer.utils as utils

    from grpo_fast.integrations.trl import fused_lm_head

    before = utils._ChunkedLogProbFunction, utils._use_triton
    with pytest.raises(RuntimeError), fused_lm_head():
        assert utils._ChunkedLogProbFunction is not before[0]
        raise RuntimeError
    assert (utils._ChunkedLogProbFunction, utils._use_triton) == before


def test_a_trl_that_always_leaves_positions_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """1.15 has no switch for that."""
    import trl.trainer.utils as utils

    from grpo_fast.integrations.trl import fused_lm_head

    monkeypatch.delattr(utils, "_use_triton")
    before = utils._ChunkedLogProbFunction
    with fused_lm_head():
        assert utils._ChunkedLogProbFunction is not before
        assert not hasattr(utils, "_use_triton")
    assert utils._ChunkedLogProbFunction is before
    assert not hasattr(utils, "_use_triton")


def trainer_of(kind: str, model_path: Path, out: Path) -> Any:
    import trl
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_path)
    common = {
        "output_dir": str(out),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "seed": 3,
        "disable_tqdm": True,
        "log_level": "error",
        "max_steps": 4,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "optim": "sgd",
        "learning_rate": 0.03,
    }
    prompts = [f"w{i % 30} w{i * 7 % 30}" for i in range(32)]
    answers = [[f"w{(i * j) % 30} w{(i + j) % 30} w{j}" for i in range(32)] for j in (3, 5)]
    torch.manual_seed(0)
    if kind == "sft":
        data = Dataset.from_dict({"prompt": prompts, "completion": answers[0]})
        return trl.SFTTrainer(str(model_path), args=trl.SFTConfig(**common), train_dataset=data, processing_class=tokenizer)
    if kind == "dpo":
        data = Dataset.from_dict({"prompt": prompts, "chosen": answers[0], "rejected": answers[1]})
        return trl.DPOTrainer(
            str(model_path), args=trl.DPOConfig(use_weighting=True, **common), train_dataset=data, processing_class=tokenizer
        )
    if kind == "kto":
        data = Dataset.from_dict({"prompt": prompts, "completion": answers[0], "label": [i % 3 != 0 for i in range(32)]})
        return trl.KTOTrainer(str(model_path), args=trl.KTOConfig(**common), train_dataset=data, processing_class=tokenizer)
    online = {"num_generations": 4, "max_completion_length": 6, "temperature": 0.7, "beta": 0.05}
    data = Dataset.from_dict({"prompt": prompts})

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [sum(token * 7 % 13 for token in ids) / (12 * len(ids)) for ids in completion_ids]

    configs = {"rloo": (trl.RLOOTrainer, trl.RLOOConfig), "grpo": (trl.GRPOTrainer, trl.GRPOConfig)}
    trainer, config = configs[kind]
    return trainer(str(model_path), reward_funcs=reward, args=config(**common, **online), train_dataset=data, processing_class=tokenizer)


@pytest.mark.parametrize("kind", ["dpo", "sft", "kto", "rloo", "grpo"])
def test_the_same_run(kind: str, model_path: Path, tmp_path: Path) -> None:
    from grpo_fast.integrations.trl import fused_lm_head

    theirs = trainer_of(kind, model_path, tmp_path)
    theirs.train()
    ours = trainer_of(kind, model_path, tmp_path)
    with fused_lm_head():
        ours.train()
    times = ("runtime", "per_second", "step_time", "total_flos", "tokens_per_second", "mfu")
    compared = 0
    for mine, stock in zip(ours.state.log_history, theirs.state.log_history, strict=True):
        assert mine.keys() == stock.keys()
        for key, value in stock.items():
            if not key.endswith(times) and isinstance(value, float):
                assert mine[key] == pytest.approx(value, rel=1e-5, abs=2e-6), key
                compared += 1
    assert compared > 20
    assert max(entry.get("grad_norm", 0) for entry in ours.state.log_history) > 1e-2
