"""Whole runs of the trainer: resuming, LoRA and reference policies, evaluation, and errors before wrong training."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import pickle
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hang import HANG
from trainer_cases import ROWS, TOKENIZER, Scripted, config, logs, model, odd_tokens, parameters, trainer
from transformers import TrainerCallback

import grpo_fast as gf
from grpo_fast.generation import Completion
from grpo_fast.rewards import accuracy_reward
from grpo_fast.trainer import GRPOTrainer
from grpo_fast.trainer.checkpoint_files import checksums_of, files_of, write_checksums
from grpo_fast.trainer.checkpoints import UNFINISHED, last_checkpoint
from grpo_fast.trainer.config import GRPOConfig
from grpo_fast.trainer.run_lock import LOCK

STEPS = 10


def run_of(output: Path, steps: int = STEPS, **settings: Any) -> GRPOTrainer:
    """A run that draws its own completions, saves every step, and has every kind of state."""
    settings = {
        "per_device_train_batch_size": 8,
        "temperature_schedule": {"kind": "entropy", "start": 1.0, "target": 0.1, "gain": 0.5},
        "lr_scheduler_type": "cosine",
        "save_strategy": "steps",
        "save_steps": 1,
        "max_steps": steps,
    } | settings
    return trainer(output, **settings)


# A rollout has four optimizer steps (two minibatches, two passes), so most checkpoints hold an unfinished one; and the reference changes.
WITHIN = {"steps_per_generation": 2, "num_iterations": 2, "beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 3}


@pytest.mark.parametrize(
    ("settings", "stops"), [({}, (1, 6)), (WITHIN, (1, 2, 7, 8))], ids=["one update a rollout", "four updates a rollout"]
)
def test_a_resumed_run_continues_as_the_uninterrupted_one(
    tmp_path: Path, settings: dict[str, Any], stops: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after each of the steps of a rollout, before and after the reference has changed."""
    monkeypatch.setattr(
        "grpo_fast.trainer.checkpoints._flush_to_disk", lambda folder: None
    )  # fsync only matters when the computer loses power
    undisturbed = run_of(tmp_path / "undisturbed", **settings)
    undisturbed.train()
    expected = {record["step"]: record for record in logs(undisturbed)}
    assert (
        len({record.get("temperature") for record in expected.values()}) > 2
    )  # the temperature changes, so that the schedule's state matters
    for step in stops:
        output = tmp_path / f"killed-{step}"
        output.mkdir()
        shutil.copytree(tmp_path / "undisturbed" / f"checkpoint-{step}", output / f"checkpoint-{step}")
        torch.manual_seed(step)  # other random numbers, as in another process
        resumed = run_of(output, **settings, save_strategy="no")
        resumed.train(resume_from_checkpoint=True)
        found = {record["step"]: record for record in logs(resumed)}
        assert set(found) == set(expected)
        for later in range(step + 1, STEPS + 1):
            for name in ("loss", "reward", "grad_norm", "entropy", "temperature", "learning_rate"):
                assert found[later].get(name) == expected[later].get(name), (step, later, name)
        for name, value in parameters(resumed.model).items():
            assert torch.equal(value, parameters(undisturbed.model)[name]), name


def test_killed_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(tmp_path, steps=3)
    save = GRPOTrainer.save_extra_state

    def killed(self: GRPOTrainer, folder: Path) -> None:
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        save(self, folder)

    monkeypatch.setattr(GRPOTrainer, "save_extra_state", killed)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert sorted(path.name for path in tmp_path.iterdir()) == [LOCK, UNFINISHED, "checkpoint-1", "checkpoint-2", "metrics.jsonl"]
    assert list((tmp_path / UNFINISHED).rglob("model.safetensors"))  # the checkpoint was partly written
    monkeypatch.undo()
    resumed = run_of(tmp_path, steps=3)
    resumed.train(resume_from_checkpoint=True)
    assert [record["step"] for record in logs(resumed)] == [1, 2, 3]
    assert not (tmp_path / UNFINISHED).exists() and last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")


def test_a_finished_run_that_is_resumed_stays_as_it_is(tmp_path: Path) -> None:
    """transformers' loop would make one more step each time a finished run is resumed."""
    run = run_of(tmp_path, steps=3)
    run.train()
    resumed = run_of(tmp_path, steps=3)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3 and logs(resumed) == logs(run)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")
    for name, value in parameters(resumed.model).items():
        assert torch.equal(value, parameters(run.model)[name])


