"""The demonstration: its task, its loop, its command; and, marked slow, that it learns on five seeds."""

import copy
import json
import math
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

import grpo_fast as gf
from grpo_fast.cli.demo import app
from grpo_fast.data.tasks.sorting import DIGITS, make_tokenizer, question, solve, split_questions
from grpo_fast.demo import compare, grpo, train_with_trainer, warm_start
from grpo_fast.demo.evaluate import TEMPERATURES, SamplingQuality, evaluate
from grpo_fast.demo.grpo import LoopSettings, check_on_policy, policy_loss, sample, train
from grpo_fast.demo.model import make_model
from grpo_fast.demo.options import REWARDS, DemoOptions
from grpo_fast.demo.success_criteria import success_criteria
from grpo_fast.demo.teacher import Teacher
from grpo_fast.rewards import accuracy_reward
from grpo_fast.utils.files import write_json
from grpo_fast.utils.install_hints import require_packages
from grpo_fast.utils.text_statistics import coherence, parse_sections

MIXED = ["sort 5281=", "sort 5=", "sort 31="]  # prompts of unequal length: two of them are padded
SHORT = ["--steps", "2", "--warm-start-steps", "2", "--prompts", "2", "--group-size", "2", "--evaluation-prompts", "3"]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def model(tokenizer):
    return make_model(tokenizer).eval()


def test_every_character_is_a_token_and_survives_the_round_trip(tokenizer):
    text = "sort 5281=<think>1258;1258</think><answer>1258</answer>"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len("sort 5281=") + 1 + 9 + 1 + 1 + 4 + 1
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode([*ids, tokenizer.eos_token_id, tokenizer.pad_token_id], skip_special_tokens=True) == text


def test_held_out_questions_are_never_trained_on():
    training, held_out = split_questions()
    assert len(training) + len(held_out) == 10**DIGITS
    assert not set(training) & set(held_out)


def test_the_teacher_has_the_habits_it_declares_and_no_others():
    rng, teacher, count = random.Random(0), Teacher(), 4000
    skipped = looped = slipped = 0
    for _ in range(count):
        sections = parse_sections(teacher.complete("5281", rng))
        if sections is None:
            skipped += 1
            continue
        lines = sections.reasoning.split(";")
        assert set(lines) == {"1258"}
        looped += len(lines) > 1
        slipped += sections.answer != "1258"
    thought = count - skipped
    for share, expected in ((skipped / count, teacher.skip), (looped / thought, teacher.loop), (slipped / thought, teacher.slip)):
        assert share == pytest.approx(expected, abs=4 * math.sqrt(0.25 / thought))  # four standard errors


def test_a_correct_completion_earns_the_largest_reward(tokenizer):
    row = question("9770")
    text = f"<think>{solve('9770')}</think><answer>{row['answer']}</answer>"
    batch = {"prompts": [row["prompt"]], "completions": [text], "completion_ids": [tokenizer(text)["input_ids"]], "answer": [row["answer"]]}
    rewards: list[Any] = [*REWARDS]
    values = {reward.__name__: reward(**batch)[0] for reward in rewards}
    assert values == {"accuracy_reward": 1.0, "format_reward": 1.0, "coherence_reward": 1.0, "repetition_penalty": 0.0}
    assert coherence(row["prompt"], text, key_pattern=r"\d") == 1.0


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_training_refuses_a_temperature_that_is_not_above_zero(temperature):
    with pytest.raises(ValueError, match=r"temperature is .*; expected a finite number above 0.*Fix: 1\.0"):
        LoopSettings(temperature=temperature)


def test_training_refuses_a_group_of_one():
    with pytest.raises(ValueError, match="group_size is 1; expected at least 2"):
        LoopSettings(group_size=1)


@pytest.mark.parametrize("loss_type", gf.LOSS_TYPES)
def test_every_loss_type_can_be_asked_for(loss_type):
    assert DemoOptions(loss_type=loss_type).settings().loss.loss_type == loss_type


@pytest.mark.parametrize(
    "wrong",
    [{"steps": 0}, {"prompts": 0}, {"evaluation_prompts": 10**6}, {"learning_rate": math.nan}, {"loss_type": "ppo"}, {"temperature": 0}],
)
def test_options_name_what_is_wrong(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=rf"{name} is .*; expected"):
        DemoOptions(**wrong)


