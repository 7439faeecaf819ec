"""The code of the guides runs, and the code before and after a change gives the same numbers."""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from doc_blocks import blocks
from peers import peer_module
from tiny_model import VOCABULARY, save_tiny_model

import grpo_fast as gf
from grpo_fast.benchmark.harness.suite import load

DOCS = Path(__file__).resolve().parent.parent / "docs"
GUIDES = sorted(path.name for path in DOCS.glob("*.md"))
MINE = ("liger.md", "openrlhf.md", "plain.md", "trl.md", "verl.md")


def run(code: str, names: dict[str, Any]) -> dict[str, Any]:
    exec(compile(code, "guide", "exec"), names)
    return names


@pytest.fixture
def names(generator: torch.Generator) -> dict[str, Any]:
    """What the guides take as given: a batch of 4 sequences of 5 tokens."""
    mask = torch.arange(5) < torch.tensor([5, 3, 4, 2]).unsqueeze(1)
    return {
        "torch": torch,
        "temperature": 0.7,
        "hidden": torch.randn(4, 5, 8, generator=generator).requires_grad_(),
        "hidden_and_one_more": torch.randn(4, 6, 8, generator=generator).requires_grad_(),
        "weight": torch.randn(31, 8, generator=generator).requires_grad_(),
        "logits": torch.randn(4, 6, 31, generator=generator).requires_grad_(),
        "completion_ids": torch.randint(31, (4, 5), generator=generator),
        "completion_mask": mask.long(),
        "mask": mask,
        "advantages": torch.tensor([1.2, -0.7, 0.4, -0.9]),
        "old_logprobs": torch.randn(4, 5, generator=generator) * 0.3 - 3.5,
        "ref_logprobs": torch.randn(4, 5, generator=generator) * 0.3 - 3.5,
        "logprobs": (torch.randn(4, 5, generator=generator) * 0.3 - 3.5).requires_grad_(),
    }


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def before_and_after(names: dict[str, Any], before: str, after: str, leaves: tuple[str, ...]) -> None:
    results = []
    for code in (before, after):
        run(code, names)
        loss = names["loss"] if "out" not in names else names.pop("out").loss
        results.append((loss.detach(), [names[leaf].grad for leaf in leaves]))
        for leaf in leaves:
            names[leaf].grad = None
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=1e-6)
    for mine, gradient in zip(results[1][1], results[0][1], strict=True):
        assert gradient.abs().max() > 1e-3
        torch.testing.assert_close(mine, gradient, rtol=1e-4, atol=1e-6)


