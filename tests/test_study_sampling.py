"""``grpo-fast study sampling``: calls of sampler and rewards, stored measurements, continuation, and settings that are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets")
pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")

from study_cases import ROWS, Counting, made, run, sampled

from grpo_fast.generation import SamplingParams
from grpo_fast.rewards import FormatReward
from grpo_fast.study import generate_completions, result_files, sampling, sampling_setup
from grpo_fast.study.generate_completions import SamplerCall, TemperatureSampler, TemperatureSamples

pytest_plugins = ["study_cases"]
pytestmark = pytest.mark.usefixtures("figures")

FEW = ["--rewards", "accuracy", "format", "--samples", "2", "--rounds", "1"]
Calls = list[tuple[int, SamplingParams]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Records the calls of the sampler: the number of prompts, and the parameters."""
    asked: Calls = []

    class Listening(Counting):
        def generate(self, prompts: list[list[int]], params: SamplingParams) -> Any:
            asked.append((len(prompts), params))
            return super().generate(prompts, params)

    monkeypatch.setattr(generate_completions, "make_sampler", lambda *args, **options: Listening())
    return asked


def drawer(*arguments: str, **more: Any) -> TemperatureSampler:
    study = made(*arguments, **more)
    return TemperatureSampler(study, sampling_setup.load_model(study))


def silent(temperature: float, done: int, total: int) -> None: ...


# ---- calls of the sampler


def test_the_sampler_gets_the_settings(here: Path, calls: Calls) -> None:
    penalties = ("--repetition_penalty", "1.2", "--generation_kwargs", '{"min_new_tokens": 2}')
    drawer("--top_p", "0.9", "--top_k", "7", "--min_p", "0.05", *penalties, "--samples", "2", "--rounds", "1").generate(0.7, silent)
    ((_, params),) = calls
    assert (params.top_p, params.top_k, params.min_p, params.max_new_tokens) == (0.9, 7, 0.05, 6)
    assert (params.repetition_penalty, params.generation_kwargs) == (1.2, {"min_new_tokens": 2})
    assert list(params.temperatures) == [0.7] * 8


def test_random_seeds_depend_on_round_and_prompts_and_not_on_the_temperature(here: Path, calls: Calls) -> None:
    def seeds(temperature: float) -> list[Any]:
        calls.clear()
        drawer("--samples", "2", "--rounds", "3", width="4").generate(temperature, silent)
        return [params.seed for _, params in calls]

    first = seeds(0.4)
    assert len(first) == 6 == len(set(first)), "three rounds of two calls"
    assert seeds(1.2) == first


@pytest.mark.parametrize(("width", "expected"), [("1", [2] * 4), ("5", [4, 4]), ("6", [6, 2]), ("64", [8])])
def test_a_call_gets_whole_groups(here: Path, calls: Calls, width: str, expected: list[int]) -> None:
    """As many as fit, and at least one."""
    drawer("--samples", "2", "--rounds", "1", width=width).generate(0.7, silent)
    assert [prompts for prompts, _ in calls] == expected


def test_a_call_gets_sixty_four_completions_by_default(here: Path) -> None:
    given = ["--model", "./model", "--dataset", "rows.jsonl", *FEW, "--use_cpu"]
    assert sampling_setup.prepare_sampling(given).config.per_device_eval_batch_size == 64
    assert next(line for line in run("sampling", "--help").splitlines() if line.startswith("--per_device_eval")).split()[1] == "64"
    Path("sums.yaml").write_text("model: ./model\ndataset: rows.jsonl\nper_device_eval_batch_size: 4\nnum_generations: 4\n")
    study = sampling_setup.prepare_sampling(["sums.yaml", "--rewards", "accuracy", "--use_cpu"])
    assert study.config.per_device_eval_batch_size == 4 and study.options.samples == 4, "the group size of the training"


# ---- calls of the rewards