def test_an_incomplete_checkpoint_is_skipped(tmp_path: Path) -> None:
    run_of(tmp_path, steps=2).train()
    (tmp_path / "checkpoint-9").mkdir()
    (tmp_path / "checkpoint-9" / "trainer_state.json").write_text('{"global_step": 9, "lo')
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match=r"lacks trainer_state.json"):
        run_of(tmp_path, steps=2).train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))
    run_of(tmp_path / "within", steps=1, **WITHIN).train()
    with pytest.raises(ValueError, match=r"in the middle of a rollout, with .*'num_iterations': 2.* now .*'num_iterations': 3"):
        run_of(tmp_path / "within", steps=2, **{**WITHIN, "num_iterations": 3}).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="no complete checkpoint"):
        run_of(tmp_path / "empty", steps=2).train(resume_from_checkpoint=True)


def test_limits_and_the_best_checkpoint(tmp_path: Path) -> None:
    settings = {"save_total_limit": 1, "eval_strategy": "steps", "eval_steps": 1, "eval_rounds": 1, "eval_dataset": ROWS[:4]}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "reward"}
    run = run_of(tmp_path, steps=4, **settings, **best)
    run.train()
    rewards = {record["step"]: record["eval_reward"] for record in run.state.log_history if "eval_reward" in record}
    top = max(rewards, key=lambda step: rewards[step])
    assert run.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{top}")
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {f"checkpoint-{top}"} | ({"checkpoint-4"} if top == 4 else set())


def test_lora_trains_the_adapter_with_the_base_model_as_reference(tmp_path: Path) -> None:
    from peft import LoraConfig

    of = model()
    before = parameters(of)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)
    run = trainer(
        tmp_path, of=of, peft_config=lora, beta=0.1, max_steps=3, learning_rate=0.1, gradient_checkpointing=True, save_strategy="steps"
    )
    run.train()
    base = {name.replace(".base_layer", ""): p for name, p in run.model.get_base_model().named_parameters() if "lora" not in name}
    assert all(torch.equal(base[name], value) for name, value in before.items())
    kl = [record["kl"] for record in logs(run)]
    assert kl[0] == pytest.approx(0, abs=1e-6) and kl[2] > 1e-4
    assert (Path(last_checkpoint(tmp_path) or "") / "adapter_model.safetensors").exists()


def test_kl_to_a_frozen_copy(tmp_path: Path) -> None:
    run = trainer(tmp_path, beta=0.5, max_steps=3, learning_rate=0.05)
    run.train()
    kl = [record["kl"] for record in logs(run)]
    assert kl[0] == pytest.approx(0, abs=1e-6) and min(kl[1:]) > 1e-4
    assert run.reference.copy is not None
    assert all(torch.equal(p, value) for p, value in zip(run.reference.copy.parameters(), parameters(model()).values(), strict=True))


def test_prompts_whose_rewards_are_equal_are_replaced(tmp_path: Path) -> None:
    def rewards(prompts: list[str], completion_ids: list[list[int]], **columns: Any) -> list[float]:
        return [0.0 if int(p[5:9]) % 2 else len(ids) for p, ids in zip(prompts, completion_ids, strict=True)]

    sampler = Scripted()
    run = trainer(tmp_path, rewards=rewards, sampler=sampler, dynamic_sampling_attempts=8)
    run.train()
    assert logs(run)[0]["frac_reward_zero_std"] == 0 and 1 <= logs(run)[0]["dynamic_sampling/attempts"] <= 8
    assert all(len(prompts) < 16 for prompts, _ in sampler.calls[1:])  # only those groups are drawn again
    hopeless = trainer(tmp_path, rewards=lambda completions, **_: [1.0] * len(completions), sampler=Scripted(), dynamic_sampling_attempts=2)
    hopeless.train()
    assert logs(hopeless)[0]["dynamic_sampling/attempts"] == 2 and logs(hopeless)[0]["loss"] == 0


def test_truncated_completions_are_left_out_and_overlong_ones_punished(tmp_path: Path) -> None:
    run = trainer(tmp_path, sampler=Scripted(), mask_truncated_completions=True, soft_punish_cache=4)
    run.train()
    assert run.rollout is not None
    cut = [len(ids) == 8 and ids[-1] != TOKENIZER.eos_token_id for ids in run.rollout.completion_ids]
    assert any(cut) and run.rollout.loss_mask.tolist() == [not was for was in cut]
    assert run.step_tokens == [sum(len(ids) for ids, was in zip(run.rollout.completion_ids, cut, strict=True) if not was)]
    punished = [-min(max((len(ids) - 4) / 4, 0.0), 1.0) for ids in run.rollout.completion_ids]
    assert logs(run)[0]["rewards/soft_overlong_punishment/mean"] == pytest.approx(sum(punished) / 16)