def tiny_batch(model_path: Path, names: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM

    ids = torch.randint(3, VOCABULARY, (4, 8), generator=torch.Generator().manual_seed(3))
    names.update(model=AutoModelForCausalLM.from_pretrained(model_path), input_ids=ids, attention_mask=torch.ones_like(ids))
    names.update(sequences=ids, completion_ids=ids[:, -5:])


def test_every_guide_is_run() -> None:
    assert set(MINE) <= set(GUIDES)
    for guide in MINE:
        text = (DOCS / guide).read_text()
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            assert "://" in target or (DOCS / target).exists(), target


def test_custom_loss(names: dict[str, Any]) -> None:
    (code,) = blocks("custom-loss.md")
    run(code, names)
    assert names["out"].loss.isfinite() and names["weight"].grad.abs().max() > 1e-3
    ratio = torch.tensor([0.5, 0.5, 1.1, 2.0, 2.0], requires_grad=True)
    loss = names["ce_gppo"](ratio, torch.tensor([-1.0, 1.0, 2.0, 3.0, -1.0]))
    torch.testing.assert_close(loss, torch.tensor([0.4, -0.5, -2.2, -3.84, 2.0]))
    (gradient,) = torch.autograd.grad(loss.sum(), ratio)
    torch.testing.assert_close(gradient, torch.tensor([0.8, -1.0, -2.0, -1.92, 1.0]))


def test_plain(names: dict[str, Any], model_path: Path, tmp_path: Path) -> None:
    eager, fused, linear, trainer, like = blocks("plain.md")
    before_and_after(names, eager, fused, ("logits",))
    tiny_batch(model_path, names)
    run(linear, names)
    assert max(p.grad.abs().max() for p in names["model"].parameters() if p.grad is not None) > 1e-3

    from transformers import TrainingArguments

    config = gf.LossConfig(loss_type="dapo", epsilon_high=0.28)
    given = {name: names[name] for name in ("old_logprobs", "mask")}
    logits = names["model"](names["input_ids"]).logits[:, -6:]
    whole = gf.grpo_loss(logits, names["completion_ids"], names["advantages"], **given, temperature=0.7, config=config).loss
    names["model"].zero_grad()
    whole.backward()
    norm = torch.stack([parameter.grad.norm() for parameter in names["model"].parameters() if parameter.grad is not None]).norm()

    columns = {"input_ids": "input_ids", "attention_mask": "attention_mask", "token_ids": "completion_ids", "advantages": "advantages"}
    columns |= {"old_logprobs": "old_logprobs", "mask": "mask"}
    names["rollouts"] = [{name: names[given][row] for name, given in columns.items()} for row in range(4)]
    before = copy.deepcopy(names["model"].state_dict())
    for accumulation in (1, 2, 4):  # the mean over the tokens of the step, however it is split
        names["model"].load_state_dict(before)
        names["arguments"] = TrainingArguments(
            output_dir=str(tmp_path),
            use_cpu=True,
            max_steps=2,
            logging_steps=1,
            per_device_train_batch_size=4 // accumulation,
            gradient_accumulation_steps=accumulation,
            report_to="none",
            save_strategy="no",
            remove_unused_columns=False,
            disable_tqdm=True,
        )
        run(trainer, names)
        history = names["trainer"].state.log_history
        assert history[0]["loss"] == pytest.approx(whole.item(), abs=1e-4)  # Trainer rounds it
        assert history[0]["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        assert history[1]["loss"] < history[0]["loss"]
    run(like, names)
    assert names["config"].dual_clip == 3.0
    with pytest.raises(ValueError, match="uncapped_kl=True"):
        gf.LossConfig.like("swift")
    assert gf.LossConfig.like("swift", uncapped_kl=True).beta == 0.04 and gf.LossConfig.like("swift", beta=0.0).beta == 0


def test_trl(model_path: Path, tmp_path: Path) -> None:
    version = importlib.metadata.version("trl") if importlib.util.find_spec("trl") else None
    if version != "1.16.0":
        pytest.skip(f"the adapter is for trl 1.16.0, installed is {version}")
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

    settings = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "max_steps": 2}
    settings |= {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 6, "logging_steps": 1, "seed": 3}
    names = {
        "model": str(model_path),
        "reward": lambda completion_ids, **_: [sum(token * 7 % 13 for token in ids) / (12 * len(ids)) for ids in completion_ids],
        "settings": {**settings, "gradient_checkpointing": False, "disable_tqdm": True},
        "dataset": Dataset.from_dict({"prompt": [f"w{i % 30} w{i * 7 % 30}" for i in range(16)]}),
        "tokenizer": PreTrainedTokenizerFast.from_pretrained(model_path),
    }
    before, after, head = blocks("trl.md")
    losses = []
    for code in (before, after):
        torch.manual_seed(0)
        losses.append([entry["grad_norm"] for entry in run(code, names)["trainer"].state.log_history if "grad_norm" in entry])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    run(head, names)


def test_liger(names: dict[str, Any]) -> None:
    before, after, logits = blocks("liger.md")
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    before_and_after(names, before, after, ("hidden", "weight"))
    run(logits, names)
    assert names["hidden_and_one_more"].grad.abs().max() > 1e-3
    assert len(names["metrics"]) == 2


def test_verl(names: dict[str, Any], generator: torch.Generator) -> None:
    head, settings = blocks("verl.md")
    names["hidden"], names["labels"] = torch.randn(2, 5, 8).requires_grad_(), torch.randint(31, (2, 5))
    run(head, names)
    assert names["logprobs"].shape == names["entropy"].shape == (10,)
    assert names["weight"].grad.abs().max() > 1e-3
    run(settings, names)
    assert names["config"].epsilon_high == 0.28


def test_openrlhf(names: dict[str, Any], model_path: Path) -> None:
    import sys
    from unittest import mock

    before, after, head, logprobs = blocks("openrlhf.md")
    names["advantages"] = names["advantages"].unsqueeze(1).expand(4, 5)
    theirs = peer_module("openrlhf", "0.11.2", "models.loss", ("deepspeed",))
    modules = {"openrlhf": mock.MagicMock(), "openrlhf.models": mock.MagicMock(), "openrlhf.models.loss": theirs}
    with mock.patch.dict(sys.modules, modules):
        before_and_after(names, before, after, ("logprobs",))
    tiny_batch(model_path, names)
    run(head, names)
    assert names["action_log_probs"].shape == (4, 4)
    assert names["action_log_probs"].requires_grad
    names.pop("out")
    run(logprobs, names)
    assert names["logprobs"].grad.abs().max() > 1e-3


def test_the_table_of_the_guide_to_trl_says_what_was_measured() -> None:
    result = load(DOCS.parent / "bench/results/trl_cpu.json", "bench-trl")
    names = {"stock": "TRL 1.16.0", "ours": "`GRPOTrainer`", "ours_active": '`GRPOTrainer(metrics_on="active")`'}
    expected = []
    for implementation, name in names.items():
        entries = {entry["active"]: entry for entry in result["results"] if entry["implementation"] == implementation}
        faster = {active: "" if implementation == "stock" else f" ({entry['faster_than_stock']:.2f}x)" for active, entry in entries.items()}
        times = [f"{entries[active]['median']:.1f} s{faster[active]}" for active in (1.0, 0.5)]
        memory = max(entry["peak_bytes"] for entry in entries.values()) / 2**20
        expected.append(f"| {name} | {times[0]} | {times[1]} | {memory:,.0f} MiB |")
    rows = [line for line in (DOCS / "trl.md").read_text().splitlines() if re.match(r"\|.* MiB \|$", line)]
    assert rows == expected, "the rows of this guide's table are:\n" + "\n".join(expected)
    ours = {entry["active"]: entry for entry in result["results"] if entry["implementation"] == "ours"}
    stock = min(entry["peak_bytes"] for entry in result["results"] if entry["implementation"] == "stock")
    assert ours[1.0]["faster_than_stock"] >= 1.3
    assert ours[0.5]["faster_than_stock"] >= 2.0
    assert max(entry["peak_bytes"] for entry in ours.values()) < stock
