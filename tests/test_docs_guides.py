"""The code of the pages for readers of the site runs, with small models in place of those of the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from doc_blocks import blocks
from trainer_cases import ROWS, TOKENIZER, config, logs, odd_tokens, parameters
from trainer_cases import model as small_model

import grpo_fast as gf


def run(code: str, names: dict[str, Any] | None = None) -> dict[str, Any]:
    names = {} if names is None else names
    exec(compile(code, "guide", "exec"), names)
    return names


@pytest.fixture
def batch(generator: torch.Generator) -> dict[str, Any]:
    """Four completions of five tokens, as the pages take them for given."""
    return {
        "logits": torch.randn(4, 6, 31, generator=generator).requires_grad_(),
        "completion_ids": torch.randint(31, (4, 5), generator=generator),
        "mask": torch.arange(5) < torch.tensor([5, 3, 4, 2]).unsqueeze(1),
        "advantages": torch.tensor([1.2, -0.7, 0.4, -0.9]),
        "old_logprobs": torch.randn(4, 5, generator=generator) * 0.3 - 3.5,
        "temperature": 0.7,
    }


def test_index(batch: dict[str, Any]) -> None:
    (code,) = blocks("index.md")
    run(code, batch)
    assert batch["logits"].grad.abs().max() > 1e-3


def test_concepts() -> None:
    (code,) = blocks("concepts.md")
    names = run(code)
    gradient = names["logits"].grad
    assert gradient[:4].abs().max() > 1e-3 and not gradient[4:].any(), "the second group has equal rewards"
    assert not names["advantages"][4:].any()


def test_kept_sets(generator: torch.Generator) -> None:
    settings, code = blocks("kept-sets.md")
    args = eval(settings, {"GRPOConfig": config})
    assert (args.top_p, args.top_k, args.replay_support) == (0.95, 50, "auto")
    names: dict[str, Any] = {
        "gf": gf,
        "hidden": torch.randn(3, 8, generator=generator).requires_grad_(),
        "weight": torch.randn(31, 8, generator=generator).requires_grad_(),
        "token_ids": torch.tensor([2, 5, 7]),
        "advantages": torch.tensor([1.0, -1.0, 1.0]),
        "old_logprobs": torch.tensor([-1.2, -3.0, -0.1]),
    }
    names = run(code, names)
    assert names["out"].logprobs[2] == 0.0, "the only token of its set is certain"
    kept = (names["hidden"][0] @ names["weight"].T)[[5, 2, 9]].log_softmax(0)[1]
    torch.testing.assert_close(names["out"].logprobs[0], kept.detach())


def test_rewards() -> None:
    from grpo_fast.rewards import RewardRunner

    (code,) = blocks("rewards.md")
    found = RewardRunner([run(code)["brief"]])(["", ""], ["Paris", "x" * 100], [[1], [2]], answer=["Paris", "Paris"])
    torch.testing.assert_close(found.values.flatten(), torch.tensor([0.995, -0.1]))


def test_samplers(tmp_path: Path) -> None:
    """It draws what the sampler of the library draws, as the check of the first step sees it, and reports no wrong temperature."""
    from grpo_fast.generation import SamplingParams
    from grpo_fast.trainer import GRPOTrainer

    (code,) = blocks("samplers.md")
    model = small_model()
    sampler = run(code)["PlainSampler"](model)
    args = config(tmp_path, temperature=0.8, per_device_train_batch_size=4, max_completion_length=4)
    trainer = GRPOTrainer(model, odd_tokens, args, train_dataset=ROWS, processing_class=TOKENIZER, sampler=sampler)
    before = parameters(model)
    trainer.train()
    assert logs(trainer)[0]["sampling/sampling_logp_difference/max"] < 1e-4
    assert any((value != before[name]).any() for name, value in parameters(model).items())
    ends = {"eos_token_id": TOKENIZER.eos_token_id, "pad_token_id": 0}
    (greedy,) = sampler.generate([[3, 4]], SamplingParams(4, [0.0], **ends))
    assert greedy.logprobs is None and greedy.finished == (greedy.token_ids[-1] == TOKENIZER.eos_token_id)
    with pytest.raises(ValueError, match="whole softmax"):
        sampler.generate([[3, 4]], SamplingParams(4, [1.0], top_k=2, **ends))


def test_lora(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from grpo_fast.trainer import GRPOTrainer

    (code,) = blocks("lora.md")
    args = config(tmp_path, per_device_train_batch_size=4, max_completion_length=4)
    given = {"model_name": small_model(), "reward": odd_tokens, "args": args, "dataset": ROWS}

    class Trainer(GRPOTrainer):
        def __init__(self, **arguments: Any) -> None:
            super().__init__(processing_class=TOKENIZER, **arguments)

    names = run(code, {"GRPOTrainer": Trainer, **given})
    assert names["trainer"].state.global_step == 1
    assert (tmp_path / "adapter_model.safetensors").exists() and not (tmp_path / "model.safetensors").exists()


def test_settings_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import yaml

    monkeypatch.chdir(tmp_path)
    Path("my_loss.py").write_text(blocks("custom-loss.md")[0].partition("config =")[0])
    found = {}
    for page in ("custom-loss.md", "moe.md", "vllm.md"):
        (settings,) = blocks(page, "yaml")
        found[page] = config(tmp_path, **yaml.safe_load(settings))
    assert found["custom-loss.md"].loss_type == "custom" and found["moe.md"].loss_type == "gspo"
    assert found["vllm.md"].sampler == "vllm" and found["vllm.md"].sampler_options == {"url": "http://127.0.0.1:8000"}


def test_quickstart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both blocks, one after the other, for one step with a model of one's own."""
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "examples"))
    from tiny import tiny_model, tiny_tokenizer

    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tiny_model(tokenizer).save_pretrained("model")
    tokenizer.save_pretrained("model")
    train, use = blocks("quickstart.md")
    for old, new in {
        "Qwen/Qwen3-0.6B": "model",
        "max_steps=50": "max_steps=1, use_cpu=True, save_strategy='no'",
        "max_completion_length=64": "max_completion_length=4",
    }.items():
        assert old in train
        train = train.replace(old, new)
    names = run(train)
    assert names["trainer"].state.global_step == 1
    assert names["right"]([[{"content": "<answer>Paris</answer>"}], [{"content": "Rome"}]], ["Paris", "Rome"]) == [1.0, 0.0]
    model = run(use)["model"]
    assert any("lora_A" in name for name, _ in model.named_parameters())