def test_each_reward_normalised_by_itself(tmp_path: Path) -> None:
    def length(completion_ids: list[list[int]], **columns: Any) -> list[float]:
        return [100.0 * len(ids) for ids in completion_ids]

    settings = {"multi_objective_aggregation": "normalize_then_sum", "reward_weights": [1.0, 0.5]}
    run = trainer(tmp_path, rewards=[odd_tokens, length], sampler=Scripted(), **settings)
    run.train()
    assert run.rollout is not None
    ids = run.rollout.completion_ids
    table = torch.tensor([odd_tokens(0, 0, ids), length(ids)]).T
    expected = gf.group_advantages(table, group_size=4, reward_weights=[1.0, 0.5], normalize="normalize_then_sum").advantages
    assert run.rollout.advantages.tolist() == pytest.approx(expected.tolist(), abs=1e-6)


def test_evaluation_is_at_its_own_temperature_over_rounds(tmp_path: Path) -> None:
    sampler = Scripted()
    run = trainer(tmp_path, sampler=sampler, eval_dataset={"small": ROWS[:3]}, eval_rounds=3, per_device_eval_batch_size=2)
    metrics = run.evaluate()
    assert [len(prompts) for prompts, _ in sampler.calls] == [2, 1] * 3
    assert {t for _, params in sampler.calls for t in params.temperatures} == {0.6}
    assert {params.top_p for _, params in sampler.calls} == {0.95} and len({params.seed for _, params in sampler.calls}) == 6
    assert metrics["eval_small_reward"] == metrics["eval_small_rewards/odd_tokens/mean"]
    assert metrics["eval_small_reward_se"] == 0  # the scripted sampler draws the same in every round
    drawn = trainer(tmp_path, eval_dataset=ROWS[:8], eval_rounds=4, eval_temperature=1.0, eval_top_p=1.0)
    first, again = drawn.evaluate(), drawn.evaluate()
    assert first["eval_reward_se"] > 0 and first["eval_reward"] == again["eval_reward"]  # the same random numbers each time
    assert not drawn.metrics.read()  # an evaluation adds nothing to the metrics of training


class Poison(torch.nn.Module):
    """NaN for one token of one row from the second step on."""

    def __init__(self, inner: torch.nn.Module, steps: int) -> None:
        super().__init__()
        self.inner, self.left = inner, steps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.left -= torch.is_grad_enabled()
        return self.inner(x) * (float("nan") if self.left < 0 else 1.0)


def test_a_loss_that_is_not_finite_stops_the_run_before_the_step(tmp_path: Path) -> None:
    of = model()
    of.model.norm = Poison(of.model.norm, 1)
    run = trainer(tmp_path, of=of, max_steps=3, sampler=Scripted())
    weights: dict[int, Any] = {}
    run.add_callback(_Remember(weights, of))
    with pytest.raises(FloatingPointError, match=r"step 2, process 0; .*Micro-batch 0: loss nan; .* of completion 0.*all finite") as error:
        run.train()
    assert "Fix" in str(error.value)
    assert all(torch.equal(value, weights[1][name]) for name, value in parameters(of).items())