def test_rewards_get_the_log_probabilities_of_the_policy(here: Path, calls: Calls) -> None:
    Path("given.py").write_text(
        "SEEN = []\n\n\ndef look(completion_ids, ref_logprobs, logprobs, answer, **columns):\n"
        "    SEEN.append((completion_ids, ref_logprobs, logprobs, answer))\n    return [float(i % 2) for i in range(len(answer))]\n"
    )
    drawing = drawer("--samples", "2", "--rounds", "1", "--correct", "given.py:look", rewards=("given.py:look",))
    for temperature in (0.0, 0.6):
        call = drawing.call_sampler(range(1, 3), temperature, 0)
        ids, ref, logprobs, answers = _function_of(drawing).__globals__["SEEN"].pop()
        assert ids == [completion.token_ids for completion in call.completions] and logprobs == [None] * 4
        assert answers == [ROWS[i]["answer"] for i in (1, 1, 2, 2)]
        own = _logprobs(drawing, call, temperature or 1.0)
        assert [len(row) for row in ref] == [len(row) for row in ids]
        torch.testing.assert_close(torch.tensor(ref), own, rtol=0, atol=1e-5)


def _function_of(drawing: TemperatureSampler) -> Any:
    (reward,) = drawing.study.runner.reward_funcs
    return getattr(reward, "__wrapped__", reward)


def _logprobs(drawing: TemperatureSampler, call: SamplerCall, temperature: float) -> torch.Tensor:
    rows = []
    for row, completion in zip(call.rows, call.completions, strict=True):
        ids = drawing.study.tokenizer(row["prompt"])["input_ids"]
        with torch.no_grad():
            logits = drawing.model(torch.tensor([ids + completion.token_ids])).logits[0, len(ids) - 1 : -1]
        rows.append((logits / temperature).log_softmax(-1).gather(-1, torch.tensor(completion.token_ids)[:, None])[:, 0])
    return torch.stack(rows)


@pytest.mark.parametrize(("weights", "flat"), [(["1", "0"], False), (["0", "1"], True), (["1", "1"], False)])
def test_zero_std_depends_on_the_weighted_rewards(here: Path, calls: Calls, weights: list[str], flat: bool) -> None:
    """The first reward differs within each group, the second does not."""
    rewards = ("study_rewards.py:differs", "study_rewards.py:same")
    drawing = drawer("--samples", "2", "--rounds", "1", "--correct", rewards[0], "--reward_weights", *weights, rewards=rewards)
    drawn = drawing.generate(0.6, silent)
    assert drawn.zero_std == [flat] * 4
    assert sampling.measure(drawn, drawing.study)["per_prompt"]["zero_std_correct"] == [0.0] * 4, "weights do not matter here"


def test_coherence_follows_think_opened_of_the_format_reward(here: Path) -> None:
    assert made(rewards=("accuracy", "format")).coherence is not None
    for opened in (True, False):
        coherence = sampling_setup._coherence_reward([FormatReward(think_opened=opened)])
        assert coherence is not None and coherence.think_opened is opened
    assert made(rewards=("accuracy",)).coherence is None


# ---- stored measurements


def found() -> dict[str, Any]:
    return json.loads(Path("found.json").read_text())


def measured() -> list[dict[str, Any]]:
    """The measurements of each temperature, in the file beside the result."""
    return json.loads(Path("found.raw.json").read_text())["drawn"]


def without_times(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in one.items() if name != "seconds"} for one in parts]


