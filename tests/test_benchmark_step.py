"""The comparison of whole training steps at toy size: both trainers do the work that was asked for, and are refused if they do not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from peers import needs_trl
from rich.console import Console
from workers_in_process import InThisProcess

from grpo_fast.benchmark.harness.suite import load, run_suite
from grpo_fast.benchmark.step import suite
from grpo_fast.benchmark.step.inputs import make_prompts, rare_token, save_random_model
from grpo_fast.benchmark.step.suite import SUITE, StepSettings
from grpo_fast.benchmark.step.worker import PHASES, StepCase, StepWorker
from grpo_fast.utils.files import write_json

pytestmark = needs_trl

ROOT = Path(__file__).resolve().parent.parent
TOY = StepSettings(**{**SUITE.quick, "methods": ("lora",)})  # the other tests train all weights


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_random_model(folder, width=16, layers=1, vocabulary=101, positions=32, seed=0)
    return folder


@pytest.fixture(scope="module")
def case(model: Path) -> StepCase:
    from transformers import AutoTokenizer

    prompts = make_prompts(AutoTokenizer.from_pretrained(model), 8, 8, seed=0)
    return StepCase(model=model, prompts=prompts, groups=2, generations=4, completion=4, lora=False, threads=1)


def test_the_run_and_its_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "WorkerProcess", InThisProcess)
    result = run_suite(SUITE, TOY, lambda what: None)
    cells = {(x["implementation"], x["method"], x["active"]) for x in result["results"]}
    assert cells == {(name, method, active) for name in suite.LABELS for method in TOY.methods for active in (1.0, 0.5)}
    for entry in result["results"]:
        assert entry["median"] > 0 and set(entry["phases"]) == set(PHASES)
        assert all(entry["phases"][phase] > 0 for phase in PHASES), entry
        if entry["implementation"] == "stock":
            assert entry["faster_than_stock"] == 1
    console = Console(width=110, record=True)
    SUITE.print_report(result, console)
    assert "lora, 8, 2, 100%" in console.export_text()
    write_json(tmp_path / "step.json", result)
    assert SUITE.write_figure is not None
    SUITE.write_figure(load(tmp_path / "step.json", "bench-step"), tmp_path / "step.png")
    assert (tmp_path / "step.png").stat().st_size > 10_000


def test_the_page_has_what_was_measured() -> None:
    result = load(ROOT / "bench/results/step_cpu.json", "bench-step")
    page = (ROOT / "docs/results.md").read_text()
    assert "\n".join(suite.markdown(result)) in page, "\n".join(suite.markdown(result))
    assert not result["skipped"] and result["settings"]["rounds"] >= 2


@pytest.mark.parametrize("name", suite.LABELS)
def test_a_step_is_trained(name: str, case: StepCase) -> None:
    """Each repetition is one optimizer step that changes the model; what the groups are told differs between the shares."""
    worker = StepWorker(name, case)
    parameter = next(worker.trainer.model.parameters())
    seen = []
    for active in (1.0, 0.5, 1.0):
        before, step = parameter.detach().clone(), worker.trainer.state.global_step
        answer = worker.repetition(active)
        assert worker.trainer.state.global_step >= step + 1
        assert answer["seconds"] > 0 and not (parameter == before).all()
        seen.append(worker.loop.logs["frac_reward_zero_std"])
    assert seen == [0.0, 0.5, 0.0]


def test_other_work_is_refused(case: StepCase) -> None:
    worker = StepWorker("ours", case)
    worker.case = replace(case, completion=5)
    with pytest.raises(RuntimeError, match=r"completions/mean_length.*expected.*5.0"):
        worker.repetition(1.0)


def test_an_error_of_the_training_loop_arrives(case: StepCase, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = StepWorker("ours", case)

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise ArithmeticError("no loss")

    monkeypatch.setattr(worker.trainer, "compute_loss", fail)
    for _ in range(2):  # it is not forgotten, and nothing hangs
        with pytest.raises(ArithmeticError, match="no loss"):
            worker.repetition(1.0)


def test_prompts_have_their_number_of_tokens(model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts = make_prompts(tokenizer, 17, 3, seed=1)
    assert [len(ids) for ids in tokenizer(list(prompts)).input_ids] == [17] * 3 and len(set(prompts)) == 3
    assert prompts == make_prompts(tokenizer, 17, 3, seed=1) != make_prompts(tokenizer, 17, 3, seed=2)
    assert rare_token(tokenizer) == 100


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"model": "/no/such/folder"}, "model is '/no/such/folder'; expected the folder of a model"),
        ({"active": (0.3,)}, "active is 0.3; expected a share above 0 that is a whole number of 2 groups"),
        ({"generations": (1,)}, "generations is 1; expected at least 2"),
    ],
)
def test_bad_settings_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StepSettings(**wrong)