class PoisonBackward(torch.autograd.Function):
    """The identity, whose gradient is NaN."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * float("nan")


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_a_gradient_that_is_not_finite_stops_the_run_before_the_step(tmp_path: Path, max_grad_norm: float) -> None:
    of = model()
    of.model.norm.register_forward_hook(lambda module, inputs, output: PoisonBackward.apply(output))
    run = trainer(tmp_path, of=of, sampler=Scripted(), max_grad_norm=max_grad_norm)
    with pytest.raises(FloatingPointError, match=r"The gradient is not finite at step 1, process 0; .* Parameters: all finite"):
        run.train()
    assert all(torch.equal(value, before) for value, before in zip(parameters(of).values(), parameters(model()).values(), strict=True))


@pytest.mark.parametrize("settings", [{}, {"fused_head": False}, {"gradient_checkpointing": True}], ids=str)
def test_in_bfloat16_the_weights_stay_in_float32_and_sampler_and_loss_agree(tmp_path: Path, settings: dict[str, Any]) -> None:
    of, seen = model(), set()
    of.model.layers[0].self_attn.q_proj.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    run = trainer(tmp_path, of=of, bf16=True, max_steps=2, num_iterations=2, **settings)
    run.train()
    assert torch.bfloat16 in seen and {p.dtype for p in of.parameters()} == {torch.float32}
    assert logs(run)[0]["sampling/sampling_logp_difference/mean"] < 0.02  # nats; the log-probabilities are about 3 nats below 0
    assert logs(run)[1]["loss"] != logs(run)[0]["loss"]


class _Remember(TrainerCallback):
    def __init__(self, weights: dict[int, Any], of: Any) -> None:
        self.weights, self.of = weights, of

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.weights[state.global_step] = parameters(self.of)


def at_temperature(factor: float) -> Any:
    """Log-probabilities of a sampler that draws at another temperature than requested."""
    of = model().eval()

    def logprobs(prompts: Any, found: list[Completion], params: Any) -> list[Completion]:
        result = []
        for prompt, completion, temperature in zip(prompts, found, params.temperatures, strict=True):
            ids = torch.tensor([prompt + completion.token_ids])
            with torch.no_grad():
                scores = of(ids).logits[0, len(prompt) - 1 : -1].div(temperature * factor).log_softmax(-1)
            values = scores.gather(-1, ids[0, len(prompt) :, None]).squeeze(-1).tolist()
            result.append(Completion(completion.token_ids, completion.finished, values))
        return result

    return logprobs


def test_a_sampler_at_another_temperature_is_detected_before_training(tmp_path: Path) -> None:
    of = model()
    run = trainer(tmp_path, of=of, temperature=0.8, sampler=Scripted(logprobs=at_temperature(1 / 0.8)))
    with pytest.raises(RuntimeError, match=r"at T = 0.8 by .*; at T = 1 by .*before the temperature is applied"):
        run.train()
    assert all(torch.equal(value, before) for value, before in zip(parameters(of).values(), parameters(model()).values(), strict=True))
    fine = trainer(tmp_path, temperature=0.8, sampler=Scripted(logprobs=at_temperature(1.0)))
    fine.train()
    assert logs(fine)[0]["sampling/sampling_logp_difference/max"] < 1e-4


@pytest.mark.parametrize("cut", [{"top_p": 0.95}, {"top_k": 20}, {"min_p": 0.05}], ids=str)
def test_truncation_does_not_hide_another_temperature(tmp_path: Path, cut: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match=r"differ from ours at T = 1 by .* Nothing was trained"):
        trainer(tmp_path, sampler=Scripted(logprobs=at_temperature(2.0)), **cut).train()
    trainer(tmp_path, **cut).train()  # the change by truncation itself is not a mismatch


def test_temperatures_that_differ_within_a_group_reach_the_loss(tmp_path: Path) -> None:
    spread = {"kind": "constant", "value": 0.9, "spread": 0.4}
    run = trainer(tmp_path, sampler=Scripted(logprobs=at_temperature(1.0)), temperature_schedule=spread)
    run.train()
    assert run.rollout is not None and run.rollout.temperature.tolist() == pytest.approx([0.9, 0.9, 1.3, 1.3] * 4)
    assert logs(run)[0]["sampling/sampling_logp_difference/max"] < 1e-4  # each is scored at its own temperature


def test_the_sampler_difference_becomes_weights(tmp_path: Path) -> None:
    settings = {"sampler_tolerance": 10.0, "metrics_on": "all", "vllm_importance_sampling_mode": "sequence_truncate"}
    run = trainer(
        tmp_path, sampler=Scripted(logprobs=at_temperature(1.1)), **settings
    )  # not TransformersSampler, so the difference is corrected
    run.train()
    rollout = run.rollout
    assert rollout is not None
    ours = torch.tensor([v for c in at_temperature(1.0)([*rollout.prompt_ids], _completions(rollout), _Ones(16)) for v in c.logprobs])
    bounds = torch.tensor([0, *rollout.lengths]).cumsum(0).int()
    expected = gf.rollout_weights(
        ours, rollout.tokens["sampler"], torch.ones_like(ours), mode="truncate", level="sequence", cu_seqlens=bounds
    )
    assert torch.allclose(rollout.tokens["weights"], expected, rtol=1e-4)
    assert 0.5 < logs(run)[0]["sampling/importance_sampling_ratio/mean"] != 1.0
    assert "weights" not in _rollout_of(trainer(tmp_path, **settings)).tokens
    assert "weights" in _rollout_of(trainer(tmp_path, **settings, vllm_importance_sampling_correction=True)).tokens


def _rollout_of(run: GRPOTrainer) -> Any:
    run.train()
    return run.rollout


class _Ones:
    def __init__(self, count: int) -> None:
        self.temperatures = [1.0] * count


def _completions(rollout: Any) -> list[Completion]:
    return [Completion(ids, True) for ids in rollout.completion_ids]


def test_truncated_sampling_logs_the_mass_it_kept(tmp_path: Path) -> None:
    run = trainer(tmp_path, top_p=0.8, max_steps=2)
    run.train()
    assert 0.8 <= logs(run)[0]["sampling/kept_mass"] < 0.999


def test_only_the_tokens_of_highest_entropy(tmp_path: Path) -> None:
    run = trainer(tmp_path, top_entropy_quantile=0.25, metrics_on="all")
    run.train()
    assert run.rollout is not None
    share = run.rollout.tokens["weights"].mean().item()
    assert share == pytest.approx(0.25, abs=0.03) and set(run.rollout.tokens["weights"].tolist()) == {0.0, 1.0}


def test_chat_prompts_extra_columns_and_logged_completions(tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    def reward(prompts: Any, completions: Any, answer: Any, trainer_state: Any, log_metric: Any, **columns: Any) -> list[float | None]:
        seen.update(prompts=prompts, completions=completions, answer=answer, step=trainer_state.global_step)
        log_metric("asked", float(len(prompts)))
        return [None, *[float(i) for i in range(1, len(prompts))]]

    tokenizer = TOKENIZER
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    rows = [{"prompt": [{"role": "user", "content": row["prompt"]}], "answer": row["answer"]} for row in ROWS]
    try:
        run = trainer(tmp_path, rows=rows, rewards=reward, log_completions=True, num_completions_to_print=3)
        run.train()
    finally:
        tokenizer.chat_template = None
    assert seen["prompts"][0][0]["role"] == "user" and seen["completions"][0][0]["role"] == "assistant"
    assert seen["step"] == 0 and len(seen["answer"]) == 16
    assert logs(run)[0]["asked"] == 16 and logs(run)[0]["rewards/reward/mean"] == pytest.approx(8.0)
    lines = (tmp_path / "completions" / "step-000001.jsonl").read_text().splitlines()
    assert len(lines) == 3 and json.loads(lines[1])["rewards"] == {"reward": 1.0}


BAD: dict[str, dict[str, Any]] = {
    "temperature is 0; expected a finite number above 0": {"temperature": 0},
    "num_generations is 1; expected at least 2": {"num_generations": 1},
    "generation_batch_size is 16; expected a multiple of num_generations = 3": {"num_generations": 3},
    "steps_per_generation is 3; expected a multiple of gradient_accumulation_steps": {
        "steps_per_generation": 3,
        "gradient_accumulation_steps": 2,
    },
    "generation_batch_size is 24; expected a multiple of 16": {"generation_batch_size": 24},
    "epsilon_high is None; expected a number with loss_type='cispo'": {"loss_type": "cispo"},
    "delta is 1.1; expected more than": {"delta": 1.1},
    "scale_rewards is 'batch'; expected 'group'": {"scale_rewards": "batch", "multi_objective_aggregation": "normalize_then_sum"},
    "sync_ref_model is True; expected False with beta=0": {"sync_ref_model": True},
    "soft_punish_cache is 9; expected between": {"soft_punish_cache": 9},
    "top_entropy_quantile is 0": {"top_entropy_quantile": 0.0},
    "vllm_importance_sampling_clip_min is 4.0; expected less": {"vllm_importance_sampling_clip_min": 4.0},
    "temperature is 0.8; expected 1.0, its default, with a temperature_schedule": {
        "temperature": 0.8,
        "temperature_schedule": {"kind": "constant", "value": 1.0},
    },
    "eval_rounds is 0": {"eval_rounds": 0},
    "auto_find_batch_size is True": {"auto_find_batch_size": True},
    "sampler is 'vllm'": {"sampler": "vllm", "use_transformers_continuous_batching": True},
    "sampler is 'sglang'; expected one of transformers": {"sampler": "sglang"},
    "sampler 'vllm' has no option ulr": {"sampler": "vllm", "sampler_options": {"ulr": "http://there"}},
    "reward_on_error is 'ignore'": {"reward_on_error": "ignore"},
    "reward_isolation is 'none'": {"reward_isolation": "none"},
    "reward_timeout is 0": {"reward_timeout": 0},
    "packing is 'yes'": {"packing": "yes"},
    "temperature is '1'; expected a number.": {"temperature": "1"},
    "temperature is nan; expected a number.": {"temperature": math.nan},
    "temperature is True; expected a number.": {"temperature": True},
    "top_p is 'a'; expected a number.": {"top_p": "a"},
    "reward_timeout is 'a'; expected a number, or None.": {"reward_timeout": "a"},
    "sampler_options is '{bad'; expected a dictionary, or JSON for one, or None.": {"sampler_options": "{bad"},
    "sampler_options is 5; expected a dictionary": {"sampler_options": 5},
    "temperature_schedule is '[1]'; expected a dictionary": {"temperature_schedule": "[1]"},
    "per_device_train_batch_size is 0; expected a whole number of at least 1": {"per_device_train_batch_size": 0},
    "gradient_accumulation_steps is 0; expected a whole number of at least 1": {"gradient_accumulation_steps": 0},
    "num_generations is 2.0; expected a whole number.": {"num_generations": 2.0},
    "vllm_importance_sampling_clip_max is 'a'; expected a number, or None.": {"vllm_importance_sampling_clip_max": "a"},
    "vllm_importance_sampling_clip_max is -1.0; expected a finite number above 0": {"vllm_importance_sampling_clip_max": -1.0},
    "vllm_importance_sampling_clip_min is -1.0; expected a finite number of at least 0": {"vllm_importance_sampling_clip_min": -1.0},
    "reward_weights is [1, 'a']; expected a list of finite numbers, or None.": {"reward_weights": [1, "a"]},
    "reward_weights is [nan]; expected a list of finite numbers": {"reward_weights": [math.nan]},
    "fused_head is 'no'; expected True or False.": {"fused_head": "no"},
    "shuffle_dataset is 'no'; expected True or False.": {"shuffle_dataset": "no"},
    "bf16 is 'no'; expected True or False, or None.": {"bf16": "no"},
    "loss_type is ['dapo']; expected a text.": {"loss_type": ["dapo"]},
    "scale_rewards is ['group']; expected one of 'group', 'batch', 'none', 'mean', 'tokens'.": {"scale_rewards": ["group"]},
    "num_completions_to_print is -3; expected a whole number of at least 1": {"num_completions_to_print": -3},
    "use_liger_kernel is True; expected False: it replaces the model's layers": {"use_liger_kernel": True},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_settings_raise_before_a_model_is_loaded(tmp_path: Path, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        config(tmp_path, **BAD[message])


def test_numpy_numbers_and_json_dictionaries_are_accepted(tmp_path: Path) -> None:
    np = pytest.importorskip("numpy", reason="its numbers are what is passed")
    given = config(tmp_path, temperature=np.float32(0.75), num_generations=np.int64(4), reward_weights=(1, np.float32(0.5)), packing=False)
    assert (
        (given.temperature, given.num_generations) == (0.75, 4) and type(given.temperature) is float and type(given.num_generations) is int
    )
    assert config(tmp_path, temperature_schedule='{"kind": "constant", "value": 0.9}').make_temperature_schedule().lowest == 0.9
    assert config(tmp_path, temperature_schedule=0.9).make_temperature_schedule().lowest == 0.9


def test_every_setting_of_the_loss_is_one_of_the_trainer(tmp_path: Path) -> None:
    """A new field of LossConfig is a setting of the trainer, without being declared again, and reaches the loss."""
    names = {field.name for field in dataclasses.fields(GRPOConfig)}
    missing = {field.name for field in dataclasses.fields(gf.LossConfig)} - names
    renamed = {"epsilon_low", "bias_corrected_kl"}
    assert missing == renamed | {"entropy_aggregation", "log_ratio_clamp"}
    settings = {"loss_type": "vespo", "vespo_k_pos": 1.5, "sapo_temperature_neg": 1.2, "kl_estimator": "k2", "epsilon": 0.1, "beta": 0.5}
    found = config(tmp_path, **settings, use_bias_correction_kl=False).loss_config()
    expected: dict[str, Any] = {name: value for name, value in settings.items() if name != "epsilon"} | {
        "epsilon_low": 0.1,
        "epsilon_high": 0.1,
    }
    assert found == gf.LossConfig(**expected, bias_corrected_kl=False, max_completion_length=8)
    with pytest.raises(ValueError, match=r"GRPOConfig: vespo_k_pos is 'a'; expected a number\."):
        config(tmp_path, vespo_k_pos="a")


def solved(completions: list[str], solution: list[str], **columns: Any) -> list[float]:
    return [float(text == truth) for text, truth in zip(completions, solution, strict=True)]


def test_other_errors_and_a_warning(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"below 0.7") as warned:
        trainer(tmp_path, temperature=0.6)
    assert len([warning for warning in warned if "below 0.7" in str(warning.message)]) == 1
    unloaded: dict[str, Any] = {"of": "there/is no such model"}  # loading it would fail, so these errors come before a model is loaded
    with pytest.raises(ValueError, match="train_dataset has 3 rows; expected at least 4"):
        trainer(tmp_path, rows=ROWS[:3], **unloaded)
    with pytest.raises(ValueError, match="train_dataset: there is no column 'prompt'"):
        trainer(tmp_path, rows=[{"question": "?"}] * 4, **unloaded)
    with pytest.raises(ValueError, match="train_dataset: the prompt of row 40 is None; expected a text"):
        trainer(tmp_path, rows=[*ROWS, {"prompt": None, "answer": ""}], **unloaded)
    with pytest.raises(TypeError, match="without a length"):
        trainer(tmp_path, eval_dataset=iter(ROWS), **unloaded)  # to train on, a stream may be an iterator
    with pytest.raises(ValueError, match=r"weights has 2 numbers; expected 1"):
        trainer(tmp_path, reward_weights=[1.0, 2.0], **unloaded)
    with pytest.raises(ValueError, match=r"reward 'solved' needs 'solution', .* the columns are: answer"):
        trainer(tmp_path, rewards=solved, **unloaded)
    with pytest.raises(ValueError, match="eval_dataset is None, and eval_strategy is 'epoch'"):
        trainer(tmp_path, eval_strategy="epoch", **unloaded)
    with pytest.raises(ValueError, match=r"eval_dataset\['hard'\]: there is no column 'prompt'"):
        trainer(tmp_path, eval_dataset={"easy": ROWS, "hard": [{"question": "?"}]}, **unloaded)


def test_settings_that_trl_has_too_mean_the_same_unless_the_page_says_so(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="the defaults compared with are TRL's")
    theirs = {field.name: field.default for field in dataclasses.fields(trl.GRPOConfig)}
    ours = {field.name: field.default for field in dataclasses.fields(GRPOConfig)}
    explained = {
        *("disable_dropout", "importance_sampling_level"),  # on; None: the loss type's own, which is "token" for all but LUSPO and GSPO
        *("vllm_mode", "vllm_importance_sampling_correction", "logging_nan_inf_filter"),
        "vllm_importance_sampling_mode",  # None: TRL's "sequence_mask", but with truncated sampling a weight per token
    }
    differ = {
        name for name in set(theirs) & set(ours) if ours[name] != theirs[name] and not isinstance(ours[name], type(dataclasses.MISSING))
    }
    assert differ == explained
    moved = config(tmp_path, use_vllm=True, vllm_mode="server", vllm_server_base_url="http://there:8000", scale_rewards=False)
    assert moved.sampler == "vllm" and moved.sampler_options == {"url": "http://there:8000"} and moved.scale_rewards == "none"
    assert config(tmp_path, use_vllm=True, vllm_server_port=8001).sampler_options == {"url": "http://0.0.0.0:8001"}
    with pytest.raises(ValueError, match="vllm_mode is 'colocate'"):
        config(tmp_path, use_vllm=True, vllm_mode="colocate")


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_rewards_read_the_logprobs_of_sampler_and_reference(tmp_path: Path, beta: float) -> None:
    seen: list[dict[str, Any]] = []

    def watcher(
        prompts: Any, completions: Any, completion_ids: Any, logprobs: Any = None, ref_logprobs: Any = None, **columns: Any
    ) -> list[float]:
        seen.append({"ids": completion_ids, "sampler": logprobs, "reference": ref_logprobs})
        return [float(len(ids) % 3) for ids in completion_ids]

    run = trainer(tmp_path, rewards=watcher, beta=beta, max_steps=1, temperature=0.9)
    run.train()
    for ids, sampler, reference in zip(*seen[0].values(), strict=True):  # before the first step, policy and reference are the same model
        assert len(ids) == len(sampler) == len(reference)
        torch.testing.assert_close(torch.tensor(sampler), torch.tensor(reference), rtol=1e-4, atol=1e-4)


def test_the_trainer_writes_the_metrics_file(tmp_path: Path) -> None:
    trainer(tmp_path, max_steps=2).train()
    lines = [json.loads(line) for line in next(tmp_path.rglob("metrics.jsonl")).read_text().splitlines()]
    assert [line["step"] for line in lines if "reward" in line] == [1, 2]


@pytest.mark.parametrize("wrong", ["raises", "hangs", "returns too few", "returns NaN"])
def test_a_reward_that_fails_ends_the_run_or_does_not_apply_as_configured(tmp_path: Path, wrong: str) -> None:
    def broken(completion_ids: list[list[int]], **columns: Any) -> list[float]:
        if wrong == "raises":
            raise KeyError("answer")
        if wrong == "hangs":
            time.sleep(3)
        values = [float(len(ids)) for ids in completion_ids]
        return values[1:] if wrong == "returns too few" else [math.nan, *values[1:]]

    settings: dict[str, Any] = {"rewards": [broken, odd_tokens], "reward_timeout": 0.5, "sampler": Scripted()}
    message = {"raises": "failed: KeyError", "hangs": "took longer than 0.5 s", "returns too few": "15 values for 16", "returns NaN": "nan"}
    with pytest.raises(ValueError, match=f"reward 'broken' .*{message[wrong]}"):
        trainer(tmp_path, **settings).train()
    run = trainer(tmp_path, **settings, reward_on_error="not_applicable")
    run.train()
    assert run.rollout is not None and logs(run)[0]["rewards/broken/applicable"] == (15 / 16 if wrong == "returns NaN" else 0)
    assert max(logs(run)[0].get(f"rewards/broken/{what}", 0) for what in ("errors", "timeouts")) == 1
    found = [row["rewards"] for row in run.last_completions]
    assert [row["odd_tokens"] for row in found] == pytest.approx(odd_tokens(0, 0, run.rollout.completion_ids))
    lengths = [None, *map(len, run.rollout.completion_ids[1:])] if wrong == "returns NaN" else [None] * 16
    assert [row["broken"] for row in found] == lengths  # each value belongs to its completion


def test_rewards_may_run_in_processes_of_their_own(tmp_path: Path) -> None:
    run = trainer(tmp_path, rewards=[accuracy_reward, "format"], reward_isolation="process", reward_timeout=HANG, sampler=Scripted())
    run.train()
    assert run.rewards.isolation == "process" and logs(run)[0]["rewards/accuracy_reward/applicable"] == 1
    run.rewards.close()


def test_nothing_in_a_checkpoint_can_run_code(tmp_path: Path) -> None:
    run_of(tmp_path, steps=2).train()
    checkpoint = tmp_path / "checkpoint-1"
    names = {path.name for path in checkpoint.iterdir() if path.suffix in (".pt", ".pth", ".bin", ".pkl")}
    assert names == {"optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"}  # the last is written but never read
    for name in sorted(names):
        kept = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(pickle.dumps(_Code(tmp_path / "it ran")))
        write_checksums(checkpoint, checksums_of(checkpoint, files_of(checkpoint)))  # as somebody would who means harm
        if name == "training_args.bin":
            run_of(tmp_path, steps=2).train(resume_from_checkpoint=str(checkpoint))
        else:
            with pytest.raises((pickle.UnpicklingError, RuntimeError)):
                run_of(tmp_path, steps=2).train(resume_from_checkpoint=str(checkpoint))
        (checkpoint / name).write_bytes(kept)
        write_checksums(checkpoint, checksums_of(checkpoint, files_of(checkpoint)))
    assert not (tmp_path / "it ran").exists()
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"lacks model.safetensors or"):
        run_of(tmp_path, steps=2).train(resume_from_checkpoint=str(checkpoint))


class _Code:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_an_unknown_head_is_computed_from_logits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def capped() -> Any:
        of = model()
        of.register_forward_hook(lambda module, inputs, output: output.__setitem__("logits", output.logits.tanh()))
        return of

    transformers_log = logging.getLogger("transformers")
    transformers_log.addHandler(caplog.handler)
    try:
        found = trainer(tmp_path / "a", of=capped(), sampler=Scripted())
        found.train()
    finally:
        transformers_log.removeHandler(caplog.handler)
    assert "computed from logits" in caplog.text
    asked = trainer(tmp_path / "b", of=capped(), sampler=Scripted(), fused_head=False)
    asked.train()
    assert logs(found)[0]["loss"] == logs(asked)[0]["loss"] and logs(found)[0]["grad_norm"] == logs(asked)[0]["grad_norm"] > 0


def test_the_seconds_of_each_part_of_a_step_are_logged(tmp_path: Path) -> None:
    def slow(completions: list[str], **_: Any) -> list[float]:
        time.sleep(0.2)
        return [*range(16)]

    run = trainer(tmp_path, max_steps=3, num_iterations=3, beta=0.1, rewards=slow)
    started = time.perf_counter()
    run.train()
    total = time.perf_counter() - started
    parts = ("generate", "reward", "logprobs", "loss", "backward", "optimizer")
    first, second, _ = ({part: log.get(f"step_time/{part}", 0.0) for part in parts} for log in logs(run))
    assert all(first[part] > 0 for part in parts) and first["reward"] > 0.2
    assert second["generate"] == second["reward"] == second["logprobs"] == 0 < second["loss"]  # the rollout is reused
    assert sum(first.values()) + sum(second.values()) < total
    assert ["tokens_per_second" in log for log in logs(run)] == [
        True,
        False,
        False,
    ]  # only steps that draw completions have a speed