def dies_at(monkeypatch: pytest.MonkeyPatch, temperature: float, error: type[BaseException]) -> list[float]:
    """Makes sampling fail at this temperature. Returns the temperatures that were begun."""
    generate, begun = TemperatureSampler.generate, []

    def dies(self: TemperatureSampler, asked: float, on_calls: Callable[[float, int, int], None]) -> TemperatureSamples:
        begun.append(asked)
        if asked == temperature:
            raise error("not today")
        return generate(self, asked, on_calls)

    monkeypatch.setattr(TemperatureSampler, "generate", dies)
    return begun


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt, 130), (FloatingPointError, 1)])
def test_an_interrupted_study_continues(here: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], status: int) -> None:
    given = [*FEW, "--temperatures", "0", "0.5", "1.5"]
    sampled(*given)
    whole, parts = found(), measured()
    Path("found.json").unlink()
    Path("found.raw.json").unlink()
    with monkeypatch.context() as patched:
        dies_at(patched, 1.5, error)
        sampled(*given, status=status)
    assert [one["temperature"] for one in measured()] == [0.0, 0.5] and not Path("found.json").exists()

    begun = dies_at(monkeypatch, -1.0, error)
    sampled(*given)
    assert begun == [1.5], "finished temperatures are not sampled again"
    assert without_times(measured()) == without_times(parts)
    assert found() | {"runs": without_times(found()["runs"])} == whole | {"runs": without_times(whole["runs"])}

    # One more temperature, then fewer: from the same file, and without the model where nothing is missing.
    sampled(*FEW, "--temperatures", "0.8", "0.5")
    assert begun == [1.5, 0.8] and [row["temperature"] for row in found()["rows"]] == [0.5, 0.8]
    assert [one["temperature"] for one in measured()] == [0.0, 0.5, 0.8, 1.5]
    monkeypatch.setattr(sampling_setup, "load_model", lambda study: pytest.fail("the model was loaded"))
    out = sampled(*given)
    assert begun == [1.5, 0.8] and found()["rows"] == whole["rows"] and found()["advice"] == whole["advice"]
    assert all(sentence in out for sentence in whole["advice"]["sentences"])


def test_a_result_without_its_measurements_is_shown_again_and_not_extended(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = [*FEW, "--temperatures", "0.5", "1.0"]
    sampled(*given)
    before = Path("found.json").read_bytes()
    Path("found.raw.json").unlink()
    monkeypatch.setattr(sampling_setup, "load_model", lambda study: pytest.fail("the model was loaded"))
    out = sampled(*given)
    assert all(sentence in out for sentence in found()["advice"]["sentences"])
    message = "a result with temperatures = [0.5, 1.0], and now temperatures is [0.5]; expected the same, since found.raw.json"
    assert message in sampled(*FEW, "--temperatures", "0.5", status=2)
    assert "now samples is 3" in sampled(*given, "--samples", "3", status=2)
    assert Path("found.json").read_bytes() == before and not Path("found.raw.json").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--samples", "3"], "a study with samples = 2, and now samples is 3; expected the same"),
        (["--seed", "7"], "a study with seed = 42, and now seed is 7"),
        (["--reward_weights", "1", "0.5"], "a study with reward_weights = None, and now reward_weights is [1.0, 0.5]"),
        (["--data_seed", "9"], "a study with prompt_seed = 42, and now prompt_seed is 9"),
        (["--prompt_template", "{prompt}!"], "a study with prompt_template = None, and now prompt_template is '{prompt}!'"),
        (["--quick"], "and now "),
    ],
)
def test_a_file_with_other_settings_is_refused(here: Path, more: list[str], message: str) -> None:
    sampled(*FEW, "--temperatures", "1.0")
    before = Path("found.json").read_bytes()
    assert message in sampled(*FEW, "--temperatures", "1.0", *more, status=2)
    assert Path("found.json").read_bytes() == before


