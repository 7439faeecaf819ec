"""Settings and arguments of TRL that do not exist here: each is refused with a reason, from Python, the command line and a file."""

from __future__ import annotations

import dataclasses
import inspect
import pickle
from pathlib import Path
from typing import Any

import pytest
from peers import needs_trl
from trainer_cases import ROWS, config, trainer

from grpo_fast.trainer import GRPOConfig, GRPOTrainer
from grpo_fast.trainer.run_settings import parse_overrides
from grpo_fast.trainer.trl_names import REFUSED_ARGUMENTS, REFUSED_SETTINGS
from grpo_fast.utils.errors import SettingsError

OURS = {field.name for field in dataclasses.fields(GRPOConfig)}


@needs_trl
def test_no_name_of_trl_is_forgotten() -> None:
    import trl

    settings = {field.name for field in dataclasses.fields(trl.GRPOConfig)}
    assert settings - OURS <= set(REFUSED_SETTINGS)
    arguments = set(inspect.signature(trl.GRPOTrainer.__init__).parameters)
    assert arguments - set(inspect.signature(GRPOTrainer.__init__).parameters) <= set(REFUSED_ARGUMENTS)


@pytest.mark.parametrize("name", sorted(set(REFUSED_SETTINGS) - OURS))
def test_a_setting_is_refused_with_a_reason(name: str, tmp_path: Path) -> None:
    reason = REFUSED_SETTINGS[name]
    assert ". Fix: " in reason and not reason.endswith(".")
    with pytest.raises(TypeError) as error:
        config(tmp_path, **{name: 3})
    assert str(error.value) == f"GRPOConfig: {name} is 3, which does not exist here: {reason}."
    if name == "max_prompt_length":  # the command has an option of this name, which leaves out longer prompts
        return
    with pytest.raises(SettingsError) as error_of_command:
        parse_overrides([f"--{name}", "3"], GRPOConfig)
    assert str(error_of_command.value) == f"command line: {name} does not exist here: {reason}."
    (tmp_path / "run.yaml").write_text(f"{name.replace('_', '-')}: 3\n")
    with pytest.raises(SettingsError, match=f"run.yaml: {name} does not exist here: "):
        parse_overrides([str(tmp_path / "run.yaml")], GRPOConfig)


@pytest.mark.parametrize("name", sorted(REFUSED_ARGUMENTS))
def test_an_argument_is_refused_with_a_reason(name: str, tmp_path: Path) -> None:
    argument: dict[str, Any] = {name: []}
    with pytest.raises(TypeError, match=rf"^GRPOTrainer: {name} is \[\], which does not exist here: .*\. Fix: "):
        GRPOTrainer("gpt2", "format", config(tmp_path), **argument)


def test_a_misspelt_name_gets_a_suggestion(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"^GRPOConfig: num_generation is 4, and there is no such argument\. Did you mean num_generations"):
        config(tmp_path, num_generation=4)
    with pytest.raises(TypeError, match=r"^GRPOTrainer: reward_func is 'format', .* Did you mean reward_funcs"):
        GRPOTrainer("gpt2", reward_func="format")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"^GRPOConfig: api_token is '<redacted>'"):
        config(tmp_path, api_token="hf_abcdefghijklmnop")


def test_the_class_is_as_before(tmp_path: Path) -> None:
    made = config(tmp_path)
    assert "num_generations" in inspect.signature(GRPOConfig).parameters
    assert dataclasses.replace(made, beta=0.5).beta == 0.5
    assert pickle.loads(pickle.dumps(made)).num_generations == 4
    assert trainer(tmp_path).args.num_generations == 4


def test_num_generations_eval_is_trls_name_for_eval_rounds(tmp_path: Path) -> None:
    run = trainer(tmp_path, num_generations_eval=2, eval_top_p=0.5, eval_dataset=ROWS[:2])
    assert run.args.eval_rounds == 2 and run.evaluate()["eval_rounds"] == 2
    assert dataclasses.replace(run.args).eval_rounds == 2
    with pytest.raises(ValueError, match="num_generations_eval is 2; expected eval_rounds = 3"):
        config(tmp_path, num_generations_eval=2, eval_rounds=3)
    with pytest.raises(ValueError, match="num_generations_eval is 0; expected a whole number of at least 1"):
        config(tmp_path, num_generations_eval=0)
