"""The trainer's arithmetic: a step equals the formulas, however it is split, packed or distributed."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from trainer_cases import ROWS, TOKENIZER, Scripted, logs, model, odd_tokens, parameters, short, trainer

import grpo_fast as gf
from grpo_fast.models.forward import LARGEST_LEAK
from grpo_fast.models.packing import Layout, pack, packing_leak
from grpo_fast.trainer import grpo_trainer as trainer_module
from grpo_fast.trainer.rollout import Rollout


def sgd(of: torch.nn.Module) -> tuple[Any, Any]:
    optimizer = torch.optim.SGD(of.parameters(), lr=1.0)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)


def one_step(tmp_path: Path, **settings: Any) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """The parameters after one step of SGD with learning rate 1, which changes them by the gradient, and what the step logged."""
    of = model()
    run = trainer(tmp_path, of=of, **({"sampler": Scripted(), "optimizers": sgd(of), "max_grad_norm": 0.0} | settings))
    run.train()
    return parameters(of), logs(run)[-1]


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 2e-6) -> None:
    before = parameters(model())
    moved = max((expected[name] - before[name]).abs().max().item() for name in before)
    assert moved > 100 * tolerance  # the gradient is large compared with the tolerance
    for name, value in expected.items():
        assert (found[name] - value).abs().max().item() <= tolerance, name


def padded(rollout: Rollout) -> dict[str, torch.Tensor]:
    """Prompts padded on the left, completions on the right: the usual layout of a batch."""
    width, length = max(map(len, rollout.prompt_ids)), max(rollout.lengths)
    pad = TOKENIZER.pad_token_id
    ids, mask = [], []
    for prompt, completion in zip(rollout.prompt_ids, rollout.completion_ids, strict=True):
        left, right = width - len(prompt), length - len(completion)
        ids.append([pad] * left + prompt + completion + [pad] * right)
        mask.append([0] * left + [1] * (len(prompt) + len(completion)) + [0] * right)
    input_ids, attention_mask = torch.tensor(ids), torch.tensor(mask)
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "position_ids": (attention_mask.cumsum(1) - 1).clamp(min=0),
        "token_ids": input_ids[:, width:],
        "mask": attention_mask[:, width:].bool(),
    }


def scored(of: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:  # logits [B, T + 1, V]
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
    return of(**inputs).logits[:, -batch["token_ids"].shape[1] - 1 :]


def test_step_is_the_hand_written_one(tmp_path: Path) -> None:
    of = model()
    run = trainer(tmp_path, of=of, sampler=Scripted(), optimizers=sgd(of), max_grad_norm=0.0, temperature=0.8, rewards=[odd_tokens, short])
    run.train()
    rollout = run.rollout
    assert rollout is not None
    by_hand = model()
    batch = padded(rollout)
    rewards = torch.tensor([odd_tokens(0, 0, rollout.completion_ids), short(0, 0, rollout.completion_ids)]).T
    groups = gf.group_advantages(rewards, group_size=4)
    out = gf.grpo_loss(scored(by_hand, batch), batch["token_ids"], groups.advantages, mask=batch["mask"], temperature=0.8)
    out.loss.backward()
    with torch.no_grad():
        for p in by_hand.parameters():
            p -= p.grad
    assert_same(parameters(of), parameters(by_hand))
    log = logs(run)[0]
    assert log["loss"] == pytest.approx(out.loss.item(), abs=1e-6)
    assert log["entropy"] == pytest.approx(out.metrics["entropy"].item(), abs=1e-5)
    assert log["reward"] == pytest.approx(rewards.sum(1).mean().item(), abs=1e-6)
    assert log["reward_std_group"] == pytest.approx(groups.std.mean().item(), abs=1e-6)
    assert log["rewards/short/mean"] == pytest.approx(rewards[:, 1].mean().item(), abs=1e-6)


SPLIT = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}


@pytest.mark.parametrize("loss_type", sorted(gf.LOSS_TYPES))
def test_any_split_into_micro_batches_is_the_same_step(tmp_path: Path, loss_type: str) -> None:
    settings = {
        "loss_type": loss_type,
        "mask_truncated_completions": True,
        "beta": 0.1,
        "epsilon_high": 5.0 if loss_type == "cispo" else None,
    }
    whole, log = one_step(tmp_path, **settings)
    split, log_split = one_step(tmp_path, **settings, **SPLIT)
    assert_same(split, whole)
    for name in ("loss", "entropy", "reward", "kl", "clip_ratio/region_mean", "completions/mean_length", "active_fraction"):
        assert log_split[name] == pytest.approx(log[name], abs=1e-6), name


VARIANTS: dict[str, dict[str, Any]] = {
    "packed": {"packing": True},
    "packed, split": {"packing": True, **SPLIT},
    "from logits": {"fused_head": False},
    "from logits, packed": {"fused_head": False, "packing": True},
    "every row computed": {"metrics_on": "all"},
    "checkpointing": {"gradient_checkpointing": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_how_it_is_computed_does_not_matter(tmp_path: Path, variant: str) -> None:
    flat = {"rewards": lambda completion_ids, **_: [float(len(ids) > 7) for ids in completion_ids]}  # some groups have equal rewards
    expected, log = one_step(tmp_path, **flat)
    found, log_found = one_step(tmp_path, **flat, **VARIANTS[variant])
    assert log["frac_reward_zero_std"] > 0
    assert_same(found, expected)
    assert log_found["loss"] == pytest.approx(log["loss"], abs=1e-6)
    assert log_found["active_fraction"] == pytest.approx(log["active_fraction"], abs=1e-6)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_sequences_do_not_attend_to_each_other(attention: str) -> None:
    of = model(attn_implementation=attention).eval()
    assert packing_leak(of, TOKENIZER.pad_token_id, torch.device("cpu")) < 1e-6

    class Leaking(torch.nn.Module):  # an attention mask of ones lets packed sequences attend to each other
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.config = of, of.config

        def get_input_embeddings(self) -> Any:
            return of.get_input_embeddings()

        def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, **inputs: Any) -> Any:
            return of(input_ids=input_ids, position_ids=position_ids, attention_mask=torch.ones_like(input_ids))

    assert packing_leak(Leaking(), TOKENIZER.pad_token_id, torch.device("cpu")) > LARGEST_LEAK


@pytest.mark.parametrize("how", ["one_row", "rows", "padded"])
def test_layouts_score_each_token_by_the_one_before_it(how: Layout) -> None:
    prompts, completions = [[1, 2, 3], [4], [5, 6]], [[7], [8, 9, 10], [11, 12]]
    rows = Rollout(prompts, completions, torch.ones(3), torch.ones(3), torch.ones(3).bool())
    packed = pack(rows, layout=how, pad_token_id=0, device=torch.device("cpu"))
    ids, positions = packed.inputs["input_ids"].flatten(), packed.inputs["position_ids"].flatten()
    assert packed.token_ids.tolist() == [7, 8, 9, 10, 11, 12]
    assert ids[packed.scored_at + 1].tolist() == packed.token_ids.tolist()
    assert ids[packed.scored_at].tolist() == [3, 4, 8, 9, 6, 11]
    assert positions[packed.scored_at].tolist() == [2, 0, 1, 2, 1, 2]
    assert packed.cu_seqlens.tolist() == [0, 1, 4, 6]
    if how == "one_row":  # the arguments of flash attention
        assert packed.inputs["cu_seq_lens_q"].tolist() == packed.inputs["cu_seq_lens_k"].tolist() == [0, 4, 8, 12]
        assert packed.inputs["max_length_q"] == packed.inputs["max_length_k"] == 4
    assert packed.inputs["input_ids"].shape == {"one_row": (1, 12), "rows": (3, 4), "padded": (3, 4)}[how]


def test_several_updates_of_a_rollout(tmp_path: Path) -> None:
    """Two minibatches and two passes, against a hand-written loop with the log-probabilities of the policy that sampled."""
    of = model()
    settings = {"steps_per_generation": 2, "num_iterations": 2, "per_device_train_batch_size": 8, "max_steps": 4}
    sampler = Scripted()
    run = trainer(tmp_path, of=of, sampler=sampler, optimizers=sgd(of), max_grad_norm=0.0, epsilon=0.01, epsilon_high=0.02, **settings)
    run.train()
    rollout = run.rollout
    assert rollout is not None and len(sampler.calls) == 1
    by_hand = model()
    batches = [padded(rollout.select(range(i, i + 8))) for i in (0, 8)]
    advantages = rollout.advantages.split(8)
    with torch.no_grad():
        old = [gf.token_logprobs(scored(by_hand, b), b["token_ids"], mask=b["mask"]).logprobs for b in batches]
    losses, clipped = [], 0.0
    loss = gf.LossConfig(epsilon_low=0.01, epsilon_high=0.02)
    for i in (0, 1, 0, 1):
        b = batches[i]
        out = gf.grpo_loss(scored(by_hand, b), b["token_ids"], advantages[i], config=loss, old_logprobs=old[i], mask=b["mask"])
        by_hand.zero_grad()
        out.loss.backward()
        with torch.no_grad():
            for p in by_hand.parameters():
                p -= p.grad
        losses.append(out.loss.item())
        clipped += out.metrics["clip_region"].item()
    assert_same(parameters(of), parameters(by_hand), tolerance=1e-5)
    assert [log["loss"] for log in logs(run)] == pytest.approx(losses, abs=1e-5)
    assert clipped > 0 and sum(log["clip_ratio/region_mean"] for log in logs(run)) == pytest.approx(clipped, abs=1e-2)


@pytest.mark.parametrize("name", ["loss_mask", "counts"])
def test_rollouts_of_earlier_checkpoints_are_read(tmp_path: Path, name: str) -> None:
    """An unfinished rollout in a checkpoint called its loss mask ``counts`` before it was renamed."""
    rollout = Rollout([[1], [2, 3]], [[4, 5], [6]], torch.ones(2), torch.tensor([1.0, -1.0]), torch.tensor([True, False]))
    rollout.tokens["old"] = torch.tensor([0.5, 1.5, 2.5])
    rollout.save(tmp_path / "rollout.safetensors")
    table = load_file(tmp_path / "rollout.safetensors")
    table[name] = table.pop("loss_mask")
    save_file(table, tmp_path / "rollout.safetensors")
    found = Rollout.load(tmp_path / "rollout.safetensors", torch.device("cpu"))
    assert found.loss_mask.tolist() == [True, False] and found.completion_ids == [[4, 5], [6]]
    assert found.tokens["old"].tolist() == [0.5, 1.5, 2.5] and list(found.tokens) == ["old"]


def test_prompts_of_an_epoch_come_once_each_and_in_an_order_of_the_seed(tmp_path: Path) -> None:
    def asked(**settings: Any) -> list[str]:
        sampler = Scripted()
        trainer(tmp_path, sampler=sampler, max_steps=10, **settings).train()  # 10 rollouts of 4 prompts: one epoch of 40 rows
        return [TOKENIZER.decode(prompt) for prompts, _ in sampler.calls for prompt in prompts[::4]]

    first, again, other = asked(), asked(), asked(seed=1)
    assert sorted(first) == sorted(row["prompt"] for row in ROWS)
    assert first == again != other
    assert asked(shuffle_dataset=False) == [row["prompt"] for row in ROWS]


def test_the_trainer_file_stays_short_enough_to_read() -> None:
    assert len(Path(trainer_module.__file__).read_text().splitlines()) < 600


@pytest.mark.parametrize("name", ["trainer.metrics", "trainer.evaluation", "trainer.config", "models.batch", "utils.seeds"])
def test_examples_in_docstrings(name: str) -> None:
    found = doctest.testmod(importlib.import_module(f"grpo_fast.{name}"))
    assert found.attempted > 0 and found.failed == 0