@pytest.mark.parametrize("rows", [ROWS[:2], [ROWS[0] | {"answer": "another"}, *ROWS[1:]]], ids=["prompts", "answers"])
def test_a_file_with_other_rows_is_refused(here: Path, rows: list[dict[str, str]]) -> None:
    shutil.copy("rows.jsonl", "mine.jsonl")
    sampled(*FEW, "--dataset", "mine.jsonl", "--temperatures", "1.0")
    Path("mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "a study with digest_of_rows = " in sampled(*FEW, "--dataset", "mine.jsonl", "--temperatures", "1.0", status=2)


@pytest.mark.parametrize("text", ["{", '{"kind": "temperature_training", "runs": []}', "[]", '{"kind": "temperature_sampling"}'])
def test_a_file_with_other_content_is_refused_and_kept(here: Path, text: str) -> None:
    Path("found.json").write_text(text)
    out = sampled(*FEW, status=2)
    assert "which holds " in out and "expected a study of sampling to go on with. Fix: another --output, or remove the file." in out
    assert Path("found.json").read_text() == text


def test_a_quick_study_replaces_a_quick_study(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = dies_at(monkeypatch, -1.0, KeyboardInterrupt)
    for samples in ("2", "3"):
        sampled("--rewards", "accuracy", "--quick", "--temperatures", "1.0", "--samples", samples)
    assert begun == [1.0, 1.0] and found()["options"]["samples"] == 3 and found()["quick"] is True


def test_different_versions_are_reported(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sampled(*FEW, "--temperatures", "1.0")
    here_made = result_files.versions()
    assert measured()[0]["made_with"] == found()["runs"][0]["made_with"] == here_made
    assert {"cpu", "torch", "commit", "transformers"} <= set(here_made)
    monkeypatch.setattr(sampling, "versions", lambda: here_made | {"torch": "9.9"})
    out = sampled(*FEW, "--temperatures", "0.5", "1.0")
    assert f"The temperatures were not all measured with the same: torch (9.9, {here_made['torch']})." in out


def test_secrets_are_not_stored(here: Path) -> None:
    sampled(*FEW, "--temperatures", "1.0", "--model_init_kwargs", '{"token": "hf_abc", "dtype": "float32"}')
    assert found()["options"]["model_init_kwargs"] == {"dtype": "float32"} and "hf_abc" not in Path("found.json").read_text()


def test_tables_are_printed_if_the_result_cannot_be_written(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(result_files, "write_text", full)
    out = sampled(*FEW, "--temperatures", "1.0", status=1)
    assert "Correctness (4 prompts" in out and "the result cannot be written: no space left on device" in out
    assert "warning: finished measurements cannot be stored" in out


# ---- refused settings and warnings


@pytest.mark.parametrize(
    ("option", "fix"),
    [
        ("--temperature", "--temperatures"),
        ("--num_generations", "--samples"),
        ("--eval_rounds", "--rounds"),
        ("--learning_rate", "leave it"),
    ],
)
def test_settings_that_sampling_does_not_read_are_refused_on_the_command_line(here: Path, option: str, fix: str) -> None:
    out = sampled(*FEW, option, "1", status=2)
    assert f"command line: {option} is not read by the sampling study; expected what --help shows. Fix: {fix}" in out
    assert "warning" not in out and not Path("found.json").exists()


def test_an_output_that_cannot_be_written_is_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling_setup, "load_model", lambda study: pytest.fail("the model was loaded"))
    for place in ("/proc/x/y.json", "/proc/y.json"):
        assert f"output is '{place}'; expected a place to write to" in sampled(*FEW, "--output", place, status=2)
    assert "is not read" in sampled(*FEW, "--output", "new/folder/found.json", "--temperature", "1", status=2) and not Path("new").exists()
    assert "correct is" in sampled(*FEW, "--output", "new/folder/found.json", "--correct", "no", status=2) and not Path("new").exists()


def test_fewer_rows_than_requested_give_a_warning(here: Path) -> None:
    assert "warning: prompts is 9, and only 4 rows can be used." in sampled(*FEW, "--temperatures", "1.0", "--prompts", "9")
    Path("found.json").unlink()
    Path("found.raw.json").unlink()
    assert "warning" not in sampled(*FEW, "--temperatures", "1.0"), "the default number of prompts gives no warning"


def test_a_log_file_gets_progress_lines(here: Path) -> None:
    out = sampled(*FEW, "--temperatures", "0.5", "1.0", "--per_device_eval_batch_size", "4")
    lines = [line for line in out.splitlines() if "calls of the sampler" in line]
    assert [line[line.index("T = ") :].split(" calls")[0] for line in lines] == [
        "T = 0.5: 0 of 2",
        "T = 0.5: 2 of 2",
        "T = 1: 0 of 2",
        "T = 1: 2 of 2",
    ]


def test_with_one_sample_groups_are_not_mentioned(here: Path) -> None:
    out = run(
        "sampling", "--model", "demo", "--dataset", "demo", "--rewards", "accuracy", "format", "--use_cpu", "--quick", "--samples", "1"
    )
    assert "would learn nothing" not in out