def test_the_mask_ends_with_the_end_token(model, tokenizer):
    rollout = sample(model, tokenizer, MIXED * 20, 1.5, 40)
    for ids, mask in zip(rollout.completion_ids.tolist(), rollout.mask.tolist(), strict=True):
        end = ids.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in ids else len(ids)
        assert mask == [True] * end + [False] * (len(ids) - end)
    assert 0 < rollout.mask.sum() < rollout.mask.numel()  # some did end, or nothing was tested


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
def test_the_loss_sees_the_samplers_distribution_whatever_the_padding(model, tokenizer, temperature):
    settings = LoopSettings(temperature=temperature, max_new_tokens=12)
    assert check_on_policy(model, tokenizer, MIXED * 4, settings) < 1e-4


def test_padding_on_the_left_changes_nothing(model, tokenizer):
    settings = LoopSettings(max_new_tokens=6)
    together = sample(model, tokenizer, MIXED, 1.0, 6)
    logprobs = policy_loss(model, together, torch.zeros(3), settings).logprobs
    for row, prompt in enumerate(MIXED):
        ids = torch.tensor([tokenizer(prompt)["input_ids"] + together.completion_ids[row].tolist()])
        width = ids.shape[1] - together.completion_ids.shape[1]
        with torch.no_grad():
            alone = model(input_ids=ids).logits[0, width - 1 : -1].log_softmax(-1)
        expected = alone.gather(-1, together.completion_ids[row][:, None])[:, 0]
        mask = together.mask[row]
        torch.testing.assert_close(logprobs[row][mask], expected[mask], atol=1e-5, rtol=1e-5)


def test_another_sampling_temperature_is_detected(model, tokenizer, monkeypatch):
    def hotter(model, tokenizer, prompts, temperature, limit, **options):
        return sample(model, tokenizer, prompts, 1.5 * temperature, limit, **options)

    monkeypatch.setattr(grpo, "sample", hotter)
    with pytest.raises(RuntimeError, match=r"differ from the sampler's by up to .* do not share one temperature \(the loss has 1\.0\)"):
        check_on_policy(model, tokenizer, MIXED, LoopSettings())


def test_a_truncating_sampler_is_detected(model, tokenizer):
    model.generation_config.min_p = 0.2  # as a checkpoint's own generation settings may bring along
    with pytest.raises(RuntimeError, match="truncates or penalises"):
        check_on_policy(model, tokenizer, MIXED, LoopSettings())


def test_the_loop_learns_a_plain_preference_and_repeats_itself_exactly(tokenizer):
    """Reward: the share of the digit 7 in a completion. No task, no warm start: only the loop, twice from one seed."""
    seven = tokenizer.convert_tokens_to_ids("7")

    def sevens(completion_ids, **columns):
        return [sum(token == seven for token in ids) / len(ids) for ids in completion_ids]

    def run():
        torch.manual_seed(0)
        batches = iter(lambda: [{"prompt": prompt} for prompt in MIXED], None)
        settings = LoopSettings(steps=15, learning_rate=1e-2, max_new_tokens=6)
        return train(make_model(tokenizer), tokenizer, batches, {sevens: 1.0}, settings)

    first, second = run(), run()
    assert first[0]["reward"] < 0.2
    assert first[-1]["reward"] > 0.5
    assert [{**record, "seconds": 0} for record in first] == [{**record, "seconds": 0} for record in second]
    assert set(first[0]) >= {"rewards/sevens", "entropy", "zero_variance_groups", "truncated", "length", "loss", "grad_norm"}


def test_a_reward_that_does_not_apply_is_left_out(model, tokenizer):
    batches: Iterator[Any] = iter([[{"prompt": "sort 5281=", "answer": None}, {"prompt": "sort 3631=", "answer": "1336"}]])
    (record,) = train(model, tokenizer, batches, {accuracy_reward: 1.0}, LoopSettings(steps=1, group_size=2, max_new_tokens=4))
    assert record["rewards/accuracy_reward"] == 0.0
    assert record["zero_variance_groups"] == 1.0


def test_greedy_evaluation_has_no_diversity_and_no_entropy(model, tokenizer):
    cold, warm = evaluate(
        model, tokenizer, [question("5281"), question("3631")], group_size=4, max_new_tokens=8, seed=0, temperatures=(0.0, 1.0)
    )
    assert (cold.samples, cold.diversity, cold.entropy) == (8, 0.25, 0.0)
    assert warm.diversity > 0.25
    assert 0 < warm.entropy <= math.log(len(tokenizer))


def test_the_success_criteria_say_which_one_failed():
    def table(cold_cut, accuracy):
        return [SamplingQuality(t, 1, accuracy, 1, cold_cut, cold_cut, 0, 1, 1, 0, 1) for t in TEMPERATURES]

    assert all(criterion.met for criterion in success_criteria(table(1.0, 0.4), table(0.0, 0.95)))
    failed = [criterion.as_dict()["sentence"] for criterion in success_criteria(table(1.0, 0.4), table(0.0, 0.5)) if not criterion.met]
    assert failed == ["Accuracy at T = 0.6 after training is 0.500; expected at least 0.93."]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "result.json"
    write_json(target, {"run": 1})
    with pytest.raises(TypeError):
        write_json(target, {"run": object()})
    assert json.loads(target.read_text()) == {"run": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_a_missing_package_is_named_with_its_fix():
    with pytest.raises(ImportError, match=r"needs no_such_package, which is not installed. Fix: pip install '\.\[demo\]'"):
        require_packages("json", "no_such_package", extras=("demo",), needed_by="The demo")


def test_the_command_writes_its_files_and_reports_unmet_criteria(tmp_path):
    result = CliRunner().invoke(app, [*SHORT, "--output", str(tmp_path / "run")])
    assert result.exit_code == 1, result.output
    assert re.search(r"did not learn: .*expected at least 0\.93", result.output)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["curves.png", "result.json"]
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")
    numbers = json.loads((tmp_path / "run" / "result.json").read_text())
    assert numbers["learned"] is False
    assert len(numbers["history"]) == 2
    assert [row["temperature"] for row in numbers["before"]] == [row["temperature"] for row in numbers["after"]] == list(TEMPERATURES)
    assert set(numbers["seconds"]) == {"warm_start", "evaluation", "training", "total", "process_cpu"}
    assert set(numbers["versions"]) >= {"python", "torch", "transformers", "grpo_fast"}
    assert numbers["settings"]["temperature"] == numbers["options"]["temperature"] == 1.0
    assert len(numbers["samples"]) == 5
    assert all({"name", "value", "bound", "met", "sentence"} <= set(criterion) for criterion in numbers["criteria"])


@pytest.mark.parametrize(("option", "value"), [("--temperature", "0"), ("--loss-type", "ppo"), ("--group-size", "1")])
def test_the_command_refuses_bad_options(option, value, tmp_path):
    result = CliRunner().invoke(app, [option, value, "--output", str(tmp_path / "run")])
    assert result.exit_code == 2
    assert option.removeprefix("--").replace("-", "_") in result.output
    assert not (tmp_path / "run").exists()


def learn(folder: Path, *options: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, [*options, "--output", str(folder)])
    assert result.exit_code == 0, result.output
    numbers: dict[str, Any] = json.loads((folder / "result.json").read_text())
    assert numbers["learned"] is True
    assert numbers["history"][-1]["reward"] > numbers["history"][0]["reward"] + 0.5
    return numbers


@pytest.mark.slow
def test_the_demonstration_learns_in_fewer_steps(tmp_path: Path) -> None:
    """All four criteria hold after 36 of the 60 steps; after 24 the accuracy is 0.914, below its bound."""
    learn(tmp_path, "--steps", "36", "--evaluation-prompts", "48")


@pytest.mark.sweep
@pytest.mark.parametrize("seed", range(5))
def test_the_demonstration_learns(seed: int, tmp_path: Path) -> None:
    started = time.process_time()
    learn(tmp_path, "--seed", str(seed))
    assert time.process_time() - started < 90  # of CPU: the machine may be shared


def test_a_warm_start_depends_on_the_seed_and_reports_its_losses(monkeypatch):
    losses: list[float] = []
    first, again, other = (warm_start.warm_start(DemoOptions(seed=seed, warm_start_steps=3), losses.append) for seed in (1, 1, 2))
    weights = [next(start.model.parameters()) for start in (first, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert len(losses) == 9 and losses[:3] == losses[3:6] != losses[6:]
    assert {row["prompt"] for row in first.training}.isdisjoint(row["prompt"] for row in first.held_out)
    asked = []
    monkeypatch.setattr(warm_start, "imitate", lambda *args, **how: asked.append(how["seed"]))
    warm_start.warm_start(DemoOptions(seed=7))
    assert asked == [7], "the seed also determines the batches of imitation"


def test_loop_and_trainer_are_compared_from_one_start(tmp_path):
    pytest.importorskip("accelerate")
    small = ["--seeds", "2", "--steps", "2", "--warm-start-steps", "2", "--prompts", "2"]
    result = CliRunner().invoke(compare.app, [*small, "--output", str(tmp_path / "found.json")])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "found.json").read_text())
    assert [(run["seed"], run["way"]) for run in found["runs"]] == [(0, "loop"), (0, "trainer"), (1, "loop"), (1, "trainer")]
    assert all(len(run["curves"]["reward"]) == 2 and run["seconds"] > 0 for run in found["runs"])
    summary = found["summary"]["mean_training_reward"]
    loop, trainer = ([fmean(run["curves"]["reward"]) for run in found["runs"] if run["way"] == way] for way in ("loop", "trainer"))
    gaps = [mine - theirs for mine, theirs in zip(trainer, loop, strict=True)]
    assert summary["loop"] == pytest.approx(fmean(loop)) and summary["difference"] == pytest.approx(fmean(gaps))
    assert summary["standard_error"] == pytest.approx(abs(gaps[0] - gaps[1]) / 2) and gaps[0] != gaps[1]
    alone = CliRunner().invoke(compare.app, ["--seeds", "1", *small[2:], "--output", str(tmp_path / "found.json")])
    assert alone.exit_code == 0 and "±" not in alone.output
    assert json.loads((tmp_path / "found.json").read_text())["summary"]["seconds"]["standard_error"] is None, "one seed has no error"


def test_the_trainer_of_the_comparison_makes_the_step_of_the_loop(model, tokenizer, tmp_path, monkeypatch):
    """The same completions: the same loss, and the same weights after the step."""

    def odd(completion_ids, **columns):
        return [float(sum(ids) % 2) for ids in completion_ids]

    monkeypatch.setattr(train_with_trainer, "REWARDS", {odd: 1.0})
    settings = LoopSettings(steps=1, group_size=4, max_new_tokens=6)
    rows = [question("5281"), question("3631")]
    trainer = train_with_trainer.make_trainer(copy.deepcopy(model), tokenizer, rows, settings, 2, 0, tmp_path)
    trainer.train()
    drawn = trainer.rollout
    assert drawn is not None

    def again(model, tokenizer, prompts, temperature, limit, **options):
        width = max(map(len, drawn.completion_ids))
        ids = torch.tensor([ids + [tokenizer.pad_token_id] * (width - len(ids)) for ids in drawn.completion_ids])
        mask = torch.tensor([[True] * len(ids) + [False] * (width - len(ids)) for ids in drawn.completion_ids])
        asked = torch.tensor(drawn.prompt_ids)
        return grpo.SampledBatch(torch.cat([asked, ids], 1), torch.cat([torch.ones_like(asked), mask.long()], 1), ids, mask, None)

    monkeypatch.setattr(grpo, "sample", again)
    monkeypatch.setattr(grpo, "check_on_policy", lambda *args: 0.0)
    by_text = {row["prompt"]: row for row in rows}
    batch = [by_text[tokenizer.decode(ids, skip_special_tokens=True)] for ids in drawn.prompt_ids[::4]]
    (record,) = train(model, tokenizer, iter([batch]), {odd: 1.0}, settings)
    (log,) = [log for log in trainer.state.log_history if "loss" in log]
    assert record["loss"] == pytest.approx(log["loss"], abs=1e-6) and record["reward"] == pytest.approx(log["reward"], abs=1e-6)
    assert record["grad_norm"] == pytest.approx(log["grad_norm"], rel=1e-4) and log["grad_norm"] > 0
    for mine, theirs in zip(trainer.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-4)
